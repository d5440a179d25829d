"""`adapt-pruner methods`: the pruning methods, and the parts that recipes combine."""

from adapt_pruner.cli.options import Json

__all__ = ["methods"]


def methods(as_json: Json = False) -> None:
    """List the pruning methods, and the parts that a recipe can combine.

    Example:

        adapt-pruner methods
    """
    import yaml

    from adapt_pruner import recipe
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.recipe import parts

    rows = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in recipe.methods().items()}
    kinds = {key: parts.summaries(key) for key in parts.FOLDERS}
    if as_json:
        print(to_json({"methods": rows, "aliases": recipe.ALIASES, "parts": kinds}))
        return
    print_table(["method", "what it does", "source"], [[name, row["about"], row["paper"]] for name, row in rows.items()], left=3)
    for alias, name in recipe.ALIASES.items():
        print(f"{alias} stands for {name}; in later versions it may stand for a better method")
    for key, summaries in kinds.items():
        print()
        print_table([key, ""], [[name, line] for name, line in summaries.items()], left=2)
