"""The package from Python: each command as one call, on a name, a folder, a model in memory or a result.

arguments.py   what arguments take; a wrong one is refused in a sentence; a model in memory gets a folder
pruning.py     prune, run, shrink, and what they return
measuring.py   evaluate, compare, verify, chat, and what they return
exporting.py   export
benching.py    bench, which only the command line has

The signatures are the only declarations of options: the command line makes its own from them (`cli.options`). So these files load
torch only when a function is called, because `--help` reads them.

Errors name options of the command line to a shell and arguments to Python (`errors.option`).
"""
