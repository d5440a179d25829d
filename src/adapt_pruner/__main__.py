"""`python -m adapt_pruner` is `adapt-pruner`."""

from adapt_pruner.cli import main

if __name__ == "__main__":
    main()
