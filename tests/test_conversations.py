"""Text that the dense model writes: in the chat template, as it was drawn, with its likeliest tokens, and nothing that is measured."""

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_pruner.core.model.feed import Goal
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.data import conversations, generation, prompts
from adapt_pruner.data.conversations import Template, of_part, written_batches
from adapt_pruner.data.fixed import Fixed, Span, training_rows
from adapt_pruner.data.generation import continued
from adapt_pruner.data.prompts import Prompt, is_measured, measured_prompts, our_prompts
from adapt_pruner.data.sources import written_spec
from adapt_pruner.data.windows import calibration_feed, held_out_by_text
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import read
from adapt_pruner.report.with_card import run
from adapt_pruner.run import conversations as run_conversations
from adapt_pruner.run import shrink as shrinking
from adapt_pruner.run.forecast import dry_run
from adapt_pruner.run.plan import phases, setup_of
from adapt_pruner.run.start import begin, plan
from adapt_pruner.train.loop import TrainConfig, TrainState, _Batch, steps
from adapt_pruner.train.objectives import BesideNll, distil, kl_to_goal, lm
from conftest import VOCAB, assert_same_model, break_off, log_of, saved, tiny_model
from test_cli import ask
from test_data_chat import CHATML, chat_tokenizer

__all__ = ["ask"]  # a fixture

SHORT = [Prompt(("Hi",)), Prompt(("One?",), "Count."), Prompt(("Two?", "And three?")), Prompt(("What is a noun?",))]


