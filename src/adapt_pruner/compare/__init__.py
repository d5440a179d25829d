"""Methods side by side at equal parameters: cells pruned apart and measured alike, a table, a picture."""
