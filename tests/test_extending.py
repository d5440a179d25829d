"""Each example of docs/extending.md works as it stands: one file in a copy of the package, and the command below it."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapt_pruner
from conftest import VOCAB, byte_tokenizer, log_of, read_json, tiny_model
from strangers import command_of

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"```(?:python|yaml)\n# (src/\S+)\n(.*?)```\s+```sh\n(.*?)```", re.DOTALL)
EXAMPLES = {file: (f"# {file}\n{code}", command) for file, code, command in EXAMPLE.findall(PAGE)}
RECIPE = re.search(r"```yaml\n# recipe.yaml\n(.*?)```", PAGE, re.DOTALL)


def recipe_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(run / "model" / "pruning.json")["recipe"]
    return found


def sizes_of(run: Path) -> dict[str, int]:
    axes = read_json(run / "model" / "mask.json")["axes"]
    return {name: len(axis["kept"]) for name, axis in axes.items() if name.endswith("neurons")}


def tapers(place: Path, _: str) -> None:
    first, middle, last = sizes_of(place / "runs/tapered").values()
    assert first > middle < last


def trims(place: Path, _: str) -> None:
    axes = read_json(place / "runs/trim" / "model" / "mask.json")["axes"]
    assert {name.rpartition(".")[2] for name in axes} == {"neurons"}
    for axis in axes.values():
        assert axis["kept"] == list(range(len(axis["kept"])))
        assert len(axis["kept"]) < axis["size"]
    assert all(cut["loss"] > 0 for cut in log_of(place / "runs/trim", "cut"))


def tells(place: Path, said: str) -> None:
    shares = [line["share"] for line in log_of(place / "runs/milestones", "milestone")]
    assert shares == sorted(shares)
    assert shares[-1] >= 1
    assert f"{shares[0]:.0%} of the way" in said


def labels(place: Path, said: str) -> None:
    """Before and after training the accuracy is of whole texts, and the loss of labels alone falls far below that of tokens."""
    first, *_, last = log_of(place / "runs/labels", "evaluation")
    for measured in (first, last):
        assert measured["tokens"] == 4, "one prediction a text"
        assert measured["judged"]["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert last["nll"] < first["nll"] / 2
    assert recipe_of(place / "runs/labels")["task"] == "labels"
    assert f"accuracy {last['judged']['accuracy']:.4g}" in said


def is_half(place: Path, _: str) -> None:
    from safetensors.torch import load_file

    assert {tensor.dtype for tensor in load_file(place / "exported" / "model.safetensors").values()} == {torch.float16}


def is_half_zero(place: Path, _: str) -> None:
    from safetensors.torch import load_file

    weights = load_file(place / "runs/by-row" / "model" / "model.safetensors")
    assert ((weights["model.layers.0.mlp.down_proj.weight"] == 0).sum(dim=1) == 20).all()


def named(run: str, key: str, value: str) -> Callable[[Path, str], None]:
    def check(place: Path, _: str) -> None:
        found: Any = recipe_of(place / "runs" / run)
        for part in key.split("."):
            found = found[part]
        assert found == value

    return check


def differs(run: str) -> Callable[[Path, str], None]:
    """Training went another way than by the recipe as it stands: each step has another loss."""

    def check(place: Path, _: str) -> None:
        status, said = command_of(place.parent / "src", "run", "recipe.yaml", "-o", "runs/plain", folder=place)
        assert status == 0, said
        losses, plain = ([step["loss"] for step in log_of(place / "runs" / name, "step")] for name in (run, "plain"))
        assert len(losses) == len(plain) == 8
        assert not set(losses) & set(plain)

    return check


CHECKS: dict[str, list[Callable[[Path, str], None]]] = {
    "src/adapt_pruner/score/peak.py": [named("peak", "metric", "peak.peak")],
    "src/adapt_pruner/reduce/choose/tapered.py": [named("tapered", "chooser", "tapered.tapered(ends=0.25)"), tapers],
    "src/adapt_pruner/reduce/repair/same_norm.py": [named("same-norm", "repair", "same_norm.same_norm")],
    "src/adapt_pruner/reduce/trim.py": [named("trim", "reduce", "trim(at_once=3)"), trims],
    "src/adapt_pruner/reduce/zeros/by_row.py": [named("by-row", "solver", "by_row.by_row"), is_half_zero],
    "src/adapt_pruner/train/matching.py": [named("matching", "training.objective", "matching.matching"), differs("matching")],
    "src/adapt_pruner/data/backwards.py": [named("backwards", "training.feed", "backwards"), differs("backwards")],
    "src/adapt_pruner/data/labels.py": [labels],
    "src/adapt_pruner/export/half.py": [is_half],
    "src/adapt_pruner/families/smollm3.py": [named("smollm3", "model", "smollm3")],
    "src/adapt_pruner/reduce/milestones.py": [tells],
    "src/adapt_pruner/recipe/methods/norms.yaml": [named("norms", "method", "norms")],
}


def test_the_page_has_an_example_of_each_kind() -> None:
    assert EXAMPLES.keys() == CHECKS.keys()


@pytest.mark.parametrize("file", CHECKS)
def test_an_example_is_one_file_and_works(file: str, tmp_path: Path) -> None:
    code, command = EXAMPLES[file]
    package = tmp_path / "src" / "adapt_pruner"
    shutil.copytree(Path(adapt_pruner.__file__).parent, package)
    assert not (tmp_path / file).exists(), "an example is a new file"
    (tmp_path / file).write_text(code, encoding="utf-8")
    place = tmp_path / "place"
    place.mkdir()
    models = {"model": tiny_model(vocab_size=VOCAB)}
    if "families" in file:
        space: dict[str, Any] = {}
        exec(compile(code, file, "exec"), space)
        (config,) = space["tiny"]().values()
        config.vocab_size = VOCAB
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        models[space["MODEL_TYPES"][0]] = AutoModelForCausalLM.from_config(config)
    for name, model in models.items():
        model.save_pretrained(place / name)
        byte_tokenizer().save_pretrained(place / name)
    lines = (f"Line {number}: the quick brown fox jumps over {number**2} lazy dogs.\n\n" for number in range(400))
    (place / "text.txt").write_text("".join(lines), encoding="utf-8")
    reviews = ({"text": f"Film {n}: {'a joy' if n % 2 else 'a bore'}.", "label": "good" if n % 2 else "bad"} for n in range(40))
    (place / "reviews.jsonl").write_text("".join(json.dumps(review) + "\n" for review in reviews), encoding="utf-8")
    assert RECIPE is not None
    (place / "recipe.yaml").write_text(RECIPE[1], encoding="utf-8")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "adapt-pruner"
    status, said = command_of(tmp_path / "src", *words[1:], folder=place, ADAPT_PRUNER_CACHE=str(tmp_path / "cache"))
    assert status == 0, said
    for check in CHECKS[file]:
        check(place, said)
