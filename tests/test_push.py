"""A push sends every file of the folder to the repository asked for and nothing else, and what cannot be is said in a sentence."""

import json
import os
import shutil
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from adapt_pruner import recipe
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.state import read_state
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.report import with_card
from adapt_pruner.report.hub import plan_upload
from conftest import byte_tokenizer
from test_cli import call

Push = Callable[..., tuple[int, str, str]]  # exit status, stdout, stderr


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push asks for, on this machine."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.private = False
        self.errors: list[dict[str, str]] = []
        self.asked: list[str] = []
        self.files: dict[str, bytes] = {}
        self.branches: list[str] = []
        self.created: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *others: Any) -> None:
        pass

    def _answer(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        self._answer({"id": "me/small", "private": self.server.private, "sha": "0" * 40, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        hub = self.server
        hub.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.status != 200:
            self._answer({"error": "no"}, hub.status)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._answer({"url": f"{hub.address}/me/small", "name": "me/small", "id": "1"})
        elif "/branch/" in self.path:
            hub.branches.append(self.path.rpartition("/")[2])
            self._answer({})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": hub.errors, "warnings": []}, 400 if hub.errors else 200)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            self._answer(
                {"commitUrl": f"{hub.address}/me/small/commit/abc", "commitOid": "abc", "hookOutput": "", "success": True}
            )
        else:
            self._answer({"error": f"nothing is known of {self.path}"}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("push") / "small"
    with_card.prune(recipe.read({"model": str(tiny_folder), "budget": "80%", "method": "magnitude-all"}), out)
    (out / ".hidden").write_text("not for others")
    (out / "__pycache__").mkdir()
    (out / "__pycache__" / "x.pyc").write_text("not for others")
    return out


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Push:
    """The command in this process, with what its library reads of the environment when it is imported: address, network and token."""

    def run(
        *words: object, endpoint: str | None = None, token: str | None = "hf_xxx", offline: bool = False
    ) -> tuple[int, str, str]:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint or "http://127.0.0.1:9")  # where nobody listens
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        status, out, err = call(monkeypatch, capsys, "push", *words)
        assert "Traceback" not in err, err
        return status, out, err

    return run


def sent_by(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != ".hidden"}


def test_every_file_arrives_and_nothing_else(push: Push, folder: Path, hub: Hub) -> None:
    status, out, err = push(folder, "me/small", endpoint=hub.address)
    assert status == 0, err
    assert hub.files == sent_by(folder)
    assert "README.md" in hub.files
    assert f"{hub.address}/me/small/commit/abc" in out
    assert hub.created[0]["name"] == "small"
    assert hub.created[0]["organization"] == "me"
    assert "private" not in hub.created[0]
    assert any(path.endswith("/commit/main") for path in hub.asked)


def test_a_branch_and_a_private_repository(push: Push, folder: Path, hub: Hub) -> None:
    hub.private = True
    status, out, err = push(folder, "me/small", "--private", "--branch", "try", "--json", endpoint=hub.address)
    assert status == 0, err
    assert hub.branches == ["try"]
    assert any(path.endswith("/commit/try") for path in hub.asked)
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert json.loads(out)["files"] == {name: len(data) for name, data in sorted(sent_by(folder).items())}


def test_private_is_not_sent_to_what_is_public(push: Push, folder: Path, hub: Hub) -> None:
    status, _, err = push(folder, "me/small", "--private", endpoint=hub.address)
    assert status == 2
    assert "error: me/small is there already and public; make it private in its settings, or name another\n" in err
    assert not hub.files


def test_a_dry_run_needs_no_network_and_no_login(push: Push, folder: Path, hub: Hub) -> None:
    status, out, err = push(folder, "me/small", "--dry-run", "--json", token=None, endpoint=hub.address)
    assert status == 0, err
    assert not hub.asked
    assert json.loads(out)["files"] == {name: len(data) for name, data in sorted(sent_by(folder).items())}
    assert "names no license" in err
    status, out, err = push(folder, "me/small", "--private", "--dry-run", token=None)
    assert "a private repository" in out
    assert all(name in out for name in sent_by(folder))


def test_a_folder_without_a_card_gets_one_when_it_is_sent(push: Push, folder: Path, hub: Hub) -> None:
    card = (folder / "README.md").read_bytes()
    (folder / "README.md").unlink()
    try:
        _, out, _ = push(folder, "me/small", "--dry-run")
        assert "README.md would be written first" in out
        assert not (folder / "README.md").exists()
        assert push(folder, "me/small", endpoint=hub.address)[0] == 0
        assert hub.files["README.md"] == card
    finally:
        (folder / "README.md").write_bytes(card)


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ({"token": None}, 2, "nobody is logged in"),
        ({"offline": True}, 1, "cannot be reached"),
        ({}, 1, "cannot be reached"),
    ],
)
def test_no_login_and_no_network_are_said_in_a_sentence(
    push: Push, folder: Path, given: dict[str, Any], status: int, words: str
) -> None:
    found, out, err = push(folder, "me/small", **given)
    assert (found, out) == (status, "")
    assert words in err
    assert err.count("error:") == 1


@pytest.mark.parametrize(
    ("answer", "status", "words"), [(401, 2, "does not let you write"), (403, 2, "token that may write"), (400, 1, "refused")]
)
def test_what_the_hub_refuses_is_said_in_a_sentence(
    push: Push, folder: Path, hub: Hub, answer: int, status: int, words: str
) -> None:
    hub.status = answer
    found, _, err = push(folder, "me/small", endpoint=hub.address)
    assert found == status
    assert words in err
    assert str(answer) in err


