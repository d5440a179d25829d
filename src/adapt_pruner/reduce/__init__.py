"""Reductions, which bring a model to a stage's budget, and their parts: how much goes, which units, how to repair the rest.

work.py             `Work`, everything of a run; reduction.py: `Reduction`, the interface of a reduction
Reductions          units.py (score, choose, repair, cut), slice.py, search.py, policy_gradient.py, hard_concrete.py, between_steps.py;
                    sparse.py and sparse_training.py make zeros
Choosers            allocate.py, rank.py, depth.py; widths.py: widths that other tools store or run fast; cutline.py: scores about the cut line
Repairs             closed_form.py; factors.py: one factor for each attention and MLP
Solvers of sparse   solvers.py, fista.py; layer_inputs.py: the inputs that they solve with
Proposals of search proposals.py, language_model.py
"""
