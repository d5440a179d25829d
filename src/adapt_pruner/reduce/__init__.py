"""Reductions, which bring a model to a stage's budget, and their parts: how much goes, which units, how to repair the rest.

Reductions  units.py (score, choose, repair, cut), slice.py, search.py, policy_gradient.py, hard_concrete.py, between_steps.py;
            sparse.py and sparse_training.py make zeros
choose/     allocate.py, rank.py, depth.py; widths.py: widths that other tools store or run fast; cutline.py: scores about the cut line
repair/     closed_form.py; factors.py: one factor for each attention and MLP
zeros/      solvers.py and fista.py of `reduce: sparse`; layer_inputs.py: the inputs that they solve with
propose/    proposals.py and language_model.py of `reduce: search`
"""
