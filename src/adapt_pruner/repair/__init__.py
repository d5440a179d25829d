"""Floor 2: making up for what a cut takes away, in closed form, before it takes it away.

A repair has the form `repair(model, axes, mask, batches, …) -> None`: it changes the layers behind the gates that `mask` shuts, in place,
so that shutting them costs less. The mask is against the model as it is; the cut comes afterwards.
"""
