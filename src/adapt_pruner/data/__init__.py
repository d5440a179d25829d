"""Floor 2: from a description of text (SPEC) to batches of token ids."""
