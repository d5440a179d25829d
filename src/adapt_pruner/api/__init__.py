"""The package from Python: what each command does, as one call on a name, a folder, a model in memory or a result.

arguments.py   what callers give, in the words of the rooms below; what is none of it is refused in a sentence
pruning.py     prune, run, shrink
result.py      what they return
measuring.py   evaluate, compare, verify, chat, and what they return
exporting.py   export

Errors of the rooms below name options of the command line. Here they name arguments (`arguments.in_python`).
"""

import warnings

with warnings.catch_warnings():  # other libraries import it, and in a notebook it asks for widgets, which nothing here needs
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # noqa: F401
