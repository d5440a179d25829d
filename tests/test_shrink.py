"""`shrink` on a tiny model: plan, run, page; interrupted and gone on with; text in two parts; and what is refused."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from adapt_pruner.checkpoint.load import load_shapes
from adapt_pruner.core.events.words import span
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.system import memory
from adapt_pruner.data.fixed import training_rows
from adapt_pruner.data.sources import documents
from adapt_pruner.data.split import split_off_heldout
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import read
from adapt_pruner.run import loop, plan, probe, start, trackers
from adapt_pruner.run import shrink as shrinking
from adapt_pruner.run.training import Trainer
from adapt_pruner.work import Work
from conftest import as_dicts, assert_same_model, byte_tokenizer, read_json, tiny_model
from test_cli import ask
from test_vocabulary import byte_level

__all__ = ["ask"]  # a fixture


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents."""
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    fox = "the quick brown fox jumps over {} lazy dogs"
    rows = ("".join(f"Line {i}.{j}: {fox.format(i * j)}.\n" for j in range(40)) for i in range(60))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def shrink(model: Path, text: Path, out: Path, *words: Any) -> list[Any]:
    given = words if any(str(word) in ("--minutes", "--hours", "--tokens") for word in words) else ("--tokens", "10k", *words)
    quick = ["--set", "calibration.samples=8", "--set", "evaluation.max_windows=4"]
    return ["shrink", model, "--params", "70%", "--text", text, "-o", out, *given, *quick]


