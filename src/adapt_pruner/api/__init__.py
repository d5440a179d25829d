"""The package from Python: each command as one call, on a name, a folder, a model in memory or a result.

arguments.py   turns callers' arguments into the form that the rest of the package takes; wrong ones are refused in a sentence
pruning.py     prune, run, shrink
result.py      what they return
measuring.py   evaluate, compare, verify, chat, and what they return
exporting.py   export

Errors of the rest of the package name options of the command line; here they name arguments (`arguments.in_python`).
"""

import warnings

with warnings.catch_warnings():  # tqdm, which other libraries import, asks for notebook widgets that nothing here needs
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # noqa: F401
