"""A run: the loop, what it needs, its folder, its events, what it would take."""
