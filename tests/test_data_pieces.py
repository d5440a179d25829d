"""A text encoded in pieces has the ids of the text encoded whole, whatever the tokenizer makes of white space, digits and long words."""

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from adapt_pruner.data import pieces
from adapt_pruner.data.sources import documents
from adapt_pruner.data.tokens import calibration_windows, encode, evaluation_windows, opening
from conftest import byte_tokenizer

DOCS = documents("python-docs:train")
BYTES = pre_tokenizers.ByteLevel.alphabet()
LLAMA3 = (  # digits by three; punctuation takes the line ends behind it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(change: Callable[[Tokenizer], None], *, alphabet: list[str] = BYTES, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(**options))
    change(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*DOCS[:30], "a" * 999, "=" * 999, "7" * 99, " " * 999, "日本語のテキスト" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def gpt2(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def llama3(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            split,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])


def llama2(tokenizer: Tokenizer) -> None:
    """A blank before every text, and words that BPE is free to join: no pre-tokenizer."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


def composed(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True)])


TOKENIZERS = {
    "bytes": lambda: byte_tokenizer(opens=True),
    "gpt2": lambda: trained(gpt2),
    "llama3": lambda: trained(llama3, ignore_merges=True),
    "llama2": lambda: trained(llama2, alphabet=[], unk_token="<unk>", fuse_unk=True),
    "composed": lambda: trained(composed, alphabet=[], unk_token="<unk>"),
}


def texts() -> Iterator[tuple[str, str]]:
    draw = random.Random(0)
    yield "documents", "\n\n".join(DOCS[30:60])
    yield "one long word", "a" * 20_001
    yield "random letters", "".join(draw.choices("abcdefgetionrs", k=20_000))
    yield "digits", "1" + "".join(draw.choices("0123456789", k=20_000))
    yield "blanks", "x" + " " * 9_000 + "y" + "\n" * 9_000 + "z" + " \n\t" * 3_000
    yield "rules and points", ("=" * 80 + "\n" + "." * 77 + "\n\n") * 100
    yield "other scripts", "日本語のテキスト、" * 1500 + "é́e\u0301ạ̈" * 1500 + "🙂👩‍👩‍👧" * 1000
    yield "tokens in the text", "<|end|>  <s>a</s><|end|>\n" * 900 + "<|end" * 900
    yield "any characters", "".join(chr(draw.choice([*range(1, 0x250), 0x301, 0x200D, 0x1F600])) for _ in range(20_000))
    yield "numbers", "1234567 " * 2500
    yield "short", "short"
    yield "empty", ""


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 1000)
    monkeypatch.setattr(pieces, "_OVERLAP", 200)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("what", "text"), list(texts()), ids=[what for what, _ in texts()])
def test_pieces_have_the_ids_of_the_whole(tokenizer: Any, what: str, text: str) -> None:
    whole = tokenizer(text, verbose=False)["input_ids"]
    parts = [text[at : at + 77] for at in range(0, len(text), 77)]
    found = [ids.tolist() for ids in pieces.ids_in_pieces(tokenizer, parts)]
    assert [index for ids in found for index in ids] == whole
    assert encode(tokenizer, [text], most=500).tolist() == whole[len(opening(tokenizer)) :][:500]
    if what == "documents":
        assert max(map(len, found)) < 1500, "no piece is long"
        assert len(found) > 100


@pytest.mark.usefixtures("small")
def test_no_more_is_read_than_the_windows_need() -> None:
    read = []

    def told() -> Iterator[str]:
        for text in DOCS:
            read.append(text)
            yield text

    tokenizer = byte_tokenizer()
    windows = evaluation_windows(tokenizer, told(), window=64, max_windows=3)
    ids = tokenizer("\n\n".join(DOCS))["input_ids"]
    assert [row.tolist() for row in windows] == [[ids[at : at + 64]] for at in (0, 64, 128)]
    assert len(read) < 5, f"{len(read)} of {len(DOCS)} documents"


@pytest.mark.usefixtures("small")
def test_a_long_document_gives_the_calibration_windows_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the random draw alone: the number of the document's tokens is what it goes by."""
    tokenizer, text = TOKENIZERS["llama3"](), "\n\n".join(DOCS[30:60])
    in_pieces = [calibration_windows(tokenizer, [text, "short"], samples=40, length=64, seed=seed) for seed in range(3)]
    monkeypatch.setattr(pieces, "_PIECE", sys.maxsize)
    whole = [calibration_windows(tokenizer, [text, "short"], samples=40, length=64, seed=seed) for seed in range(3)]
    assert all(one.equal(other) for one, other in zip(in_pieces, whole, strict=True))
