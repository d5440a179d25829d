"""Make up for what a cut removes."""
