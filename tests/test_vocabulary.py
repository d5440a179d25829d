"""Fewer tokens: the axis in the model, and the tokenizer that goes with it."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adapt_pruner import families
from adapt_pruner.checkpoint.vocabulary import kept_tokens, smaller_tokenizer
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.data.sources import documents
from adapt_pruner.data.tokens import evaluation_windows, in_other_tokens, text_bytes, token_uses
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.score.calibrate import score
from adapt_pruner.score.weights import taylor
from conftest import LAYOUTS, byte_tokenizer, tiny_model
from test_law import random_mask

SPECIALS = ["<unk>", "<s>", "</s>"]
TEXTS = [text[:4000] for text in documents("python-docs:train")[:40]]
CHAT = "{% for m in messages %}<begin>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def byte_level(*, ignore_merges: bool = False, size: int = 700) -> PreTrainedTokenizerFast:
    """As SmolLM2, Qwen and Llama 3 have it: bytes as characters; behind them a start token, which a template adds."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<begin>"])
    start = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", tokenizer.token_to_id("<begin>"))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>", eos_token="</s>", pad_token="</s>")
    found.add_tokens(["<tool>"])
    found.chat_template = CHAT
    return found


def spelled(kind: str, size: int = 500) -> PreTrainedTokenizerFast:
    """As Llama 2 (BPE) and its Unigram kin have it: characters, spaces as ▁, bytes for what is not there."""
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        trainer: Any = trainers.BpeTrainer(vocab_size=size, special_tokens=pieces, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=pieces, unk_token="<unk>", show_progress=False)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(TEXTS, trainer)
    data = json.loads(tokenizer.to_str())
    data["model"]["byte_fallback"] = True
    data["added_tokens"] = data["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(data))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "whole words first": lambda: byte_level(ignore_merges=True),
    "spelled BPE": lambda: spelled("BPE"),
    "spelled Unigram": lambda: spelled("Unigram"),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


def uses_of(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    counts = torch.zeros(len(tokenizer), dtype=torch.float64)
    for text in texts:
        for index in tokenizer(text)["input_ids"]:
            counts[index] += 1
    return counts


def strings(tokenizer: Any, text: str) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    return found


def any_text(generator: random.Random) -> str:
    """Words of the corpus among characters from all of Unicode."""
    words = " ".join(TEXTS[:5]).split(" ")
    pieces = [
        generator.choice(words)
        if generator.random() < 0.5
        else "".join(
            chr(generator.choice([generator.randrange(32, 0xD800), generator.randrange(0xE000, 0x110000)])) for _ in range(3)
        )
        for _ in range(12)
    ]
    return generator.choice(["", " ", "\n\t "]) + " ".join(pieces).replace("▁", "")


# The tokenizer.


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_any_text_comes_back(tokenizer: Any, share: float) -> None:
    """Whatever goes, a text that came back from the tokenizer still does, also of characters that no token stands for."""
    uses = uses_of(tokenizer, TEXTS[:5])
    fewest = int(kept_tokens(tokenizer, uses, min_uses=10**9).sum())
    keep = kept_tokens(tokenizer, uses, keep=int(fewest + share * (len(tokenizer) - fewest)))
    smaller = smaller_tokenizer(tokenizer, keep)
    assert len(smaller) == int(keep.sum()) < len(tokenizer)
    generator = random.Random(1)
    for _ in range(60):
        text = any_text(generator)
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        ids = smaller(text)["input_ids"]
        assert smaller.decode(ids, skip_special_tokens=True) == text
        assert smaller.unk_token_id is None or smaller.unk_token_id not in ids


def test_tokens_that_stay_are_numbered_in_order(tokenizer: Any) -> None:
    keep = kept_tokens(tokenizer, uses_of(tokenizer, TEXTS[:5]), keep=len(tokenizer) - 100)
    smaller = smaller_tokenizer(tokenizer, keep)
    old = keep.nonzero().flatten().tolist()
    assert smaller.convert_ids_to_tokens(list(range(len(smaller)))) == tokenizer.convert_ids_to_tokens(old)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if getattr(tokenizer, name) is not None:
            assert old[getattr(smaller, f"{name}_id")] == getattr(tokenizer, f"{name}_id")
    assert smaller("x")["input_ids"][:-1] == [old.index(index) for index in tokenizer("x")["input_ids"][:-1]]
    assert smaller.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_text_whose_tokens_stay_is_split_as_before(tokenizer: Any, share: float) -> None:
    uses = uses_of(tokenizer, TEXTS[:20])
    fewest = int(kept_tokens(tokenizer, uses, min_uses=10**9).sum())
    keep = kept_tokens(tokenizer, uses, keep=int(fewest + share * (len(tokenizer) - fewest)))
    smaller = smaller_tokenizer(tokenizer, keep)
    same = different = 0
    for word in sorted({f" {word}" for text in TEXTS for word in text.split(" ")})[::3]:
        before = tokenizer(word)["input_ids"]
        if bool(keep[before].all()):
            assert strings(smaller, word) == tokenizer.convert_ids_to_tokens(before)
            same += 1
        else:
            different += 1
    assert same > 20
    assert different > 20


def test_a_token_that_stays_can_be_reached(tokenizer: Any) -> None:
    """Its own text gives it wherever it did before: the merges that make it are there, with all their parts."""
    uses = torch.zeros(len(tokenizer))
    uses[torch.arange(len(tokenizer)) % 7 == 3] = 1  # scattered, so that parts are not there by themselves
    keep = kept_tokens(tokenizer, uses, min_uses=1)
    smaller = smaller_tokenizer(tokenizer, keep)
    reached = 0
    for index in keep.nonzero().flatten().tolist():
        piece = tokenizer.convert_ids_to_tokens(index)
        text = tokenizer.backend_tokenizer.decoder.decode([piece])
        if tokenizer(text, add_special_tokens=False)["input_ids"] == [index]:
            assert smaller.convert_ids_to_tokens(smaller(text, add_special_tokens=False)["input_ids"]) == [piece]
            reached += 1
    assert reached > 50


def test_what_stays_is_what_is_used_most() -> None:
    tokenizer = byte_level()
    uses = uses_of(tokenizer, TEXTS)
    keep = kept_tokens(tokenizer, uses, keep=500)
    assert int(keep.sum()) == 500
    gone, stays = uses[~keep], uses[keep]
    assert gone.max() < stays.quantile(0.9)
    by_use = kept_tokens(tokenizer, uses, min_uses=40)
    assert bool(by_use[uses >= 40].all())
    least = kept_tokens(tokenizer, uses, min_uses=10**9)
    vocabulary = tokenizer.get_vocab()
    assert all(least[vocabulary[token]] for token in ["<tool>", *SPECIALS, *pre_tokenizers.ByteLevel.alphabet()])
    for role in ("user", "assistant", "system"):  # what the chat template writes is split as before
        ids = tokenizer(f"{role}:", add_special_tokens=False)["input_ids"]
        assert bool(least[ids].all())
    # rows that pad the embedding go, and so does what neither the text nor a rule wants; what a config names stays
    odd = int((~keep).nonzero()[-1])
    padded = kept_tokens(tokenizer, torch.cat([uses, torch.zeros(28)]), keep=500, named=[odd])
    assert padded.shape == (len(tokenizer) + 28,)
    assert not padded[len(tokenizer) :].any()
    assert padded[odd]


def test_an_added_token_without_a_row_goes(tmp_path: Any) -> None:
    """Gemma 3's text models have such a token, for images; it has the number after the last row."""
    tokenizer = byte_level()
    assert tokenizer.get_vocab()["<tool>"] == 701
    keep = kept_tokens(tokenizer, torch.ones(701), keep=400)
    smaller = smaller_tokenizer(tokenizer, keep)
    assert keep.numel() == 701
    assert int(keep.sum()) == len(smaller) == 400
    assert "<tool>" not in smaller.get_vocab()
    assert smaller("a text")["input_ids"][0] == smaller.convert_tokens_to_ids("<begin>")
    text = tmp_path / "text.txt"
    text.write_text("a <tool> call\n")
    assert token_uses(tokenizer, str(text), size=701).sum() == token_uses(tokenizer, str(text), size=702).sum() - 1


def test_uses_are_occurrences(tmp_path: Any) -> None:
    tokenizer = byte_level()
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("for x in range(3): pass\n" * 30)
    other.write_text("a class\n" * 10)
    size = len(tokenizer) + 5
    first = torch.cat([uses_of(tokenizer, documents(str(one))), torch.zeros(5)])
    second = torch.cat([uses_of(tokenizer, documents(str(other))), torch.zeros(5)])
    assert torch.equal(token_uses(tokenizer, str(one), size=size), first)
    mixed = token_uses(tokenizer, {str(one): 1, str(other): 3}, size=size)
    expected = (first / first.sum() / 4 + 3 * second / second.sum() / 4) * (first.sum() + second.sum())
    assert torch.allclose(mixed, expected, atol=1e-5)
    with pytest.raises(UsageError, match="'self' is written only after the vocabulary is chosen"):
        token_uses(tokenizer, "self", size=size)


def test_tokenizers_that_cannot_be_rewritten_are_refused() -> None:
    tokenizer = byte_level()
    uses = torch.ones(len(tokenizer))

    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match=r"it has no tokenizer\.json; leave vocabulary out"):
        kept_tokens(Slow(), uses, keep=400)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))
    with pytest.raises(UsageError, match="of type WordPiece, and only BPE and Unigram"):
        kept_tokens(words, torch.ones(1), keep=1)
    ended = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")))
    with pytest.raises(UsageError, match="prefixes or suffixes"):
        kept_tokens(ended, torch.ones(1), keep=1)
    odd = byte_level()
    odd.backend_tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    with pytest.raises(UsageError, match="post-processor BertProcessing"):
        kept_tokens(odd, uses, keep=400)
    with pytest.raises(UsageError, match=r"token '.*' has number \d+ but the model has 600 rows"):
        kept_tokens(tokenizer, torch.ones(600), keep=400)
    with pytest.raises(UsageError, match=r"vocabulary\.keep 100 is below the 2\d\d tokens that always stay"):
        kept_tokens(tokenizer, uses, keep=100)
    with pytest.raises(UsageError, match=r"keep 702 is not below the 702 tokens"):
        kept_tokens(tokenizer, uses, keep=702)

    class Stubborn(PreTrainedTokenizerFast):
        def get_vocab(self) -> dict[str, int]:
            return {"<more>": len(self), **super().get_vocab()}

    stubborn = Stubborn(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UsageError, match="its class Stubborn changes what"):
        smaller_tokenizer(stubborn, kept_tokens(tokenizer, uses, keep=400))


