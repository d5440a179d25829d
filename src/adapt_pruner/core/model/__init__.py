"""The nouns of a model, and what is done with them.

axes.py         what can shrink and what stays; kinds.py: the kinds of units; cut.py: shutting and removing units; budget.py: counting
weight_mask.py  single weights that are zero; pattern.py: how many, and where
layers.py       one decoder layer after the other; hooks.py: hooks that are always removed
task.py         what a model learns; feed.py: which rows come next; loss.py: losses without the full logits
precision.py    number formats; modeling_pruned.py, modeling_sliced.py: the classes of a model whose layers differ, also saved with it
"""
