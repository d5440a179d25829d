"""The nouns (Axis, Scores, Mask, Budget) and what can be done to any model with them; knows no method and no family."""
