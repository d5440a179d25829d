"""Floor 10: methods side by side at equal parameters: cells pruned apart and measured alike, a table, a picture."""
