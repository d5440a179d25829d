"""`adapt-pruner recipes`: the recipes that come with the package."""

from adapt_pruner.cli.options import Json

__all__ = ["recipes"]


def recipes(as_json: Json = False) -> None:
    """List the recipes that `run` knows by name.

    Example:

        adapt-pruner recipes
    """
    import yaml

    from adapt_pruner import recipe
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.system.strict_json import to_json

    known = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in sorted(recipe.builtin().items())}
    if as_json:
        print(to_json({"recipes": known}))
        return
    lines = [
        [name, its["model"], str(its["budget"]), str(its.get("training", {}).get("tokens", "–")), its["about"]]
        for name, its in known.items()
    ]
    print_table(["recipe", "model", "to", "tokens", "what it does"], lines, left=5)
    print("\nadapt-pruner run RECIPE --dry-run shows the time and memory of a recipe; --set KEY=VALUE changes it.")
