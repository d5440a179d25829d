"""The nouns (Axis, Scores, Mask, Budget) and the operations on any model with them. Knows no method and no family."""
