"""The nouns of a model (axes, masks, budgets, losses) and what is done with them: gate, cut, run layer by layer."""