def test_what_the_hub_says_of_the_card_is_passed_on(push: Push, folder: Path, hub: Hub) -> None:
    hub.errors = [{"message": '"license" must be one of [apache-2.0, …]'}]
    status, _, err = push(folder, "me/small", endpoint=hub.address)
    assert status == 2
    assert '"license" must be one of' in err
    assert "correct that and push again" in err


@pytest.mark.parametrize("repo", ["a/b/c", "me/ha ha", "me/a--b", "", "-x", "me/x.git", "me/" + "x" * 97])
def test_a_name_that_is_none_is_refused(folder: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="not the name of a repository"):
        plan_upload(folder, repo)


def test_what_is_no_finished_checkpoint_is_refused(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no pruning\.json"):
        plan_upload(tiny_folder, "me/small")
    with pytest.raises(UsageError, match="is not a folder"):
        plan_upload(tmp_path / "none", "me/small")
    for name in ("config.json", "pruning.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UsageError, match="no weights"):
        plan_upload(tmp_path, "me/small")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UsageError, match="in the middle of a run"):
        plan_upload(tmp_path, "me/small")


def test_an_export_is_sent_with_its_own_card(
    push: Push, folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "padded"
    assert call(monkeypatch, capsys, "export", folder, "--to", "padded", "-o", out)[0] == 0
    (out / "notes.txt").write_text("mine")
    (out / "small.gguf").write_bytes(b"GGUF")
    status, _, err = push(out, "me/small", endpoint=hub.address)
    assert status == 0, err
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir() if path.name != "notes.txt"}
    assert "notes.txt" in err
    assert b"pruned by adapt-pruner" in hub.files["README.md"]


def test_a_folder_with_a_card_of_somebody_else_is_no_export(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("---\ntags:\n- llama\n---\nNot made by adapt-pruner\n- adapt-pruner\n")
    with pytest.raises(UsageError, match=r"no pruning\.json"):
        plan_upload(tmp_path / "theirs", "me/small")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="put it into the folder of its checkpoint"):
        plan_upload(tmp_path / "small.gguf", "me/small")


def test_only_what_we_wrote_is_sent_and_the_rest_is_named(push: Push, folder: Path, hub: Hub, tmp_path: Path) -> None:
    """Neither files that lie there, nor links, nor what they lead to; whatever patterns their names may be."""
    shutil.copytree(folder, tmp_path / "mine")
    mine, secret = tmp_path / "mine", tmp_path / "secret"
    secret.mkdir()
    (secret / "id_rsa").write_text("secret")
    others = [
        "notes.txt",
        "other.safetensors",
        "*",
        "modeling_evil.py",
        "sub/config.json",
        "optimizer.pt",
        "additional_chat_templates/x.py",
    ]
    for name in others:
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text("not ours")
    (mine / "link.json").symlink_to(secret / "id_rsa")
    (mine / "dangling").symlink_to(secret / "none")
    (mine / "linked").symlink_to(secret)
    os.mkfifo(mine / "pipe")
    found = plan_upload(mine, "me/small")
    assert set(found.files) == set(sent_by(folder))
    (note,) = [note for note in found.notes if "not sent" in note]
    assert "*, additional_chat_templates/x.py, dangling, link.json, linked" in note
    assert note.count(",") == 8, "eight and how many more"
    status, _, err = push(mine, "me/small", endpoint=hub.address)
    assert (status, "not sent, since adapt-pruner did not write them there" in err) == (0, True)
    assert hub.files == sent_by(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "README.md", "config.json"])
def test_a_link_or_a_pipe_in_place_of_our_files(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "mine")
    path = tmp_path / "mine" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link, and its target may not belong to the model; put the file itself there"):
        plan_upload(tmp_path / "mine", "me/small")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError):
        plan_upload(tmp_path / "mine", "me/small")


def test_shards_are_those_that_the_index_names(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "mine")
    mine, index = tmp_path / "mine", tmp_path / "mine" / "model.safetensors.index.json"
    (mine / "model.safetensors").rename(mine / "model-00001-of-00001.safetensors")
    with pytest.raises(UsageError, match="no weights"):
        plan_upload(mine, "me/small")
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert "model-00001-of-00001.safetensors" in plan_upload(mine, "me/small").files
    for shard, said in (
        ("gone.safetensors", "has no gone"),
        ("../x.safetensors", "not a shard beside it"),
        ("notes.txt", "not a shard"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(UsageError, match=said):
            plan_upload(mine, "me/small")


def test_a_tokenizer_of_several_chat_templates_is_kept_and_sent_whole(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """transformers writes all but the first into a folder of their own; checkpoints and what is sent have it."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "tools: {{ messages[0].content }}"}
    tokenizer.save_pretrained(tmp_path / "base")
    training = {"source": str(text_file), "tokens": 512, "batch_tokens": 128, "length": 32}
    asked = recipe.read(
        {"model": str(tmp_path / "base"), "budget": "80%", "method": "magnitude-all", "stages": 2, "training": training}
    )
    with_card.run(asked, tmp_path / "run")
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    (other,) = [name for name in read_state(checkpoint)["files"] if "/" in name]
    assert (checkpoint / other).is_file()
    (checkpoint / other).write_text("another")
    with pytest.raises(RunError, match="tool_use"):
        read_state(checkpoint)
    result = tmp_path / "run" / "model"
    sent = plan_upload(result, "me/small").files
    assert set(sent) == {path.relative_to(result).as_posix() for path in result.rglob("*") if path.is_file()}
    assert other in sent
    assert set(load(str(result)).tokenizer.chat_template) == {"default", "tool_use"}
