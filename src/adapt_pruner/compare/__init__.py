"""Compare methods at equal parameters: cells are pruned apart and measured alike, for a table and a picture."""