# The axis.


def vocabulary_mask(model: Any, seed: int = 1) -> Mask:
    """About half of the tokens; 0 to 2 stay, since configs name them."""
    keep = random_mask(families.axes(model), ("vocabulary",), seed)["vocabulary"]
    keep[:3] = True
    return Mask({"vocabulary": keep})


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_cut_equals_gated(layout: tuple[str, str]) -> None:
    """Logits of tokens that stay are the gated ones to 1e-9; those of the others are -inf there and absent here."""
    model = tiny_model(layout).double()
    axes, mask = families.axes(model), vocabulary_mask(model)
    old = mask["vocabulary"].nonzero().flatten()
    ids = torch.randint(len(old), (2, 24), generator=torch.Generator().manual_seed(3))
    cost, before = next(axis.cost for axis in axes if axis.kind == "vocabulary"), count_parameters(model)
    with torch.no_grad():
        dense = model(old[ids]).logits
        with gated(model, axes, mask):
            shut = model(old[ids]).logits
        assert torch.equal(model(old[ids]).logits, dense)
        cut(model, axes, mask)
        smaller = model(ids).logits
    assert bool((shut[..., ~mask["vocabulary"]] == -torch.inf).all())
    assert smaller.shape[-1] == len(old) == model.config.vocab_size == model.vocab_size == model.get_decoder().vocab_size
    assert float((shut[..., mask["vocabulary"]] - smaller).abs().max()) <= 1e-9
    assert before - count_parameters(model) == cost * int((~mask["vocabulary"]).sum())
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_masks_compose_with_other_axes(layout: tuple[str, str]) -> None:
    twice, once = tiny_model(layout).double(), tiny_model(layout).double()
    dense_axes, total = families.axes(once), Mask()
    for seed, kinds in enumerate((("layers", "neurons"), ("kv_heads", "neurons"))):
        axes = families.axes(twice)
        mask = Mask({**random_mask(axes, kinds, seed=seed).kept, **vocabulary_mask(twice, seed).kept})
        cut(twice, axes, mask)
        total = total.then(mask, families.axes(twice))
    cut(once, dense_axes, total)
    ids = torch.arange(once.config.vocab_size)[None]
    assert torch.equal(once(ids).logits, twice(ids).logits)
    assert Mask.from_json(total.to_json()) == total


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_a_step_of_adam_follows(layout: tuple[str, str]) -> None:
    """After the cut it equals that of the gated dense model on what stayed; the padding row still has no gradient."""
    model = tiny_model(layout, pad_token_id=6).double()
    mask = vocabulary_mask(model)
    mask["vocabulary"][6] = True
    old = mask["vocabulary"].nonzero().flatten()
    ids = torch.randint(len(old), (2, 24), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(old[ids], labels=old[ids]).loss.backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    axes = families.axes(model)
    cut(model, axes, mask, optimizer=optimizer)
    padding = int(mask["vocabulary"][:6].sum())
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == padding
    for one, its, tokens, gates in ((model, optimizer, ids, Mask()), (twin, twin_optimizer, old[ids], mask)):
        its.zero_grad()
        with gated(one, families.axes(one), gates):
            torch.nn.functional.cross_entropy(one(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        its.step()
    cut(twin, axes, mask)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12), name


def test_configs_name_tokens_by_their_new_numbers() -> None:
    model = tiny_model(pad_token_id=6)
    model.config.eos_token_id, model.generation_config.eos_token_id = [2, 5, 9], [9, 2]
    model.generation_config.suppress_tokens, model.generation_config.begin_suppress_tokens = [0, 7, 96], [4]
    model.generation_config.bad_words_ids = [[7], [3, 0], [9, 96, 7]]
    model.generation_config.forced_bos_token_id, model.generation_config.forced_eos_token_id = 3, [9, 5]
    keep = torch.ones(97, dtype=torch.bool)
    keep[[0, 1, 4, 5]] = False
    axes = families.axes(model)
    cut(model, axes, Mask({"vocabulary": keep}))
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (None, [0, 5], 2)
    settings = model.generation_config
    assert settings.eos_token_id == [5, 0]
    assert (settings.suppress_tokens, settings.begin_suppress_tokens) == ([3, 92], None)
    assert settings.bad_words_ids == [[3], [5, 92, 3]], "a word that has lost a token cannot be written any more"
    assert (settings.forced_bos_token_id, settings.forced_eos_token_id) == (1, [5])
    settings.forced_bos_token_id = None
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 93
    assert model.generate(torch.tensor([[90, 92]]), max_new_tokens=5, do_sample=False).max() < 93
    keep = torch.ones(93, dtype=torch.bool)
    keep[2] = False
    cut(model, families.axes(model), Mask({"vocabulary": keep}))
    assert model.get_input_embeddings().padding_idx is None


def test_metrics_do_not_look_at_tokens(batches: list[torch.Tensor]) -> None:
    """Their worth is their use; the embedding, a fifth of a small model, needs no gradient."""
    model, seen = tiny_model(), []

    def metric(of: Any, axes: Any) -> Any:
        evidence = yield from taylor(of, axes)
        seen.append(of.get_input_embeddings().weight.grad)
        return evidence

    axes = [axis for axis in families.axes(model) if axis.kind != "residual"]  # whose channels are columns of the embedding
    scores, _ = score(model, axes, batches, metrics=[metric])
    assert "vocabulary" in {axis.name for axis in axes} - scores.keys()
    assert seen == [None]


# Comparing between tokenizers.


def test_bytes_of_a_text_are_its_bytes(tokenizer: Any) -> None:
    """Token by token, wherever windows cut a character; one that the tokenizer adds is no text."""
    generator = random.Random(5)
    for _ in range(20):
        text = any_text(generator)
        ids = torch.tensor([0, *tokenizer(text + tokenizer.bos_token)["input_ids"]])[
            None
        ]  # the first of a window is not predicted
        assert text_bytes(tokenizer, [ids]) == len(text.encode())
        halves = [ids[:, :4], ids[:, 3:]]
        assert text_bytes(tokenizer, halves) == text_bytes(tokenizer, [ids])


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "bytes"])
def test_windows_in_other_tokens_have_the_same_text(kind: str) -> None:
    """To the byte, wherever a window cuts a character: those are left out."""
    before, now = byte_level(), byte_tokenizer(opens=True) if kind == "bytes" else spelled(kind)
    windows = evaluation_windows(before, ["Zoë said: 汉字 🙂 or 🦙🦙, so she did. " * 20], window=9, max_windows=None)
    retold = in_other_tokens(windows, read_by=before, tokenizer=now)
    assert len(retold) == len(windows)
    for ids, others in zip(windows, retold, strict=True):
        text = before.decode(ids[0, 1:]).strip("\ufffd")
        assert now.decode(others[0], skip_special_tokens=True).strip() == text.strip()
    if kind == "bytes":
        cut_off = sum(before.decode(ids[0, 1:]).count("\ufffd") > 0 for ids in windows)
        assert cut_off, "or nothing is seen of it"
        assert 0 <= text_bytes(before, windows) - text_bytes(now, retold) <= 6 * cut_off


