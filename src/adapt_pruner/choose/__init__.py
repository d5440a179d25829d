"""Floor 3: which units stay under a budget; from Scores to a Mask."""
