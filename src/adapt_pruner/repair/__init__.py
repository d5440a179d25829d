"""Floor 2: closed forms that rewrite weights: repairs, which make up for what a cut takes away before it does, and a rotation.

A repair has the form `repair(model, axes, mask, batches, …) -> None`: it changes the layers behind the gates that `mask` shuts, in place,
so that shutting them costs less. The mask is against the model as it is; the cut comes afterwards. `rotate.py` turns the residual
stream, so that the least of its directions can be left out.
"""
