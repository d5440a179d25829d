"""`python -m adapt_pruner` is `adapt-pruner`: neither takes a Python file of the current folder for a library."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the current folder, which -m puts there without -P, as torchrun does

from adapt_pruner.cli import main

if __name__ == "__main__":
    main()
