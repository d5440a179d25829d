"""Turn single weights of a layer into zeros."""
