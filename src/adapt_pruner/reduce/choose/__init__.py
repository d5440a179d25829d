"""How many units, layers or blocks go in an iteration, and which."""