def test_bits_per_byte_do_not_depend_on_the_split() -> None:
    """Of a model that knows nothing a token costs log2(V) bits, whatever it stands for."""
    model = tiny_model(vocab_size=702)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokenizer = byte_level()
    windows = [torch.tensor(tokenizer(TEXTS[3])["input_ids"])[None]]
    num_bytes = len(TEXTS[3].encode())
    measured = perplexity(model, windows, num_bytes=text_bytes(tokenizer, windows))
    tokens = windows[0].numel() - 1
    assert measured.bits_per_byte == pytest.approx(tokens * torch.tensor(702.0).log2().item() / num_bytes, rel=1e-5)
    assert perplexity(model, windows).bits_per_byte is None


def test_the_first_window_is_no_part_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes ten seconds and each further one two: 7 tokens are predicted every two seconds."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = tiny_model(vocab_size=50)

    def slow(module: Any, given: Any) -> None:
        now[0] += 10.0 if now[0] == 100.0 else 2.0

    model.register_forward_pre_hook(slow)
    model.model.register_forward_pre_hook(slow)
    windows = [torch.randint(3, 50, (1, 8)) for _ in range(4)]
    measured = perplexity(model, windows)
    assert (measured.tokens, measured.seconds, measured.tokens_per_second) == (28, 16.0, 3.5)
    assert perplexity(model, windows[:1]).tokens_per_second is None
