"""Tiny random models, a byte-level tokenizer and small texts; nothing here needs a network or a real model."""

import atexit
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as for commands
os.environ["ADAPT_PRUNER_CACHE"] = tempfile.mkdtemp(prefix="adapt-pruner-")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub is a fault
if "PYTEST_XDIST_WORKER" in os.environ:  # of commands, too: workers with two threads each wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from adapt_pruner import families
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.system import world
from adapt_pruner.data.fixed import Span
from adapt_pruner.export import plain
from adapt_pruner.families import admission
from adapt_pruner.train.loop import TrainConfig, TrainState, steps
from strangers import talking_to_a_fork

os.fsync = lambda handle: None  # what a machine loses that loses its power is not tested, and a fsync takes 30 ms
atexit.register(shutil.rmtree, os.environ["ADAPT_PRUNER_CACHE"], ignore_errors=True)  # it may hold a real model
torch.set_num_threads(1)  # tiny models gain nothing from more

LONGEST = {
    "test_forecast.py", "test_processes.py", "test_readme.py", "test_resume.py", "test_vocabulary_runs.py", "test_without_trust.py",
}  # fmt: skip
"""Begun first, so that no process is left alone with them at the end; see `make test`."""

LAYOUTS = [
    (family.__name__.rpartition(".")[2], name)
    for family in families.all_families()
    for name in family.tiny()
    if not hasattr(family, "TASK")  # those of two towers have tests of their own
]
HANGS = 900.0  # seconds after which a process is given up: it waits for what never comes, since none is that slow
zstd = partial(pyarrow.Codec("zstd").compress, asbytes=True)
VOCAB = 259  # three special tokens and the 256 bytes


def tiny_config(layout: tuple[str, str], **changes: Any) -> Any:
    family = next(f for f in families.all_families() if f.__name__.endswith(f".{layout[0]}"))
    config = family.tiny()[layout[1]]
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def tiny_model(layout: tuple[str, str] = ("llama", "llama"), *, seed: int = 0, **changes: Any) -> Any:
    """A random model whose biases and norms are not at their idle values, so that forgetting one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(layout, **changes)).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            parameter.data.mul_(4)  # the usual initialisation is so small that layers hardly matter
    return model


def tiny_moe() -> Any:
    """A random Qwen3-MoE of three layers with eight experts, of which a token goes through two."""
    config = admission.shrunk(AutoConfig.for_model("qwen3_moe"))
    config.vocab_size = VOCAB
    return admission.tiny_model(config).float()


@dataclass
class InOrder:
    """A feed of rows that lie in order, of which `rows` has `batch` and `num_tokens` of a span."""

    rows: Any
    next: int
    num_tokens: int
    wants_losses: bool = False

    def take(self, num_rows: int) -> Any:
        self.first, self.next = self.next, self.next + num_rows
        return Span(self.rows, self.first, self.next)

    def tell(self, losses: Any) -> None:
        raise AssertionError("it does not want them")


def train(
    model: Any, rows: Any, *, until: int, optimizer: Any, progress: TrainState, total_tokens: int, on_step: Any = None, **how: Any
) -> None:
    """Train, in place, on rows that lie in order; every step is taken, then `on_step` is told of it."""
    feed = InOrder(rows, progress.rows, total_tokens)
    for step in steps(model, feed, optimizer, progress, TrainConfig(**how), until=until):
        step.take()
        if on_step is not None:
            on_step(step)


def projections(model: Any, index: int) -> dict[str, tuple[str, slice]]:
    """Of a dense model's layer, `q`, `k`, `v`, `gate` and `up` -> the parameter that holds its rows, and which they are."""
    at, layer, config = f"model.layers.{index}", model.model.layers[index], model.config
    q, k = (heads * layer.self_attn.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    n = config.intermediate_size
    if hasattr(layer.self_attn, "qkv_proj"):
        rows = {"q": slice(0, q), "k": slice(q, q + k), "v": slice(q + k, q + 2 * k), "gate": slice(0, n), "up": slice(n, 2 * n)}
        names = dict.fromkeys("qkv", "self_attn.qkv_proj") | dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")
        return {role: (f"{at}.{names[role]}.weight", rows[role]) for role in rows}
    attention = {role: (f"{at}.self_attn.{role}_proj.weight", slice(0, q if role == "q" else k)) for role in "qkv"}
    return attention | {role: (f"{at}.mlp.{role}_proj.weight", slice(0, n)) for role in ("gate", "up")}


def half(axes: Any, kinds: tuple[str, ...] = ("neurons",)) -> Mask:
    """Every other unit of these kinds."""
    return Mask({axis.name: torch.arange(axis.size) % 2 == 0 for axis in axes if axis.kind in kinds and axis.size > 1})


def byte_tokenizer(*, opens: bool = False) -> PreTrainedTokenizerFast:
    """A token a byte; with `opens` it puts <s> before every text by itself."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(specials + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if opens:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """What has been imported by now stays: no collection looks through its million objects again, which takes a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def forked_strangers() -> Iterator[None]:
    """`verify` opens folders in forks of one process, which spares each the import of transformers; test_children starts the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "talking", talking_to_a_fork)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def opening_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(opens=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face folder with a tiny random Llama and its tokenizer."""
    return saved(tmp_path_factory.mktemp("models") / "tiny-llama", tiny_model(vocab_size=VOCAB), byte_tokenizer())


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(400)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 pictures with captions."""
    from pictures import picture_folder

    return picture_folder(tmp_path_factory.mktemp("shown") / "pictures", number=48)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face folder with a tiny random CLIP and its processor."""
    from adapt_pruner.checkpoint.save import save
    from test_towers import tiny_processor, tiny_towers

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    save(tiny_towers(vocab_size=VOCAB), tiny_processor(), folder, dtype=torch.float32)
    return folder


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (2, 12), generator=generator) for _ in range(3)]


