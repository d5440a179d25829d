"""The nouns (Axis, Scores, Mask, Budget), what can be done with them to any model, and tools that all other folders use.

Nothing here knows a pruning method or a model family.

The model
    axes.py         what can shrink and what stays; surgery.py: shutting units and removing them; budget.py: counting parameters
    weight_mask.py  single weights that are zero; pattern.py: how many, and where
    layerwise.py    one decoder layer after the other; hooks.py: hooks that are always removed
Computing
    task.py         what a model learns; feed.py: which rows come next; loss.py: losses without the full logits; precision.py: number formats
    memory.py       how much is held; world.py: the processes that share a run; heartbeat.py: how these watch each other
Disk and processes
    files.py        files that are written whole or not at all; locks.py, marks.py, places.py: whose they are, and whether they can be
    children.py     child processes; interrupts.py: interrupts that wait; provenance.py: what made a result
What people see
    events.py       the events of a run; run_events.py, comparison_events.py: further ones
    progress.py     how far a run is, from its events; words.py, visible.py, streams.py: numbers, text of others, the terminal
    strict_json.py, strict_yaml.py: plain figures, and keys that are read strictly
parts.py            `@part` makes a function or class nameable in recipes
"""
