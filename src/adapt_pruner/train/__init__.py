"""Floor 2: the training loop, what it minimises (objectives) and its learning-rate curves (schedules)."""
