"""The training loop, what it minimises (objectives) and its learning-rate curves (schedules)."""