def test_a_plan_in_five_lines_a_model_its_page_and_a_recipe_that_runs_again(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    status, said, lines = ask(*shrink(tiny_folder, text, out))
    assert status == 0, lines
    plan = [line.partition(":")[0] for line in lines.splitlines() if line.startswith(("machine:", "prune:", "train:", "text:"))]
    assert plan == ["machine", "prune", "train", "text"]
    assert "it takes about" in lines
    assert "parameters, trained on 10.2" in said
    assert f"saved {out / 'model'}; its report is {out / 'report.html'}" in said
    assert (out / "report.html").exists()
    assert (out / "model" / "README.md").exists()
    recipe = read(str(out / "recipe.yaml"))
    assert recipe.training.source == f"{text}#train" == recipe.calibration.source
    assert recipe.evaluation.source == f"{text}#heldout"
    assert int(recipe.budget) <= 0.7 * 50_784
    assert not list((out / "checkpoints").iterdir()), "the result is all that is left to need room"
    assert "measuring this machine (up to a minute)" in lines
    assert ask("run", out / "recipe.yaml", "-o", tmp_path / "again", "--set", "keep_checkpoints=2")[0] == 0
    assert list((tmp_path / "again" / "checkpoints").iterdir())
    assert_same_model(out, tmp_path / "again")
    status, again, lines = ask(*shrink(tiny_folder, text, out))
    assert (status, again) == (0, said)
    assert "this run is finished" in lines
    status, _, lines = ask(*shrink(tiny_folder, text, out), "--set", "training.lr=1e-3")
    assert (status, lines.count("\n")) == (2, 1)
    assert "was started with another training.lr" in lines


def test_ctrl_c_keeps_the_newest_checkpoint_and_the_same_command_goes_on(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "small", Trainer._tell

    def tell(self: Trainer, step: Any, *rest: Any) -> None:
        told(self, step, *rest)
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_tell", tell)
        status, said, lines = ask(*shrink(tiny_folder, text, out))
    assert (status, said) == (1, "")
    assert f"the newest checkpoint is {out / 'checkpoints' / 'stage-1-step-2'}, of 35," in lines
    assert "parameters, trained on 4.1" in lines
    assert "its learning rate has not come down yet" in lines
    status, said, lines = ask(*shrink(tiny_folder, text, out))
    assert status == 0, lines
    assert "continuing from" in lines
    assert "machine:" not in lines, "the plan stays"
    assert ask("run", out / "recipe.yaml", "-o", tmp_path / "whole")[0] == 0
    assert_same_model(out, tmp_path / "whole")


def test_ctrl_c_while_the_result_is_measured_loses_no_training(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measured = tmp_path / "small", loop.results.measure_text

    def measure(work: Any, *, stage: int, after_cuts: bool = False) -> None:
        measured(work, stage=stage, after_cuts=after_cuts)
        if stage == 1 and not after_cuts:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.results, "measure_text", measure)
        status, _, lines = ask(*shrink(tiny_folder, text, out))
    assert status == 1
    assert f"the newest checkpoint is {out / 'checkpoints' / 'stage-1'}, of 35," in lines
    assert "trained on 10.2" in lines
    assert "come down" not in lines, "its learning rate has"
    status, said, lines = ask(*shrink(tiny_folder, text, out))
    assert status == 0, lines
    assert "trained on 10.2" in said
    assert len(read_json(out / "model" / "pruning.json")["figures"]["perplexities"]) == 2
    assert ask("run", out / "recipe.yaml", "-o", tmp_path / "whole")[0] == 0
    assert_same_model(out, tmp_path / "whole")


def test_keys_set_by_the_user_are_planned_around_and_known_again(ask: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    words = shrink(tiny_folder, text, out, "--set", "seed=3", "--set", "training.tokens=4k", "--set", "report_to=[tensorboard]")
    for finished in (False, True):
        status, _, lines = ask(*words)
        assert status == 0, lines
        assert ("this run is finished" in lines) == finished
        assert ("your own settings, which replace those above: seed=3, training.tokens=4k" in lines) != finished
    recipe = read(str(out / "recipe.yaml"))
    assert (recipe.seed, recipe.training.tokens) == (3, 4_000)
    assert recipe.about == "shrink --params 70% --tokens 10000"
    assert any((out / "trackers").iterdir())
    words[words.index("70%")] = "80%"
    assert "was started with another --params (70%, not 80%)" in ask(*words)[2]


def test_other_minutes_go_on_with_a_run_that_was_stopped(
    tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinking, "time", SimpleNamespace(perf_counter=lambda: 30.0))  # the probe takes half a minute anywhere
    monkeypatch.setattr(shrinking, "_EASILY", 0)  # so that twice the tokens are prepared, however fast the machine is
    common = {"model": str(tiny_folder), "budget": "70%", "seed": 0, "device": "auto", "dtype": "auto"}
    (tmp_path / "small").mkdir()
    heard: list[dict[str, Any]] = []

    def asked(minutes: float) -> Any:
        long = (minutes, None)
        return shrinking.recipe_in_time(
            common, tmp_path / "small", text=str(text), long=long, started=0.0, listen=as_dicts(heard.append)
        )

    planned = asked(5)
    (tmp_path / "small" / "recipe.yaml").write_text(planned.to_yaml())
    assert planned.minutes is not None
    assert planned.minutes == 4.5
    assert planned.training.expected == planned.training.tokens // 2
    assert asked(5).minutes == planned.minutes, "less what the probe took then"
    assert asked(5.5).minutes == pytest.approx(planned.minutes + 0.5)
    assert asked(8).minutes == pytest.approx(planned.minutes + 3)
    assert "the run may now take 8 minutes instead of 5" in heard[-1]["text"]
    common["device"] = "cpu"
    assert asked(5).device == asked(8).device == "cpu", "it may go on elsewhere"
    (tmp_path / "small" / "model").mkdir()
    heard.clear()
    assert asked(8).minutes == planned.minutes, "it is finished"
    assert not heard
    (tmp_path / "small" / "recipe.yaml").write_text(planned.model_copy(update={"about": "mine"}).to_yaml())
    with pytest.raises(
        UsageError, match="was not started by shrink; name another folder, or continue it with: `adapt-pruner run"
    ):
        asked(5)


def test_another_method_keeps_its_own_step_and_repair(ask: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    words = shrink(tiny_folder, text, tmp_path / "small", "--set", "method=uniform", "--dry-run", "--json")
    status, said, lines = ask(*words)
    assert status == 0, lines
    recipe = json.loads(said)
    assert (recipe["method"], recipe["step"], recipe["repair"]) == ("uniform", 0.02, None)


def test_a_method_that_cannot_checkpoint_gradients_is_planned(ask: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    """Whether the training fits into memory is asked with gradient checkpointing, which this method refuses."""
    words = (
        "shrink",
        tiny_folder,
        "--params",
        "70%",
        "--text",
        text,
        "-o",
        tmp_path / "small",
        "--tokens",
        "20k",
        "--dry-run",
        "--json",
    )
    status, said, lines = ask(*words, "--set", "method=sheared")
    assert status == 0, lines
    assert json.loads(said)["method"] == "sheared"


def test_a_step_may_be_as_short_as_a_row_of_shrink(ask: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    """Its rows have 256 tokens, not the 512 of a recipe that names no length."""
    words = shrink(
        tiny_folder, text, tmp_path / "small", "--tokens", "1k", "--set", "training.batch_tokens=256", "--dry-run", "--json"
    )
    status, said, lines = ask(*words)
    assert status == 0, lines
    assert json.loads(said)["training"]["batch_tokens"] == 256


def test_a_step_of_the_user_keeps_the_shares_of_the_layers(ask: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    for more, amplitude in ((), 0.5), (("--set", "amplitude=0.2"), 0.2):
        words = shrink(tiny_folder, text, tmp_path / "small", "--set", "step=0.5", *more, "--dry-run", "--json")
        status, said, lines = ask(*words)
        assert status == 0, lines
        assert (json.loads(said)["step"], json.loads(said)["amplitude"]) == (0.5, amplitude)


def test_a_share_is_of_the_model_with_all_its_tokens(ask: Any, text: Path, tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = tiny_model(vocab_size=len(tokenizer), bos_token_id=700, pad_token_id=2)
    model.save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    fewer = ["--set", f"vocabulary.source={text}", "--set", "vocabulary.keep=400"]
    status, said, lines = ask(*shrink(tmp_path / "words", text, tmp_path / "no", *fewer, "--dry-run", "--json"))
    assert status == 0, lines
    assert int(json.loads(said)["budget"]) == int(0.7 * count_parameters(model))


def test_other_keys_for_a_run_that_was_begun_are_refused_with_a_command_that_takes_them(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    assert ask(*shrink(tiny_folder, text, out))[0] == 0
    shutil.rmtree(out / "model")
    status, _, lines = ask(*shrink(tiny_folder, text, out, "--set", "training.lr=5e-5"))
    said, _, command = lines.strip().rstrip("`").rpartition("`adapt-pruner ")
    assert (status, f"{out} was started with another training.lr; name another folder, or continue" in said) == (2, True)
    assert ask(*shlex.split(command))[0] == 0


def test_minutes_become_the_run_s_less_what_the_probe_took(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(0, 600)  # ten minutes between two looks, whatever the machine
    for module in (sys.modules["adapt_pruner.api.pruning"], shrinking):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    asked = shrink(tiny_folder, text, tmp_path / "small", "--hours", "2", "--dry-run")
    status, said, lines = ask(*asked)
    assert status == 0
    (tmp_path / "plan.yaml").write_text(said)
    assert read(str(tmp_path / "plan.yaml")).minutes == 110.0, "the recipe, less the ten minutes of the probe"
    assert "it ends within 1" in lines, "not the whole two hours"
    assert f"it ends within {span(6600)}" in lines
    assert not (tmp_path / "small").exists()
    status, said, _ = ask(*asked, "--json")
    assert status == 0
    assert json.loads(said)["method"] == "adaptive-ls-v1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "shrink needs to know how long it may take; give one of --minutes 60, --hours 1 and --tokens 2M"),
        (["--minutes", "5", "--tokens", "2M"], "--minutes and --tokens all say how long"),
        (["--minutes", "0"], "--minutes 0 is out of range; give minutes above 0"),
        (["--minutes", "nan"], "--minutes nan is out of range"),
        (["--hours", "20000"], "--hours 20000 is out of range; give hours above 0 and up to 16,666"),
        (["--tokens", "many"], "'many' is not a count"),
        (["--minutes", "0.00001"], "minutes are too few: to measure this machine, load"),
        (["--tokens", "10k", "--text", ""], "the text's name is empty, perhaps because a shell variable is not set"),
        (["--tokens", "10k", "--text", "self"], "--text self would train the model on its own text"),
        (["--tokens", "10k", "--text", "nothing.txt"], "nothing.txt"),
        (["--tokens", "10k", "--params", "1k"], "budget 1,000 is too small"),
        (["--tokens", "10k", "--params", "200M"], "is above the 50,784 parameters the model has"),
        (["--tokens", "10k", "--set", "stages=0"], "stages"),
        (["--tokens", "10k", "--set", "about=my own words"], "--set about would replace the words by which shrink"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    words: list[str], said: str, ask: Any, tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    given = ["--text", text, *words] if "--text" not in words else words
    given = ["--params", "70%", *given] if "--params" not in words else given
    status, out, lines = ask("shrink", tiny_folder, "-o", tmp_path / "small", *given)
    assert (status, out) == (2, "")
    assert said in lines.splitlines()[-1]
    assert not (tmp_path / "small").exists()


def test_a_folder_that_was_begun_otherwise_is_refused(ask: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    about = "shrink --params 40000 --tokens 10000"
    begun = read(
        {"about": about, "model": str(tiny_folder), "budget": "40000", "training": {"source": f"{text}#train", "tokens": 4096}}
    )
    (out / "recipe.yaml").write_text(begun.to_yaml())
    command = ["shrink", tiny_folder, "--text", text, "-o", out, "--tokens", "10k", "--params"]
    said = f"{out} was started with another --params (40000, not 41000); name another folder"
    assert said in ask(*command, "41k")[2]
    assert f"{out} was started with another --seed (0, not 1); name another folder" in ask(*command, "40k", "--seed", 1)[2]
    (tmp_path / "other.txt").write_text("another text. " * 3_000)
    command[3] = tmp_path / "other.txt"
    assert (
        f"{out} was started with another --text ({text}#train, not {tmp_path / 'other.txt'}#train); name another folder"
        in ask(*command, "40k")[2]
    )


def test_a_tracker_that_is_not_installed_is_refused_before_the_probe(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinking, "probed", lambda *_, **__: pytest.fail("it was probed"))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    status, _, lines = ask(*shrink(tiny_folder, text, tmp_path / "small", "--set", "report_to=[wandb]"))
    assert (status, "report_to wandb needs the package wandb" in lines) == (2, True)


def test_somebody_else_s_folder_is_refused_before_the_probe(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    monkeypatch.setattr(shrinking, "probed", lambda *_, **__: pytest.fail("it was probed"))
    status, _, lines = ask(*shrink(tiny_folder, text, tmp_path / "letters"))
    assert (status, lines.count("\n")) == (2, 1)
    assert str(tmp_path / "letters") in lines


def test_a_model_too_large_to_train_is_refused_before_its_weights_are_read(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "usable_bytes", lambda: 10**6)
    monkeypatch.setattr(start, "load", lambda *_, **__: pytest.fail("it was loaded"))
    status, _, lines = ask(*shrink(tiny_folder, text, tmp_path / "small"))
    assert (status, lines.count("\n")) == (2, 2), "after: reading text"
    assert (
        "GiB of memory to train, but only 0.0 GiB are free; nothing that makes it smaller fits here: take a machine with 1 GiB"
        in lines
    )


def test_where_memory_has_no_room_it_plans_weights_on_disk_and_lora(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for 7B on a card of 24 GB: the run prunes from disk and trains additions to weights in bfloat16."""

    def most_bytes(work: Work, how: Any, **_: Any) -> int:
        return 10**9 if how.offload == "disk" and how.lora else 10**12

    for module in (plan, probe, shrinking):
        monkeypatch.setattr(module, "most_bytes", most_bytes)
    monkeypatch.setattr(memory, "usable_bytes", lambda: 10**10)
    command = shrink(tiny_folder, text, tmp_path / "small", "--dtype", "bfloat16")
    status, _, lines = ask(*command)
    assert status == 0, lines
    assert "adaptive-ls-v1, from disk, about" in lines
    assert "; additions of rank 16 to weights in bfloat16, since memory has no room for more" in lines
    recipe = read(str(tmp_path / "small" / "recipe.yaml"))
    assert (recipe.offload, recipe.training.weights, recipe.training.lora.rank) == ("disk", "bfloat16", 16)
    figures = read_json(tmp_path / "small" / "model" / "pruning.json")
    assert figures["figures"]["weights_read"] > 3


def test_the_command_that_fits_is_named_and_fits(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One memory check for shrink, prune and run: what is recommended is not refused."""
    model, cpu = load_shapes(str(tiny_folder)), torch.device("cpu")
    recipe = read({"model": str(tiny_folder), "budget": "70%"})
    *_, (words, least) = plan.ways_to_prune(model, recipe, plan.setup_of(Work.of(model, recipe), device=cpu))
    monkeypatch.setattr(memory, "usable_bytes", lambda: least)
    status, _, lines = ask(*shrink(tiny_folder, text, tmp_path / "small"))
    assert status == 2
    assert f"this fits here, in {least / 2**30:.1f} GiB: {words}" in lines
    (command,) = re.findall(r"`adapt-pruner (.+)`", lines)
    assert ask(*shlex.split(command.replace("DIR", str(tmp_path / "pruned"))))[0] == 0
    status, _, lines = ask("prune", tiny_folder, "--params", "70%", "-o", tmp_path / "other", "--calibration", text)
    assert (status, "GiB of memory to prune, but only" in lines, words in lines) == (2, True, True)
    trained = tmp_path / "recipe.yaml"
    trained.write_text(f"{{model: {tiny_folder}, budget: 70%, training: {{source: '{text}', tokens: 20k, batch_tokens: 2048}}}}")
    status, _, lines = ask("run", trained, "-o", tmp_path / "run")
    assert (status, "GiB of memory to train, but only" in lines, words in lines) == (2, True, True)
    status, said, lines = ask("run", trained, "--dry-run")
    assert (status, f"it does not fit: {tiny_folder} needs" in said) == (0, True)
    assert re.search(r"in memory +1 +\d\.\d\d GiB .* no\n", said), said
    command = ("compare", tiny_folder, "-o", tmp_path / "compared", "--params", "70%", "--text", text)
    status, _, lines = ask(*command, "--methods", "adapt-pruner", "--calibration", text)
    assert (status, "adapt-pruner: " in lines, "GiB of memory to prune, but only" in lines) == (2, True, True), lines


def test_settings_that_make_a_training_fit_are_named(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"source": str(text), "tokens": "20k", "batch_tokens": 65_536, "micro_batch_tokens": 65_536, "length": 256}
    recipe = read({"model": str(tiny_folder), "budget": "70%", "method": "magnitude-all", "training": training})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    work, here = start.on_paper(recipe.model_copy(update={"dtype": "float32"}), here=True)
    plain, again = plan.most_bytes(work, here), plan.most_bytes(work, replace(here, checkpointing=True))
    assert again < plain
    monkeypatch.setattr(memory, "usable_bytes", lambda: again)
    status, _, lines = ask("run", tmp_path / "recipe.yaml", "-o", tmp_path / "run", "--set", "dtype=float32")
    assert status == 2
    assert "GiB: --set training.gradient_checkpointing=true" in lines


def test_memory_is_that_of_training_the_pruned_model(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All training comes after the cuts; a model may fit that does not before them."""
    training = {"source": str(text), "tokens": 10_000, "length": 256, "batch_tokens": 2048, "gradient_checkpointing": True}
    keys = {
        "model": str(tiny_folder),
        "training": training,
        "calibration": {"source": str(text)},
        "evaluation": {"source": str(text)},
        "dtype": "float32",
    }
    needed = [plan.most_bytes(*start.on_paper(read(keys | {"budget": share}), here=True)) for share in ("70%", "100%")]
    assert needed[0] < needed[1]
    monkeypatch.setattr(memory, "usable_bytes", lambda: needed[0])
    status, _, lines = ask(*shrink(tiny_folder, text, tmp_path / "small", "--dry-run", "--dtype", "float32"))
    assert status == 0, lines
    monkeypatch.setattr(memory, "usable_bytes", lambda: needed[0] - 10**5)
    status, _, lines = ask(*shrink(tiny_folder, text, tmp_path / "small", "--dry-run", "--dtype", "float32"))
    assert (status, "GiB of memory to train" in lines) == (2, True)


def test_a_model_that_hardly_fits_is_probed_as_it_will_train(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (plan, probe, shrinking):
        monkeypatch.setattr(module, "most_bytes", lambda _, how, **__: 10**9 if how.checkpointing else 3 * 10**9)
    monkeypatch.setattr(memory, "usable_bytes", lambda: 2 * 10**9)
    again, kernels = list[bool](), probe.kernels
    monkeypatch.setattr(
        probe, "kernels", lambda model, **how: again.append(how["gradient_checkpointing"]) or kernels(model, **how)
    )
    status, said, lines = ask(*shrink(tiny_folder, text, tmp_path / "small", "--dry-run", "--json"))
    assert status == 0, lines
    assert again == [True]
    assert json.loads(said)["training"]["gradient_checkpointing"] is True


@pytest.mark.parametrize(("crowded", "used"), [(0.0, 2), (0.05, 1)])
def test_fewer_threads_where_those_of_a_pass_wait_for_each_other(
    crowded: float, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that has no core; it is `crowded` seconds longer with more threads than one."""
    used_now, now = [2], [0.0]
    monkeypatch.setattr(probe, "time", SimpleNamespace(process_time=lambda: 0.0, perf_counter=lambda: now[0]))
    monkeypatch.setattr(probe.torch, "get_num_threads", lambda: used_now[-1])
    monkeypatch.setattr(probe.torch, "set_num_threads", used_now.append)
    words = probe._fitted(lambda: now.insert(0, now[0] + 0.01 + crowded * (used_now[-1] > 1)))
    assert (used_now[-1], words) == (used, {2: "2 threads", 1: "1 of 2 threads, which is faster at present"}[used])


def test_as_many_threads_as_cores_are_not_tried_against_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(probe.torch, "set_num_threads", lambda count: pytest.fail("it was tried"))
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(probe, "time", SimpleNamespace(process_time=lambda: next(clock), perf_counter=lambda: next(clock) / 2))
    assert probe._fitted(lambda: None) == "2 threads"


@pytest.mark.parametrize(("long", "fits"), [(["--minutes", "60"], True), (["--tokens", "10k"], False)])
def test_threads_are_fitted_where_the_clock_ends_the_run(
    long: list[str], fits: bool, ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it goes on later. A run by tokens goes on with the same threads, to the last bit."""
    fitted: list[Any] = []
    for module in (probe, loop):
        monkeypatch.setattr(module, "fit_threads", lambda work: fitted.append(work) or "2 of 4 threads")
    monkeypatch.setattr(loop, "run_stages", lambda *_: pytest.fail("far enough"))
    command = ["shrink", tiny_folder, "--params", "70%", "--text", text, "-o", tmp_path / "small", *long]
    for expected in (2, 3):  # by the probe and by the run; the second time by the run alone
        with pytest.raises(pytest.fail.Exception):
            ask(*command)
        assert len(fitted) == expected * fits


def test_a_text_of_many_documents_is_parted_by_documents(text: Path, tmp_path: Path) -> None:
    parts = split_off_heldout(str(text))
    assert (parts.train, parts.held_out) == (f"{text}#train", f"{text}#heldout")
    assert split_off_heldout(parts.train) == parts
    learnt = documents(parts.train)
    assert (parts.characters, parts.documents) == (sum(map(len, learnt)), len(learnt))
    assert parts.held_out_characters == sum(map(len, documents(parts.held_out)))
    python = split_off_heldout("python-docs:train")
    assert (python.train, python.held_out) == ("python-docs:train", "python-docs:heldout")


def test_one_long_document_is_parted_in_pieces(tmp_path: Path) -> None:
    whole = "".join(f"Paragraph {i}. " + "words " * 100 + "\n\n" for i in range(300))
    (tmp_path / "book.txt").write_text(whole)
    parts = split_off_heldout(str(tmp_path / "book.txt"))
    learnt, kept = documents(parts.train), documents(parts.held_out)
    assert parts.characters == sum(map(len, learnt))
    assert sorted("".join([*learnt, *kept])) == sorted(whole), "nothing is lost"
    assert not set(learnt) & set(kept)
    assert 0.05 < sum(map(len, kept)) / len(whole) < 0.15
    assert all(piece.startswith(("Paragraph", "\n\nParagraph")) for piece in [*learnt, *kept]), "cut between paragraphs"
    assert split_off_heldout(str(tmp_path / "book.txt")) == parts


def test_conversations_count_as_the_rows_that_training_reads(tmp_path: Path) -> None:
    """A long conversation is cut at the length of a row, and left out if the assistant has not answered by then."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chats = [
        [{"role": "user", "content": f"{i}?" * (1 if i % 3 else 100)}, {"role": "assistant", "content": "word " * 200}]
        for i in range(100, 400)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    parts = split_off_heldout(str(tmp_path / "chat.jsonl"))
    tokens, held_out = parts.tokens(tokenizer, length=256)
    rows = training_rows(tokenizer, parts.train, length=256, tokens=10**6, seed=0, warn=print, cache=tmp_path / "cache")
    (numbers,) = rows.by_text().values()
    assert tokens == pytest.approx(len(numbers) * rows.mean_tokens(numbers), rel=0.1)
    assert parts.characters > 5 * tokens
    assert held_out == pytest.approx(parts.held_out_characters, rel=0.1)


@pytest.mark.parametrize("spec", ["notes.txt#heldout", "python-docs:heldout"])
def test_a_held_out_part_is_not_trained_on(spec: str) -> None:
    with pytest.raises(UsageError, match=f"--text {spec} is a held-out part, which nothing may train on; name the whole text"):
        split_off_heldout(spec)


def test_a_text_too_short_to_be_parted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("A short note. " * 100)
    with pytest.raises(
        UsageError, match=r"has 1,400 characters, too few to train on one part and hold out another; give at least"
    ):
        split_off_heldout(str(tmp_path / "note.txt"))
    chat = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    with pytest.raises(
        UsageError,
        match="none of the 1 documents of .* falls in that part, since one in 20 is held out; give a text with more documents",
    ):
        split_off_heldout(str(tmp_path / "chat.jsonl"))


def test_a_table_of_the_plan_is_not_replaced(ask: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    """It would train nothing, since the text and its tokens lie in that table."""
    status, _, lines = ask(*shrink(tiny_folder, text, tmp_path / "small", "--set", "training={lr: 3e-4}"))
    assert (
        status,
        "--set training=… would replace the whole table, and drop training.length, training.source, training.tokens" in lines,
    ) == (2, True)


def test_a_recipe_goes_to_stdout_where_lines_move_on_a_terminal(
    ask: Any, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr("adapt_pruner.report.screen.console_on", lambda **_: console)
    status, said, lines = ask(*shrink(tiny_folder, text, tmp_path / "small", "--dry-run", "--json"))
    assert status == 0, lines
    assert json.loads(said)["model"] == str(tiny_folder)