def chatting(*, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model that often ends its turn."""
    model = tiny_model(vocab_size=VOCAB + 2, seed=seed, eos_token_id=VOCAB + 1, **changes)
    with torch.no_grad():
        mean = model.model(torch.randint(3, VOCAB, (4, 60))).last_hidden_state.mean((0, 1))
        model.get_output_embeddings().weight[VOCAB + 1] = mean * 4.5 / mean.square().sum()
    model.generation_config.eos_token_id = VOCAB + 1
    return model


def few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts of ours, and short answers."""
    monkeypatch.setattr(conversations, "our_prompts", lambda long: SHORT)
    monkeypatch.setattr(conversations, "BATCH", 8)
    monkeypatch.setattr(conversations, "_ANSWER", 24)
    monkeypatch.setattr(conversations, "_DRAWN", 24)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    few_and_short(monkeypatch)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Batches of 25 conversations or a few more, by `chatting()`."""
    with pytest.MonkeyPatch.context() as patch:
        few_and_short(patch)
        return written(chatting(), chat_tokenizer(), tmp_path_factory.mktemp("written"), texts=25)


def written(model: Any, tokenizer: Any, tmp_path: Path, spec: str = "self-chat", **how: Any) -> Any:
    settings = {"whose": "m", "texts": 8, "length": 32, "seed": 0, "dtype": "float32", "cache": tmp_path / "cache", **how}
    return written_batches(model, tokenizer, spec, **settings)


def rows(store: Any) -> list[tuple[list[int], list[bool]]]:
    spans = itertools.pairwise(store.offsets.tolist())
    return [(store.ids[start:stop].tolist(), store.mask[start:stop].tolist()) for start, stop in spans]


def test_no_prompt_of_ours_is_measured() -> None:
    ours = [turn for prompt in our_prompts(long=True) for turn in prompt.turns]
    assert len(ours) > 300
    assert len({prompt.ask for prompt in measured_prompts()}) == 100
    assert [turn for turn in ours if is_measured(turn)] == []


def test_near_copies_of_what_is_measured_are_known() -> None:
    for text in (
        "what is the Capital of France",
        "Tell me the capital city of France!",
        "What is the capital of Peru?",
        "Name three fruits",
    ):
        assert is_measured(text), text
    for text in (
        "What is a capital letter?",
        "Write a poem about France in spring.",
        "Three fruits fell from the tree behind our house.",
    ):
        assert not is_measured(text), text


def test_conversations_are_kept_as_they_were_drawn(texts: Any) -> None:
    """Each begins as the template says, what is learnt is the answer with its end, and what has no end is left out."""
    tokenizer, end = chat_tokenizer(), VOCAB + 1
    found = rows(of_part(texts, ""))
    assert len(found) >= 25
    header = tokenizer("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")["input_ids"]
    own = [
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"],
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "Count."}, {"role": "user", "content": "One?"}], add_generation_prompt=True
        )["input_ids"],
    ]
    starts = [next((start for start in own if ids[: len(start)] == start), None) for ids, _ in found]
    assert any(starts)
    for (ids, mask), start in zip(found, starts, strict=True):
        first = mask.index(True)
        assert ids[-1] == end
        assert mask[-1]
        assert not mask[0]
        if start is not None:
            assert first == len(start)
        elif ids[: len(header)] == header:  # drawn by the model, or ours
            text = tokenizer.decode(ids[:first])
            assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_answers_that_do_not_end_are_left_out(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "_ANSWER", 3)
    found = rows(of_part(written(chatting(), chat_tokenizer(), tmp_path, texts=100, batches=3), ""))
    assert 0 < len(found) < 3 * 8
    assert all(ids[-1] == VOCAB + 1 for ids, _ in found)


def test_a_second_turn_follows_the_first_answer(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "our_prompts", lambda long: [SHORT[2]] * 4)
    tokenizer = chat_tokenizer()
    found = rows(of_part(written(chatting(), tokenizer, tmp_path, texts=4), ""))
    between = "<|im_end|>\n<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n"
    longer = [(ids, mask) for ids, mask in found if between in tokenizer.decode(ids)]
    assert longer
    for ids, mask in longer:
        runs = [learnt for learnt, _ in itertools.groupby(mask)]
        assert runs == [False, True, False, True], "both answers are learnt, and not what stands between them"
        first, second = (at for at in range(1, len(mask)) if mask[at] and not mask[at - 1])
        assert tokenizer.decode(ids[first:second]).endswith(between)


def test_likeliest_tokens_are_those_of_the_dense_model(texts: Any) -> None:
    model, store = chatting(), of_part(texts, "")
    ids, mask = rows(store)[0]
    want = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[torch.tensor(mask[1:])].topk(64)
    count = sum(mask)
    assert store.kept is not None
    assert store.kept.tokens[:count].tolist() == want.indices.tolist()
    torch.testing.assert_close(torch.tensor(store.kept.logs[:count]).float(), want.values, atol=1e-2, rtol=1e-3)


def test_what_was_written_is_read_again(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = chatting(), chat_tokenizer()
    first = written(model, tokenizer, tmp_path, texts=2)
    with monkeypatch.context() as patch:
        patch.setattr(conversations, "continued", lambda *args, **how: pytest.fail("it was written before"))
        again = written(model, tokenizer, tmp_path, texts=2)
    assert [store.digest for store in again] == [store.digest for store in first]
    assert len(written(model, tokenizer, tmp_path, texts=sum(map(len, first)) + 1)) > len(first), (
        "only what is lacking is written"
    )
    assert written(model, tokenizer, tmp_path, whose="another", texts=1)[0].digest == first[0].digest, (
        "the same seed, the same text"
    )
    assert written(model, tokenizer, tmp_path, texts=0) == []
    late = written(model, tokenizer, tmp_path / "new", in_time=lambda: False)
    assert late == [], "no batch begins once the time is up"


def test_drawn_prompts_close_to_measured_ones_are_left_out(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer()
    said = ["What is the capital of France?", "Tell me of rivers", "Tell me of rivers", "cut off at the most tok", "x"]

    def drawn(model: Any, sequences: Any, *, temperature: float, **how: Any) -> list[list[int]]:
        if temperature == 1.0:
            texts = [text + ("" if text.startswith("cut") else "<|im_end|>") for text in said]
            return [tokenizer(text)["input_ids"] for text in texts]
        return [tokenizer("Yes.<|im_end|>")["input_ids"] for _ in sequences]

    monkeypatch.setattr(conversations, "continued", drawn)
    texts = [tokenizer.decode(ids) for ids, _ in rows(of_part(written(chatting(), tokenizer, tmp_path, batches=2), ""))]
    assert sum("rivers" in text for text in texts) == 1
    assert not any("France" in text or "cut off" in text or "user\nx<" in text for text in texts)


def test_only_our_prompts_where_the_template_writes_no_header(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    tokenizer = chat_tokenizer(bare)
    monkeypatch.setattr(conversations._Writer, "_drawn", lambda *args: pytest.fail("there is nothing to draw from"))
    assert Template(tokenizer).header == []
    assert len(written(chatting(), tokenizer, tmp_path, texts=8)) > 1, "our prompts come again"
    with pytest.raises(UsageError, match="no prompt of 'self-chat' fits"):
        written(chatting(), chat_tokenizer("{{ raise_exception('never') }}"), tmp_path)
    with pytest.raises(UsageError, match="no chat template; take 'self'"):
        written(chatting(), chat_tokenizer(None), tmp_path)


def test_our_prompts_come_again_beside_drawn_ones(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at a time in the tests. Two batches answer eleven prompts; the next ones answer four and leave four to be drawn."""
    monkeypatch.setattr(conversations, "our_prompts", lambda long: [Prompt((str(i),)) for i in range(11)])
    writer = conversations._Writer(chatting(), chat_tokenizer(CHATML), "self-chat", length=32, dtype="float32", dense=None)
    asked = [[int(prompt.turns[0]) for prompt, _ in writer._prompts(number)] for number in range(4)]
    assert asked == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 1]]


