"""`adapt-pruner inspect`, `methods`, `models` and `recipes`: what a model is made of, layer by layer, and what the package brings along."""

from typing import Annotated, Any

import typer
import yaml

from adapt_pruner.cli.options import Json, Model, TrustRemoteCode
from adapt_pruner.cli.tables import print_table
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import UsageError


def inspect(
    model: Model,
    text: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Text on which to count how often each expert is used.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show heads, KV heads, neurons, experts and parameters of each layer of MODEL.

    Examples:

        adapt-pruner inspect small

        adapt-pruner inspect smollm2-135m-instruct --json
    """
    from adapt_pruner.checkpoint.load import load_that_fits
    from adapt_pruner.core.model.weight_mask import has_zeros
    from adapt_pruner.evaluate.anatomy import anatomy, expert_use

    loaded = load_that_fits(model, dtype=None, trust_remote_code=trust_remote_code, any_task=True)
    figures = anatomy(loaded.model, mask=loaded.mask, dense_params=loaded.dense_params)
    if text is not None:
        for layer, shares in expert_use(loaded.model, loaded.tokenizer, text).items():
            figures["layers"][layer]["used"] = shares
    if as_json:
        print(to_json({"model": model, **figures}))
        return
    routed = ["experts"] if any(row["experts"] for row in figures["layers"]) else []
    use = ["used"] if text is not None else []
    zeros = ["not zero"] if has_zeros(figures["params"], figures["nonzero"]) else []
    rows = [
        [
            f"{row.get('tower', '')} {row['layer']}".strip(), str(row["heads"]), str(row["kv_heads"]), f"{row['neurons']:,}", *(_experts(row) for _ in routed),
            *(_use(row) for _ in use),
            f"{row['params']:,}",
            *(f"{row['nonzero']:,}" for _ in zeros), _share(row),
        ]
        for row in figures["layers"]
    ]  # fmt: skip
    print_table(["layer", "heads", "KV heads", "neurons", *routed, *use, "parameters", *zeros, "of dense"], rows)
    whole = f", {_share(figures)} of the dense model" if figures["share_of_dense"] is not None else ""
    print(f"\n{model}: {figures['params']:,} parameters, {figures['decoder_params']:,} of them in the layers{whole}")
    if routed:
        print(
            f"{figures['active_params']:,} parameters are active in a token, {figures['active_params'] / figures['params']:.1%} of those stored"
        )
    if zeros:
        pattern = None if loaded.weight_mask is None else loaded.weight_mask.pattern
        stored = f"{figures['nonzero'] / figures['params']:.1%} of those stored{'' if pattern is None else f', {pattern.words}'}"
        print(f"{figures['nonzero']:,} parameters are not zero, {stored}")


def _experts(row: dict[str, Any]) -> str:
    return f"{row['experts']} of {row['expert_neurons']:,}" if row["experts"] else "0"


def _use(row: dict[str, Any]) -> str:
    """The share of the tokens that go to the least used and to the most used expert of a layer."""
    return f"{min(row['used']):.1%}–{max(row['used']):.1%}" if "used" in row else ""


def _share(row: dict[str, Any]) -> str:
    return "" if row["share_of_dense"] is None else f"{row['share_of_dense']:.1%}"


def methods(as_json: Json = False) -> None:
    """List the pruning methods, and the parts that a recipe can combine.

    Example:

        adapt-pruner methods
    """
    from adapt_pruner import recipe
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


def models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Part of the name of a model type.")] = None,
    as_json: Json = False,
) -> None:
    """List the model types that can be pruned, and what of each may shrink.

    Examples:

        adapt-pruner models

        adapt-pruner models granite
    """
    from adapt_pruner import families

    rows = {kind: row for kind, row in families.checked().items() if name is None or name.lower().replace("-", "_") in kind}
    if not rows:
        raise UsageError(
            f"no model type in the table has {name!r} in its name; a model of another type is checked when you load it, see docs/models.md"
        )
    if as_json:
        print(to_json(rows))
        return
    words = {True: "yes", False: "no"}
    table = [[kind, ", ".join(row["axes"]), words[row["unequal"]], words[row["gguf"]]] for kind, row in rows.items()]
    print_table(["type", "may shrink", "layers of unequal size", "GGUF"], table, left=4)
    if len(rows) == 1:
        for kind, row in rows.items():
            print()
            print_table([f"{kind}: what stays whole", ""], [[axis, why] for axis, why in row["stays"].items()], left=2)


def recipes(as_json: Json = False) -> None:
    """List the recipes that `run` knows by name.

    Example:

        adapt-pruner recipes
    """

    from adapt_pruner import recipe

    builtin = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in sorted(recipe.builtin().items())}
    if as_json:
        print(to_json({"recipes": builtin}))
        return
    lines = [
        [name, keys["model"], str(keys["budget"]), str(keys.get("training", {}).get("tokens", "–")), keys["about"]]
        for name, keys in builtin.items()
    ]
    print_table(["recipe", "model", "to", "tokens", "what it does"], lines, left=5)
    print("\nadapt-pruner run RECIPE --dry-run shows the time and memory of a recipe; --set KEY=VALUE changes it.")
