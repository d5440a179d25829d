"""From a description of text (SPEC) to batches of token ids."""