def test_thinking_is_off_where_the_template_can() -> None:
    template = (
        CHATML + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    assert tokenizer.decode(Template(tokenizer).opening(Prompt(("Hi",)))).endswith("assistant\n<think></think>")


def test_prompts_of_a_persons_conversations(few: None, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"Question {i} of mine"}, {"role": "assistant", "content": "No."}]})
        for i in range(40)
    ]
    lines.append(
        '{"messages": [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "No."}]}'
    )
    path.write_text("\n".join(lines), encoding="utf-8")
    tokenizer = chat_tokenizer()
    texts = [tokenizer.decode(ids) for ids, _ in rows(of_part(written(chatting(), tokenizer, tmp_path, f"self-chat:{path}"), ""))]
    assert all("of mine<|im_end|>" in text for text in texts)
    held_out = {document.messages[0]["content"] for document in conversations.read(f"{path}#heldout")}
    assert held_out
    assert not held_out & {turn for prompt in conversations.prompts_for(f"self-chat:{path}", None) for turn in prompt.turns}


def test_parts_share_no_text(texts: Any) -> None:
    whole, train, held_out = (of_part(texts, part) for part in ("", "train", "heldout"))
    assert len(train) + len(held_out) == len(whole)
    asked = [[tuple(ids[: mask.index(True)]) for ids, mask in rows(part)] for part in (whole, train, held_out)]
    prompts = list(dict.fromkeys(asked[0]))
    assert 6 <= len(prompts) < len(whole), "prompts come again"
    assert {*asked[2]} == {*prompts[5::10]}, "all answers to a prompt are held out together"
    assert {*asked[1]} == {*prompts} - {*asked[2]}
    assert written_spec("self-chat#train") == ("self-chat", "train")
    assert written_spec("self-chat:a.jsonl#heldout") == ("self-chat:a.jsonl", "heldout")
    assert written_spec("self") == ("self", "")
    assert written_spec("selfies.txt") is None
    with pytest.raises(UsageError, match="no part 'test'"):
        written_spec("self#test")


