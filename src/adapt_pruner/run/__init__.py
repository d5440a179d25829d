"""A run: its loop, its preparation, its folder, its results, and what it would take.

`loop` carries a run out, from `start` to `results`, and `folder` and `checkpoints` keep what it writes. Time is predicted in
three places:

    run.rules, run.probe, run.in_time   before `shrink`: what fits the user's time, after a probe of this machine
    run.estimate, run.forecast           `--dry-run`: time and memory of a given recipe, by formulas and a shorter probe
    run.ahead, core.events.progress             during a run: the time left, from the phases that are over
"""