@pytest.fixture
def events() -> tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]:
    heard: list[dict[str, Any]] = []
    return heard, heard.append


def as_dicts(listen: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    """A listener of the package that passes events on as plain dicts, as `ap.*` does."""
    return lambda event: listen(event.to_dict())


def in_two_processes(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    """What `work` gives in the second of two processes: they take turns in one, the first leaving what it would have sent."""
    sent: list[torch.Tensor] = []
    said: list[Any] = []

    def heard(value: Any) -> Any:
        first = said.pop(0)
        return first if isinstance(value, int) else value  # what comes of sums is whole in the second only

    with monkeypatch.context() as patch:
        patch.setattr(world, "size", lambda: 2)
        patch.setattr(world, "agreed", lambda value: said.append(value) or value)
        patch.setattr(world, "share", lambda items: items[0::2])
        patch.setattr(world, "sum_in_place", lambda *tensors: sent.extend(tensor.clone() for tensor in tensors))
        work()
        patch.setattr(world, "agreed", heard)
        patch.setattr(world, "share", lambda items: items[1::2])
        patch.setattr(world, "sum_in_place", lambda *tensors: [tensor.add_(sent.pop(0)) for tensor in tensors])
        result = work()
    assert not sent, "both send the same sums in the same order"
    return result


def printed(*words: object) -> str:
    """What a command prints; it has to succeed."""
    from adapt_pruner.cli import app

    called = CliRunner().invoke(app, [str(word) for word in words])
    assert called.exit_code == 0, called.output + str(called.exception)
    return called.output


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    """A folder with a model and its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def log_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in a run's log."""
    lines = map(json.loads, (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == kind]


class _Killed(BaseException):
    """What no code of ours catches."""


def break_off(recipe: Any, run_dir: Path, *, kind: str, nth: int) -> None:
    """Run a recipe until the nth event of a kind is told, and no further."""
    from adapt_pruner.report.with_card import run

    seen = 0

    def kill(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += event["event"] == kind
        if seen == nth:
            raise _Killed

    with pytest.raises(_Killed):
        run(recipe, run_dir, listen=as_dicts(kill))


def assert_same_model(one: Path, other: Path) -> None:
    """Two runs have ended with the same mask and the same weights, to the last bit."""
    from adapt_pruner.checkpoint.load import load

    first, second = (load(str(run_dir / "model"), any_task=True) for run_dir in (one, other))
    assert first.mask == second.mask
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def suited(keys: dict[str, Any]) -> Any:
    """The recipe of these keys, without those that its method does not read."""
    from adapt_pruner.recipe import read

    return read(keys, shared=True).fitted()


def assert_refused(made: Callable[[], Any], run_dir: Path, said: str) -> None:
    """A recipe is refused in this sentence, as it is read or before its run begins, and nothing is left."""
    from adapt_pruner.errors import UsageError
    from adapt_pruner.report.with_card import run

    with pytest.raises(UsageError) as refused:
        run(made(), run_dir)
    assert said in str(refused.value)
    assert not run_dir.exists()