@pytest.mark.parametrize("divisible", [True, False])
@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_a_batch_is_continued_like_each_sequence_alone(at_once: int, divisible: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding on the left changes nothing, and neither does what stands in the same batch, or leaves it because it has ended."""
    monkeypatch.setattr(generation, "_AT_ONCE", at_once)
    if not divisible:
        monkeypatch.setattr(generation, "_of_rows", lambda cache, rows: None)
    model = chatting(seed=22)
    sequences = [[5, 9, 40], [7], list(range(10, 30)), [8, 8]]
    free = continued(model, sequences, most=12, ends=[], temperature=0.0, seed=0)
    alone = model.generate(
        torch.tensor(sequences[:1]), attention_mask=torch.ones(1, 3), max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0
    )  # fmt: skip
    assert free[0] == alone[0, 3:].tolist()
    ends = [free[1][6:8], free[2][6:7], free[3][3:4]]
    how: dict[str, Any] = {"most": 12, "ends": ends, "temperature": 0.0, "seed": 0}
    together = continued(model, sequences, **how)
    assert [len(new) for new in together] == [12, 8, 7, 4]
    assert together == [continued(model, [sequence], **how)[0] for sequence in sequences]


def test_an_end_of_several_tokens() -> None:
    model = chatting(seed=3)
    free = continued(model, [[5, 9]], most=24, ends=[], temperature=1.0, seed=0)[0]
    pairs = list(itertools.pairwise(free))
    pair = next(pair for pair in pairs[3:] if pairs.count(pair) == 1)
    assert continued(model, [[5, 9]], most=24, ends=[pair], temperature=1.0, seed=0)[0] == free[: pairs.index(pair) + 2]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(1))


def goal_of(model: Any, ids: Tensor, mask: Tensor, k: int) -> Goal:
    likely = model(ids).logits[:, :-1].log_softmax(-1)[mask[:, 1:]].topk(k)
    return Goal(likely.indices, likely.values.detach().float())


def test_kl_to_all_tokens_is_the_kl_of_distillation(ids: Tensor) -> None:
    student, teacher = tiny_model(seed=0).double(), tiny_model(seed=1).double()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    ours = kl_to_goal(student, ids, mask, goal=goal_of(teacher, ids, mask, 97))
    theirs = distil(student, ids, mask, teacher=teacher, temperature=1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_kl_to_the_likeliest_and_its_gradient(ids: Tensor) -> None:
    """Against autograd on the formula, with all logits held."""
    student, teacher = tiny_model(seed=0).double(), tiny_model(seed=1).double()
    mask = torch.ones_like(ids, dtype=torch.bool)
    goal = goal_of(teacher, ids, mask, 5)
    ours = kl_to_goal(student, ids, mask, goal=goal)
    ours.backward()
    gradients = {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}
    student.zero_grad()
    log_q = student(ids).logits[:, :-1].reshape(-1, 97).log_softmax(-1).gather(1, goal.tokens)
    p = goal.logs.double().exp()
    rest, rest_of_ours = 1 - p.sum(-1), 1 - log_q.exp().sum(-1)
    plain = (p * (goal.logs - log_q)).sum() + (rest * (rest / rest_of_ours).log()).sum()
    plain.backward()
    torch.testing.assert_close(ours, plain)
    for name, weight in student.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-7)


def test_each_row_is_learnt_by_its_own_objective(texts: Any, tmp_path: Path) -> None:
    """Text by the recipe's objective, conversations by the KL to the dense model, in one step; padding costs nothing."""
    tokenizer, store = chat_tokenizer(), of_part(texts, "")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    whole = training_rows(
        tokenizer, {str(text): 1, "self-chat": 1}, length=48, tokens=1600, seed=0, warn=pytest.fail, cache=tmp_path / "cache",
        written={"self-chat": store},
    )  # fmt: skip
    assert whole.has_goals
    span, count = Span(whole, 0, 12), 12
    assert {goal is None for goal in span.goals(0, count)} == {True, False}
    student = chatting(seed=2)
    towards = [lambda goal: lambda m, i, p: kl_to_goal(m, i, p, goal=goal)]
    how = TrainConfig(objective=lm, schedule=lambda done: 1.0, lr=0.0, batch_rows=count, micro_tokens=200, towards=towards[0])
    batch = _Batch(span, how, device=torch.device("cpu"))
    with torch.no_grad():
        losses = [(lm if part.goal is None else towards[0](part.goal))(student, part.ids, part.predicted) for part in batch.parts]
    found = float(sum(losses))
    want = 0.0
    for row in range(count):
        ids, predicted = span.batch(row, row + 1)
        goal = span.goals(row, row + 1)[0]
        with torch.no_grad():
            want += float(lm(student, ids, predicted) if goal is None else kl_to_goal(student, ids, predicted, goal=goal))
    assert found == pytest.approx(want, rel=1e-4)
    assert all(part.ids.shape[1] <= 48 for part in batch.parts if part.goal is None)
    assert batch.num_predicted == sum(int(part.predicted[:, 1:].sum()) for part in batch.parts if part.predicted is not None)
    first = next(steps(student, Fixed(whole), torch.optim.SGD(student.parameters(), lr=0.0), TrainState(), how, until=count))
    assert first.loss == pytest.approx(want / batch.num_predicted, rel=1e-4)
    how_long = 4 * len(store.ids)
    same = training_rows(
        tokenizer, "self-chat", length=48, tokens=how_long, seed=0, warn=pytest.fail, cache=tmp_path, written={"self-chat": store}
    )
    assert same.num_tokens(0, len(same)) >= how_long, "conversations are read several times without a warning"


def test_a_feed_hears_the_cross_entropy_of_rows_with_a_goal(ids: Tensor) -> None:
    """What such rows are trained on is the KL; a feed compares texts by the same loss."""
    student, teacher = tiny_model(seed=0), tiny_model(seed=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    goal = goal_of(teacher, ids, mask, 5)
    heard = BesideNll(lm, CAUSAL_LM)
    with torch.no_grad():
        trained = heard.beside(functools.partial(kl_to_goal, goal=goal))(student, ids, mask)
        assert float(trained) == pytest.approx(float(kl_to_goal(student, ids, mask, goal=goal)))
        assert heard.nll == pytest.approx(float(lm(student, ids, mask)))
    assert heard.nll != pytest.approx(float(trained), rel=0.01)


def test_a_plan_counts_what_the_model_writes(chat_folder: Path, text_file: Path) -> None:
    """As a phase of its own, which a run that goes on has behind it."""
    work = begin(chat_recipe(chat_folder, text_file), lambda event: None)
    work.stages, work.budget = plan(work)
    for begun, count in ((False, 1), (True, 0)):
        items = phases(work, setup_of(work), begun=begun).items
        assert sum(item["phase"] == "write" for item in items) == count


def test_self_written_text_is_learnt_from(tmp_path: Path) -> None:
    model, tokenizer = chatting(), chat_tokenizer(None)
    store = of_part(written(model, tokenizer, tmp_path, "self", texts=32), "train")
    found = rows(store)
    assert len(found) == 29  # of 32, one in ten is held out
    assert all(len(ids) == 32 and not mask[0] and all(mask[1:]) for ids, mask in found)
    assert store.kept is not None
    assert store.kept.tokens.shape == (29 * 31, 64)


def test_calibration_and_held_out_windows_of_conversations(texts: Any) -> None:
    tokenizer, store = chat_tokenizer(), of_part(texts, "")
    wanted = {"self-chat#train": store, "self-chat#heldout": store}
    how: dict[str, Any] = {"samples": 6, "length": 16, "ids": None, "seed": 0, "written": wanted}
    draw = calibration_feed(None, tokenizer, source="self-chat#train", **how)
    first, second = torch.cat(draw(1)), torch.cat(draw(2))
    assert first.shape == (6, 16)
    assert not torch.equal(first, second), "drawn again in each iteration"
    assert torch.equal(first, torch.cat(draw(1)))
    assert VOCAB in first.flatten().tolist(), "it reads what the template writes"
    windows = held_out_by_text(tokenizer, source="self-chat#heldout", window=64, max_windows=3, written=wanted)[
        "self-chat#heldout"
    ]
    assert [ids.tolist()[0] for ids in windows] == [ids[:64] for ids, _ in rows(store)[:3]]


def test_calibration_reads_a_persons_conversations_in_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    line = (
        '{"messages": [{"role": "user", "content": "Hello number %d"}, {"role": "assistant", "content": "Fine, thank you."}]}\n'
    )
    path.write_text("".join(line % i for i in range(60)), encoding="utf-8")
    tokenizer = chat_tokenizer()
    draw = calibration_feed(None, tokenizer, source=str(path), samples=6, length=64, ids=None, seed=0)
    text = tokenizer.decode(torch.cat(draw(1)).flatten().tolist())
    assert "<|im_start|>assistant\nFine, thank you.<|im_end|>\n" in text
    plain = chat_tokenizer(None)
    text = plain.decode(
        torch.cat(calibration_feed(None, plain, source=str(path), samples=6, length=32, ids=None, seed=0)(1)).flatten().tolist()
    )
    assert "Fine, thank you." in text
    assert "assistant" not in text, "a tokenizer without a template reads the messages as text"


def test_prompts_files_are_whole() -> None:
    first = measured_prompts()[:30]
    assert all(prompt.names or prompt.all or prompt.items for prompt in measured_prompts())
    assert len(first) == 30
    assert any(prompt.items for prompt in first)
    assert len(prompts.our_prompts(long=True)[-1].turns[0].split()) > 1200, "a context of about 2,000 tokens"


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "tiny-chat", chatting(), chat_tokenizer())


def chat_recipe(folder: Path, text: Path, **changes: Any) -> Any:
    mixture = {"self-chat#train": 1, str(text): 1}
    training = {"source": mixture, "tokens": 1_800, "batch_tokens": 256, "length": 64, "lr": 1e-3, "written": 12}
    return read({
        "model": str(folder), "budget": "90%", "method": "adaptive-ls-v1", "step": 1.0, "amplitude": 1.0, "training": training, "checkpoint_minutes": 0,
        "calibration": {"source": mixture, "samples": 4, "length": 32, "self_generated": 0}, "evaluation": {"source": "self-chat#heldout", "prompts": []},
        "dtype": "float32", **changes,
    })  # fmt: skip


def test_a_run_learns_from_conversations_and_goes_on_to_the_same_end(
    few: None, chat_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No teacher is held; a stopped run reads again what it read before, even if the cache is lost or has more by then."""
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
    recipe = chat_recipe(chat_folder, text_file)
    outcome = run(recipe, tmp_path / "whole")
    assert outcome is not None
    written_now = outcome.figures["written"]["self-chat"]
    assert written_now["texts"] >= 12
    losses = log_of(tmp_path / "whole", "step")
    assert {step["loss_is"] for step in losses} == {"cross-entropy (of what the dense model wrote, KL to it)"}
    assert len(log_of(tmp_path / "whole", "evaluation")) == 3
    break_off(recipe, tmp_path / "broken", kind="step", nth=3)
    shutil.rmtree(tmp_path / "cache")
    run(recipe, tmp_path / "broken")
    assert_same_model(tmp_path / "whole", tmp_path / "broken")


def test_a_run_that_goes_on_reads_no_more_than_before(
    few: None, chat_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time may have ended its writing; by now there would be time for more, and the cache may have more."""
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path))
    work = begin(chat_recipe(chat_folder, text_file), lambda event: None)
    whole = run_conversations.written_texts(work, begun=False)
    batches = work.state.figures["written"]["self-chat"]["batches"]
    assert batches > 1
    work.state.figures["written"]["self-chat"] |= {"batches": 1}
    assert len(run_conversations.written_texts(work, begun=True)["self-chat#train"]) < len(whole["self-chat#train"])


