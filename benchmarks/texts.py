"""The texts that docs/measurements.md measures on, and the rule that no setting is chosen on one of them."""

import os
import sys
from fnmatch import fnmatch

TESTED = {
    "WikiText-2": "../shared/data/wikitext2/test_public.txt",
    "web text": "../shared/data/corpus/web_owt/*.jsonl.gz#heldout",
}
TUNED_ON = "../shared/data/corpus/web_c4/*.jsonl.gz#heldout"


def to_tune_on(spec: str) -> str:
    """The SPEC of a text on which settings may be chosen; ends the program if a figure of docs/measurements.md is measured on that text.

    `#train` of a text leaves out its `#heldout`, so it may be tuned on where only that part is tested.
    """
    path, _, part = spec.partition("#")
    for name, tested in TESTED.items():
        their_path, _, their_part = tested.partition("#")
        ours, theirs = os.path.realpath(path), os.path.realpath(their_path)
        shares_files = fnmatch(theirs, ours) or fnmatch(ours, theirs) or theirs.startswith(f"{ours}{os.sep}")
        if shares_files and not (part == "train" and their_part == "heldout"):
            sys.exit(
                f"error: settings chosen on {spec} would be chosen on {name}, which docs/measurements.md measures on; tune on another "
                f"text, such as '{TUNED_ON}'"
            )
    return spec
