"""What each unit and each layer is worth, split by the evidence it takes: weights, activations, curvature, blocks.

A metric has the form that `score.calibrate` describes: `metric(model, axes, …)` with a `yield` in it. What takes passes of its own
(`blocks.loss_drop`) is a plain function.
"""