def test_a_dry_run_writes_nothing(chat_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "continued", lambda *args, **how: pytest.fail("it writes"))
    assert dry_run(chat_recipe(chat_folder, text_file))


def test_time_for_writing_is_a_sixth(monkeypatch: pytest.MonkeyPatch, chat_folder: Path, text_file: Path) -> None:
    now = [0.0]
    monkeypatch.setattr(run_conversations.time, "monotonic", lambda: now[0])
    in_time = run_conversations._in_time(chat_recipe(chat_folder, text_file, minutes=6.0))
    found = []
    for took in (25, 20, 20, 20):
        found.append(in_time())
        now[0] += took
    assert found == [True, True, False, False], "the first is always written; a third would take till 70 of the 60 seconds"


def test_text_of_a_run_is_written_nowhere_else(chat_folder: Path) -> None:
    with pytest.raises(UsageError, match="'self-chat' is written by the model of a run, and there is none here"):
        list(conversations.read("self-chat"))


def planned(work: Any, monkeypatch: pytest.MonkeyPatch, *, speed: float, **asked: Any) -> run_conversations.Writing:
    monkeypatch.setattr(run_conversations, "_writing_speed", lambda work: speed)
    return run_conversations.writing_planned(work, **{"text": None, "seconds": 300.0, "texts": None, **asked})


