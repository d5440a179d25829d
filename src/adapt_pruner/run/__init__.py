"""A run: its loop, its preparation, its folder, its results, and what it would take.

`loop` carries a run out, from `start` to `results`, and `folder` and `checkpoints` keep what it writes. `plan` lists the phases
ahead with their operations. `forecast` prints what they take (`--dry-run`), `shrink` chooses by it what fits the user's time, at
the speed that `probe` measured, and `core.events.progress` computes the time left of it.
"""
