"""The files and folders that we write, by name."""

# a model
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PRUNING = "pruning.json"  # where the model comes from, and its figures
MASK = "mask.json"
WEIGHT_MASK = "sparsity/weight_mask.safetensors"
CARD = "README.md"

# a checkpoint of a run: a model, and
STATE = "state.json"
MOMENTS = "optimizer.safetensors"
ADAPTERS = "lora.safetensors"  # that are in training, and not merged into the weights

# a run
RECIPE = "recipe.yaml"
LOG = "log.jsonl"
PROGRESS = "progress.json"  # where the run stands
CALIBRATION_TEXT = "calibration_self.json"  # written by the model itself
REPAIR_TEXT = "repair_self.json"
CHECKPOINTS = "checkpoints"
RESULT = "model"
PAGE = "report.html"

# a comparison
COMPARISON = "compare.json"
COMPARISON_PAGE = "compare.html"
CELLS = "cells"

# any of these folders
MARK = ".adapt-pruner"  # says what the folder is
