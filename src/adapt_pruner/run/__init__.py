"""A run: its loop, its preparation, its folder, its results, and what it would take."""
