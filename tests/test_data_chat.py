"""Conversations: the tokenizer's own template, and only what the assistant says is to be predicted."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from adapt_pruner.data.chat import encode_chats
from adapt_pruner.data.fixed import Rows, training_rows
from adapt_pruner.data.sources import Document, documents, read
from adapt_pruner.errors import UsageError
from conftest import byte_tokenizer

# As SmolLM2's: a system message is put first where there is none, and a line ends after every turn.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}{{ {'user': 'Q: ', 'assistant': 'A: '}[message['role']] + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


def said(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + messages


CHATS = [
    said("Hi", "Hello, é 😀\n"),
    said("One?", "1", "Two?", "2 and more", system="Count."),
    said("a\n\nb", " x ", "c"),
]


def chat_tokenizer(template: str | None = CHATML) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, chats: list[Any]) -> str:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return str(path)


def rows_of(
    source: Any, tmp_path: Path, *, length: int = 200, tokens: int = 1, warnings: list[str] | None = None, tokenizer: Any = None
) -> Rows:
    warn = pytest.fail if warnings is None else warnings.append
    return training_rows(
        tokenizer or chat_tokenizer(), source, length=length, tokens=tokens, seed=0, warn=warn, cache=tmp_path / "cache"
    )


def predicted_of(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    """What the mask picks, run by run."""
    ((ids, mask),) = encode_chats(tokenizer, [Document("it", "", tuple(messages))])
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"], "the tokens are the template's own"
    runs: list[list[int]] = [[]]
    for token, counts in zip(ids, mask, strict=True):
        if counts:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("chat", CHATS)
def test_exactly_what_the_assistant_says_and_its_end_of_turn_is_predicted(template: str, chat: list[dict[str, str]]) -> None:
    expected = [message["content"] + "<|im_end|>" for message in chat if message["role"] == "assistant"]
    assert predicted_of(chat_tokenizer(template), chat) == expected


def test_a_message_that_opens_a_conversation_answers_nothing() -> None:
    assert predicted_of(chat_tokenizer(), said("", "Welcome", "Hi", "Hello")[1:]) == ["Hello<|im_end|>"]


def test_without_an_end_of_turn_token_the_line_end_ends_the_turn() -> None:
    assert predicted_of(chat_tokenizer(PLAIN), said("Hi", "Hello")) == ["Hello\n"]


def test_a_conversation_is_a_row_padded_on_the_right_and_cut_at_the_length(tmp_path: Path) -> None:
    spec = write(tmp_path / "c.jsonl", CHATS)
    tokenizer = chat_tokenizer()
    whole = [tokenizer.apply_chat_template(chat)["input_ids"] for chat in CHATS]
    rows = rows_of(spec, tmp_path, tokens=sum(map(len, whole)))
    ids, mask = rows.batch(0, 3)
    assert mask is not None
    assert ids.shape == mask.shape == (3, max(map(len, whole)))
    found = {tuple(row[: rows.num_tokens(i, i + 1)].tolist()): i for i, row in enumerate(ids)}
    assert set(found) == set(map(tuple, whole))
    for row, i in found.items():
        assert not ids[i, len(row) :].any()
        assert not mask[i, len(row) :].any()
        assert mask[i].any()
    assert rows.num_tokens(0, 3) == sum(map(len, whole))
    assert rows.length == max(map(len, whole))
    one = rows.batch(1, 2)[0]
    assert one.shape[1] == rows.num_tokens(1, 2), "padded to the widest of the rows asked for"
    cut = rows_of(spec, tmp_path, length=60, tokens=120)
    assert cut.length == 60
    for i, row in enumerate(cut.batch(0, 2)[0]):
        assert row[: cut.num_tokens(i, i + 1)].tolist() in [ids[:60] for ids in whole]


def test_what_has_no_answer_within_the_length_is_left_out_and_counted(tmp_path: Path) -> None:
    chats = [said("Hi", "Hello"), said("x" * 500, "late"), said("no answer"), [{"role": "system", "content": "only"}]]
    warnings: list[str] = []
    for _ in range(2):  # made, then found on disk
        rows = rows_of(write(tmp_path / "c.jsonl", chats), tmp_path, tokens=10**4, warnings=warnings)
        ids, _ = rows.batch(0, len(rows))
        assert len(set(map(tuple, ids.tolist()))) == 1
    assert sum("3 conversations of" in warning and "no answer in their first 200 tokens" in warning for warning in warnings) == 2
    with pytest.raises(UsageError, match="no conversation with an answer in its first 200 tokens"):
        rows_of(write(tmp_path / "none.jsonl", chats[1:]), tmp_path, warnings=[])


def test_conversations_and_plain_text_meet_in_a_mixture_and_not_in_one_text(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    chats = write(folder / "a.jsonl", CHATS)
    plain = folder / "b.txt"
    plain.write_text("plain " * 100, encoding="utf-8")
    with pytest.raises(UsageError, match=r"contains plain text \(.*b.txt\) and conversations \(.*a.jsonl line \d\)"):
        rows_of(str(folder), tmp_path, tokens=10**4)
    warnings: list[str] = []
    rows = rows_of({chats: 1, str(plain): 1}, tmp_path, tokens=2000, warnings=warnings)
    ids, mask = rows.batch(0, len(rows))
    assert mask is not None
    full = mask.all(dim=1)
    assert 0 < int(full.sum()) < len(rows)
    tokens = [rows.num_tokens(i, i + 1) for i in range(len(rows))]
    share = sum(n for n, is_plain in zip(tokens, full, strict=True) if is_plain) / sum(tokens)
    assert 0.4 < share < 0.6
    assert "Q" not in chat_tokenizer().decode(ids[full][0])


def test_the_same_batch_from_the_store_as_when_it_was_made(tmp_path: Path) -> None:
    spec = write(tmp_path / "c.jsonl", CHATS)
    made, found = (rows_of(spec, tmp_path, tokens=100) for _ in range(2))
    for one, other in zip(made.batch(0, 2), found.batch(0, 2), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    rows_of(spec, tmp_path, tokens=100, tokenizer=chat_tokenizer(MARKED))
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2, "another template, other tokens"


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (None, CHATS[0], "no chat template; train an instruction-tuned model, or give plain text"),
        (
            "{% for message in messages %}{{ loop.length ~ message['content'] }}{% endfor %}",
            said("a", "b", "c"),
            r"c.jsonl line 1 differently once message 2 follows",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            CHATS[0],
            r"c.jsonl line 1 does not fit the tokenizer's chat template \(roles must alternate\)",
        ),
    ],
)
def test_what_a_template_cannot_do_is_said(template: str | None, chat: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        rows_of(write(tmp_path / "c.jsonl", [chat]), tmp_path, tokenizer=chat_tokenizer(template))


@pytest.mark.parametrize("bad", [[], 7, [{"role": "user"}], [{"role": "user", "content": None}], [["user", "x"]]])
def test_messages_that_are_none_are_refused(bad: Any, tmp_path: Path) -> None:
    spec = write(tmp_path / "c.jsonl", [bad])
    with pytest.raises(UsageError, match=r"line 1, has no (text|messages) .*messages"):
        documents(spec)


def test_conversations_come_from_parquet_and_data_sets_too_and_read_as_text_elsewhere(tmp_path: Path) -> None:
    import datasets

    pyarrow.parquet.write_table(pyarrow.table({"messages": CHATS}), tmp_path / "c.parquet")
    datasets.Dataset.from_dict({"messages": CHATS}).save_to_disk(tmp_path / "saved")
    expected = [tuple(chat) for chat in CHATS]
    assert [document.messages for document in read(str(tmp_path / "c.parquet"))] == expected
    assert [document.messages for document in read(str(tmp_path / "saved"))] == expected
    assert documents(str(tmp_path / "c.parquet"))[1] == "Count.\n\nOne?\n\n1\n\nTwo?\n\n2 and more"


SHARED = [
    {"conversations": [{"from": "system", "value": "Count."}, {"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]},
    {"conversations": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]},
]
TASKS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hi"},
    {"instruction": "Greet.", "output": "Hello", "system": "Be kind."},
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "messages"),
    [
        (SHARED, [said("One?", "1", system="Count."), said("Two?", "2")]),
        (TASKS, [said("Add.\n\n1 and 2", "3"), said("Greet.", "Hi"), said("Greet.", "Hello", system="Be kind.")]),
    ],
)
def test_files_of_sharegpt_and_alpaca_are_conversations(
    rows: list[Any], messages: list[Any], ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"chats.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        same = [row for row in rows if not row.get("conversations") or "from" in row["conversations"][0]]
        keys = dict.fromkeys(key for row in same for key in row)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in same]), path)
        messages = messages[:1] if rows is SHARED else messages
    assert [list(document.messages) for document in read(str(path))] == messages


def test_a_speaker_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": "narrator", "value": "Once"}]}) + "\n", encoding="utf-8")
    with pytest.raises(
        UsageError, match="line 1, has turns in its field 'conversations' that are not from human, .*: 'narrator'"
    ):
        documents(str(path))
