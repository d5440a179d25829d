"""Options of parts: numbers come through however they are written, and what is none is refused while the recipe is read."""

import ast
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.compare.request import Request
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import methods, parts, read
from adapt_pruner.report import with_card
from conftest import as_dicts, byte_tokenizer, tiny_model
from test_report import small_recipe


@pytest.mark.parametrize("written", ["0.00001", "1e-5", "1.0e-5", "0.1e-4"])
def test_a_number_is_one_however_it_is_written(written: str) -> None:
    """YAML reads 1e-5 as text, and JSON writes 0.00001 like that; a recipe's spelling is read again."""
    spelled = parts.check("repair", f"least_squares(ridge={written})")
    assert parts.check("repair", spelled) == spelled
    assert parts.bind("repair", spelled).keywords == {"ridge": 1e-5}


def test_what_may_be_null_may_be_null() -> None:
    assert parts.bind("repair", "least_squares(ridge=null)").keywords == {"ridge": None}


@pytest.mark.parametrize(
    ("key", "written", "said"),
    [
        ("repair", "least_squares(ridge=-1)", "option 'ridge' of repair 'closed_form.least_squares' is -1; give a number \\(0 or more\\) or null"),
        ("repair", "least_squares(ridge=much)", "is 'much'; give a number \\(0 or more\\) or null"),
        ("repair", "least_squares(ridge=.nan)", "give a number"),
        ("repair", "least_squares(ridge=true)", "is True; give a number"),
        ("metric", "kfac(ridge=-5)", "is -5; give a number \\(0 or more\\)"),
        ("metric", "kfac(ridge=null)", "is None; give a number"),
        ("training.objective", "distil(alpha=high)", "is 'high'; give a number \\(0 to 1\\)"),
        ("training.objective", "distil(alpha=7)", "is 7; give a number \\(0 to 1\\)"),
        ("training.objective", "distil(temperature=0)", "is 0; give a number \\(above 0\\)"),
        ("training.objective", "distil(hidden=-0.1)", "is -0.1; give a number \\(0 or more\\)"),
        ("training.schedule", "wsd(warmup=5)", "'warmup' is a key of the recipe, not an option of schedule 'schedules.wsd'; set training.warmup instead"),
        ("chooser", "allocate.adaptive(step=0.5)", "'step' is a key of the recipe, not an option of chooser .* set step instead"),
        ("chooser", "rank.per_parameter(step=0)", "'step' is a key of the recipe, not an option of chooser .* set step instead"),
        ("chooser", "rank.per_parameter(floor=abc)", "is 'abc'; give a number"),
        ("chooser", "allocate.uniform(first=1.5)", "is 1.5; give a whole number"),
        ("metric", "weights.taylor(form=3)", "option 'form' of metric .* is 3; known: element, vector, second, mixed"),
        ("metric", "weights.taylor(form=elementt)", "option 'form' of metric .* is 'elementt'; did you mean 'element'"),
        ("metric", "weights.magnitude(norm=size)", "option 'norm' of metric .* is 'size'; known: l1, l2"),
        ("metric", "activations.fluctuation(form=mean)", "option 'form' of metric .* is 'mean'; known: IFV, WIFN, WIFV"),
        ("metric", "saap(terms=fused)", "option 'terms' of metric .* is 'fused'; known: both, element, vector"),
        ("chooser", "rank.standardised(structure=all)", "option 'structure' of chooser .* known: AL-AM, AL-MM, UL-MM, UL-UM"),
        ("chooser", "rank.standardised(by=head)", "option 'by' of chooser .* is 'head'; known: feature, kind, unit"),
        ("reduce", "search(fitness=accuracy)", "option 'fitness' of reduce 'search' is 'accuracy'; known: kl, loss"),
        ("reduce", "sparse_training(scores=size)", "option 'scores' of reduce .* is 'size'; known: magnitude, wanda"),
        ("solver", "fista(reads=none)", "option 'reads' of solver .* is 'none'; known: corrected, dense, sparse"),
        ("repair", "least_squares(ridge=-1)", "is -1; give a number \\(0 or more\\) or null"),
        ("repair", "least_squares(factors=-1)", "is -1; give a whole number \\(0 or more\\)"),
        ("training.feed", "dynamic(size=5)", "is 5; give a word"),
        ("reduce", "search(proposals=language_model, model=[1])", "option 'model' of reduce 'search' is \\[1\\]; give a word"),
    ],
)  # fmt: skip
def test_what_is_no_value_of_an_option_is_refused_where_it_is_read(key: str, written: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read({"model": "m", "budget": "80%"}, values={key: written})


@pytest.mark.parametrize(
    "annotation", ["Any", "list[int]", "Mapping[str, float] | None", "Annotated[list[int], '1 or more']", "Optional[int]"]
)
def test_an_option_that_no_recipe_can_write_is_refused(annotation: str) -> None:
    """Whatever type a part's author wrote."""
    with pytest.raises(UsageError, match=r"option 'x' of a part cannot be given in a recipe, because its type .*; leave it out"):
        parts._value([7], ast.parse(annotation, mode="eval").body, what="option 'x' of a part")


def test_proposals_name_no_model_themselves(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tiny_folder, text_file, reduce="search(proposals=language_model(model=x))", head_metric=None, step=0.02)
    with pytest.raises(
        UsageError, match="option 'model' of proposal .* cannot be given in a recipe, because its type Any is none of"
    ):
        with_card.run(recipe, tmp_path / "run")


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_pass_reads_something(tokens: int) -> None:
    with pytest.raises(UsageError, match=r"training\.micro_batch_tokens.*1"):
        read({"model": "m", "budget": "80%"}, values={"training.micro_batch_tokens": tokens})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "activations.wanda", "axes": ["neurons", "residual"], "chooser": "allocate.uniform", "distance": None, "head_metric": None}, "residual"),
        ({"metric": "activations.fluctuation(form=WIFN, authors_mean=true)"}, "authors_mean"),
        ({"chooser": "rank.standardised(structure=AL-MM, heads=0.2)", "axes": ["neurons"], "distance": None}, "heads"),
    ],
    ids=["axes", "mean", "heads"],
)  # fmt: skip
def test_what_a_part_refuses_is_refused_before_anything_is_measured(
    changes: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Nothing ties the folder to a recipe that cannot be."""
    heard: list[dict[str, Any]] = []
    recipe = small_recipe(tiny_folder, text_file, **changes)
    with pytest.raises(UsageError, match=said):
        with_card.run(recipe, tmp_path / "run", listen=as_dicts(heard.append))
    assert not {"start", "evaluation"} & {event["event"] for event in heard}
    assert not [path for path in (tmp_path / "run").glob("*") if path.name != ".lock"]


@pytest.mark.parametrize(("keys", "unread"), [
    ({"method": "wanda", "axes": ["neurons"], "step": 0.5, "amplitude": 0.5, "debt": "reset"}, "axes and debt and step and amplitude"),
    ({"method": "magnitude-all", "calibration": {"source": "a.txt", "samples": 3}}, "calibration.source and calibration.samples"),
    ({"method": "magnitude-all", "calibration": {"ids": "ids.json"}}, "calibration.ids"),
    ({"method": "magnitude-all", "calibration": {"self_generated": 8}}, "calibration.self_generated"),
    ({"method": "magnitude-all", "distance": "blocks.cosine"}, "distance"),
    ({"method": "magnitude-all", "amplitude": 0.3}, "amplitude"),
    ({"method": "uniform", "calibration": {"ids": "ids.json", "samples": 3, "length": 16}}, "calibration.samples and calibration.length"),
    ({"method": "shortgpt", "metric": "weights.magnitude"}, "metric"),
    ({"method": "bypass", "head_metric": "blocks.loss_drop"}, "head_metric"),
    ({"training": {"lr": 1e-3}, "moments": "reset"}, "training.lr and moments"),
    ({"training": {"source": "a.txt", "tokens": "1M", "schedule": "cosine", "decay": 0.5}}, "training.decay"),
    ({"evaluation": {"window": 64}}, "evaluation.window"),
    ({"evaluation": {"task_dir": "tasks"}}, "evaluation.task_dir"),
    ({"latency_of": "decode"}, "latency_of"),
    ({"solver": "wanda"}, "solver"),
])  # fmt: skip
def test_a_setting_that_nothing_reads_is_refused(keys: dict[str, Any], unread: str) -> None:
    with pytest.raises(UsageError, match=f"^{unread} would be ignored, since .*; leave (it|them) out"):
        read(keys)


@pytest.mark.parametrize("method", methods())
def test_a_recipe_with_all_its_keys_reads_the_same_again(method: str) -> None:
    """As a run's own recipe.yaml has them; a method's file has no key that its parts do not read."""
    recipe = read({"method": method, "model": "m"})
    assert recipe.unread() == []
    assert read(recipe.model_dump(mode="json")) == recipe


def test_a_recipe_file_may_have_settings_of_another_method() -> None:
    """What the file says of the method before is left out; what stands beside the new method is refused."""
    file = {"method": "adapt-pruner", "amplitude": 0.5, "step": 0.3, "calibration": {"samples": 3}}
    recipe = read(file, overrides=["method=magnitude-all"])
    assert (recipe.amplitude, recipe.step, recipe.calibration.samples) == (0.02, 0.3, 64), "a step is read by both"
    measured = {"evaluation": {"source": "a.txt", "window": 64}}
    assert read(measured, overrides=["evaluation.source=null"]).evaluation.window == 512, (
        "nor is a window of a text that is left out"
    )
    with pytest.raises(UsageError, match="^amplitude would be ignored"):
        read(file, overrides=["method=magnitude-all", "amplitude=0.1"])
    with pytest.raises(UsageError, match="^calibration.samples would be ignored"):
        read({}, values={"calibration.samples": 3}, overrides=["method=magnitude-all"])


def test_settings_that_methods_share_pass_where_one_of_them_reads_them() -> None:
    def asked(*methods: str, **settings: Any) -> Request:
        return Request(model="m", methods=methods, params=("80%",), texts=("t",), **settings).checked()

    shared = asked("adapt-pruner", "magnitude-all", calibration="a.txt", overrides=("amplitude=0.5",))
    one, other = shared.recipes.values()
    assert (one.amplitude, one.calibration.source) == (0.5, "a.txt")
    assert (other.amplitude, other.calibration.source) == (0.02, "self")
    amplitudes = {cell.method: cell.recipe.amplitude for cell in shared.cells(1000, 900)}
    assert amplitudes == {"adapt-pruner": 0.5, "magnitude-all": 0.02}
    with pytest.raises(UsageError, match="^amplitude would be ignored, since chooser 'allocate.uniform' does not read it"):
        asked("uniform", "magnitude-all", overrides=("amplitude=0.5",))
    with pytest.raises(UsageError, match="^calibration.source would be ignored"):
        asked("random", "magnitude-all", calibration="a.txt")


def test_damaged_weights_are_said_to_be_by_a_method_that_reads_no_text(text_file: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    byte_tokenizer().save_pretrained(tmp_path / "damaged")
    asked = read({"model": str(tmp_path / "damaged"), "budget": "80%", "method": "magnitude-all"})
    with pytest.raises(
        RunError,
        match=r"^weights\.magnitude gives NaN or infinity as score of layers\.1\.neurons; .*: set dtype=float32, repair the weights",
    ):
        with_card.prune(asked, tmp_path / "out")