def test_how_much_is_written_by_the_time_that_there_is(
    chat_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sixth of the time; few are said to be few; the user's number counts; a base model writes plain text, and only without a text."""
    work = begin(chat_recipe(chat_folder, text_file), lambda event: None)
    few = planned(work, monkeypatch, speed=110.0)
    assert (few.base, few.texts, round(few.seconds), few.chat) == ("self-chat", 27, 49, 30)
    assert few.line.startswith(
        "writing: the dense model first writes up to 27 conversations to learn from, in about 49 s; that is few"
    )
    own = few.settings("a.txt#train", own=True)
    assert own["training.source"] == own["calibration.source"] == {"self-chat#train": 1.0, "a.txt#train": 1.0}
    assert "evaluation.source" not in own
    bare = few.settings("", own=False)
    assert (bare["training.source"], bare["evaluation.source"]) == ("self-chat#train", "self-chat#heldout")
    assert bare["training.objective"] == "objectives.lm"
    many = planned(work, monkeypatch, speed=110.0, seconds=3600.0)
    assert (many.texts, many.chat) == (330, 100)
    assert "few" not in many.line
    slow = planned(work, monkeypatch, speed=20.0)
    assert (slow.texts, slow.chat) == (0, 0)
    assert "no time, since 10 texts would take" in slow.line
    assert slow.settings("a.txt#train", own=True) == {}
    off = planned(work, monkeypatch, speed=110.0, texts=0)
    assert (off.texts, off.line) == (0, "")
    assert planned(work, monkeypatch, speed=110.0, seconds=None).texts == 512
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Tell me more"}, {"role": "assistant", "content": "No."}]
    path.write_text("".join(json.dumps({"messages": turns, "id": i}) + "\n" for i in range(40)), encoding="utf-8")
    assert planned(work, monkeypatch, speed=110.0, text=str(path)).base == f"self-chat:{path}"
    work.tokenizer.chat_template = None
    assert planned(work, monkeypatch, speed=110.0).base == "self"
    assert planned(work, monkeypatch, speed=110.0, text=str(text_file)).texts == 0


@pytest.mark.parametrize("own", [True, False])
def test_shrink_keeps_a_chat_model_one(
    few: None, chat_folder: Path, text_file: Path, tmp_path: Path, ask: Any, own: bool
) -> None:
    """Half of what it reads is conversations, or all of it without a text; the same command goes on with it."""
    out = tmp_path / "small"
    words = ["shrink", chat_folder, "--params", "80%", "-o", out, "--tokens", "3k", *(["--text", text_file] if own else [])]
    words += [
        "--set",
        "training.written=12",
        "--set",
        "evaluation.chat=3",
        "--set",
        "calibration.samples=4",
        "--set",
        "evaluation.prompts=[]",
    ]
    status, said, lines = ask(*words)
    assert status == 0, lines
    recipe = read(str(out / "recipe.yaml"))
    assert recipe.training.source == ({"self-chat#train": 1.0, f"{text_file}#train": 1.0} if own else "self-chat#train")
    assert recipe.evaluation.source == (f"{text_file}#heldout" if own else "self-chat#heldout")
    assert "the dense model first writes up to 12 conversations" in lines
    assert "the small model answers" in said
    status, again, lines = ask(*words)
    assert status == 0, lines
    assert "the small model answers" in again
    assert "writes about" not in lines, "it is not planned anew"


@pytest.mark.parametrize(
    ("seconds", "more", "source", "chat", "said"),
    [
        (1.0, [], "self-chat#train", 3, "the dense model first writes up to 12 conversations"),
        (20.0, [], "self-chat#train", 0, "the dense model first writes up to 12 conversations"),
        (55.0, [], "python-docs:train", 0, "writing: no time; a longer run would learn from what the dense model writes"),
        (55.0, ["--set", "training.written=12"], None, 0, "1 minutes are too few"),
    ],
)
def test_a_run_that_has_no_time_to_write_prunes_and_trains_all_the_same(
    few: None, chat_folder: Path, tmp_path: Path, ask: Any, monkeypatch: pytest.MonkeyPatch,
    seconds: float, more: list[str], source: str | None, chat: int, said: str,
) -> None:  # fmt: skip
    """First it asks none of our prompts, then it writes nothing; texts that the user asks for stay, and the time is refused."""
    writing = run_conversations.Writing("self-chat", 12, seconds=seconds, chat=3, answering=30.0 if seconds > 1 else 1.0)
    monkeypatch.setattr(shrinking, "writing_planned", lambda work, **asked: writing)
    words = ["shrink", chat_folder, "--params", "80%", "-o", tmp_path / "small", "--minutes", "1", "--dry-run"]
    status, out, lines = ask(*words, *more)
    assert said in lines
    assert status == (2 if source is None else 0)
    if source is not None:
        (tmp_path / "plan.yaml").write_text(out)
        recipe = read(str(tmp_path / "plan.yaml"))
        assert (recipe.training.source, recipe.evaluation.chat) == (source, chat)


def test_conversations_are_turned_off(few: None, chat_folder: Path, text_file: Path, tmp_path: Path, ask: Any) -> None:
    out = tmp_path / "small"
    words = ["shrink", chat_folder, "--params", "80%", "-o", out, "--tokens", "4k", "--text", text_file, "--dry-run"]
    status, said, lines = ask(*words, "--set", "training.written=0")
    assert status == 0, lines
    assert "self-chat" not in said
    assert "writing:" not in lines
