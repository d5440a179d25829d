"""Reductions, which bring a model to a stage's budget, and their parts: how much goes, which units, how to repair the rest."""
