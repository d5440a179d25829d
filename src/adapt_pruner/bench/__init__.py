"""Floor 7: how fast a model runs in an engine beside the one it was made from, and how much of what it could gain it gains."""
