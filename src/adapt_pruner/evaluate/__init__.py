"""Floor 3: how good and how fast a model is."""
