"""What fits into a given time: the rules of `shrink`, from measured speeds to the keys of a recipe; no model is needed."""
