"""What each unit and each layer is worth; one file for each kind of evidence: weights, activations, curvature, blocks.

A metric has the form that `score.calibrate` describes: `metric(model, axes, …)` with a `yield` in it. A measure that makes passes
of its own (`blocks.loss_drop`) is a plain function.
"""
