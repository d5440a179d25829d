"""Floor 2: what each unit and each layer is worth, split by the evidence it takes: weights, activations, blocks.

Every metric has the form that `core.calibrate` describes: `metric(model, axes, …)` with one `yield` in it.
"""
