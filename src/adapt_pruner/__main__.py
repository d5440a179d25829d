"""Entry point of `python -m adapt_pruner`.

It takes the current folder off sys.path, so that a file such as ./torch.py there cannot take the place of a library.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the current folder; -m puts it there unless -P is given, and so does torchrun

from adapt_pruner.cli import program

if __name__ == "__main__":
    program()
