"""Floor 3: how many units each axis keeps under a budget; from Scores to sizes."""
