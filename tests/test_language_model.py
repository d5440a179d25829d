"""`proposals=language_model`: answers of a small server are read, mended or left out, and without an answer the search goes on."""

import json
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import read
from adapt_pruner.reduce.propose.language_model import language_model, read_rates
from adapt_pruner.reduce.propose.proposals import Candidate, Space
from adapt_pruner.report.with_card import run
from conftest import HANGS, VOCAB, as_dicts, byte_tokenizer, tiny_model

NAMES = tuple(f"layers.{i}.neurons" for i in range(3))
SPACE = Space(dict.fromkeys(NAMES, 20), {"neurons": NAMES}, {"neurons": 4}, dict.fromkeys(NAMES, 1), dict.fromkeys(NAMES, 40))
POPULATION = [Candidate(dict(SPACE.base), 3.5), Candidate(dict(zip(NAMES, (24, 16, 20), strict=True)), 3.7)]

Serve = Callable[[Any], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that answers every question alike; `Serve.asked` would be what it was asked."""
    servers = []

    def start(content: Any, *, status: int = 200, asked: list[Any] | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if asked is not None:
                    asked.append((self.path, body))
                self.send_response(status)
                self.end_headers()
                text = content if isinstance(content, str) else content(body)
                self.wfile.write(json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())

            def log_message(self, *args: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1#tiny"

    yield start
    for server in servers:
        server.shutdown()


def proposed(model: str, number: int = 6) -> tuple[list[dict[str, int]], list[str]]:
    said: list[str] = []
    found = language_model(POPULATION, SPACE, random.Random(0), number, model=model, warn=said.append)
    assert len(found) == number
    assert all(sum(sizes.values()) == 60 for sizes in found), "the budget is that of the start"
    return found, said


def test_answers_are_read_mended_or_left_out(serve: Serve) -> None:
    asked: list[Any] = []
    text = "Sure! Here they are:\n[40, 60, 50]\n[10, 20, 30]\n1. [50.0%, 50%, 50%]\n[50, 50]\n[50, many, 50]\n[50, 150, 0]\n"
    found, said = proposed(serve(text, asked=asked))
    assert found[0] == dict(zip(NAMES, (24, 16, 20), strict=True)), "right as it is"
    assert found[2] == SPACE.base
    assert said == [
        "the language model wrote 2 candidates that were used as they are, 1 that were corrected and 3 unusable; evolution made 3"
    ]
    path, body = asked[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "tiny"
    prompt = body["messages"][0]["content"]
    assert "loss 3.5000: [50, 50, 50]" in prompt
    assert "loss 3.7000: [40, 60, 50]" in prompt
    assert "The mean of the rates must be 50 for neurons" in prompt
    assert "3 numbers in all" in prompt


@pytest.mark.parametrize("text", ["", "I cannot do that.", "[]", "[[[[", "[nan, inf, 1e9]", "\0" * 9, "[" + "5," * 100_000 + "]"])
def test_nonsense_costs_no_search(text: str, serve: Serve) -> None:
    _, said = proposed(serve(text))
    assert "evolution made 6" in said[0]
    assert "0 candidates that were used as they are, 0 that were corrected" in said[0]


def test_a_server_that_fails_or_is_not_there_costs_no_search(serve: Serve) -> None:
    for address in (serve("busy", status=500), "http://127.0.0.1:9/v1"):
        _, said = proposed(address)
        assert said[0].startswith("the language model did not answer (")
        assert said[0].endswith("evolution made 6")


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_drips_does_not_outlast_the_time_for_an_answer(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the answer never."""
    monkeypatch.setattr("adapt_pruner.reduce.propose.language_model._SECONDS", 1.0)
    over = threading.Event()

    def drip() -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if part == "body" else b"X-Slow: "))
            while not over.wait(0.1):
                connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        _, said = proposed(f"http://127.0.0.1:{server.getsockname()[1]}/v1")
        over.set()
    assert time.monotonic() - began < HANGS
    assert said[0].startswith("the language model did not answer (no whole answer within 1 seconds)")


def test_rates_are_read_from_any_text() -> None:
    assert read_rates("a [1, 2.5] b [-3 , 4 %] [x] []") == [[1.0, 2.5], [-3.0, 4.0], [None]]


@pytest.mark.parametrize("model", ["", "here"])
def test_a_whole_run_asks_a_server_or_a_model_of_its_own(
    model: str, serve: Serve, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    address = serve("[40, 20, 30, 0, 33, 33]")
    if model:
        address = str(tmp_path / "chat")
        tiny_model(vocab_size=VOCAB, max_position_embeddings=4096).save_pretrained(address)
        byte_tokenizer().save_pretrained(address)
    said: list[dict[str, Any]] = []
    options = f"proposals=language_model, model={address}, population=3, offspring=3, rounds=2, tokens=16, finalists=2"
    recipe = read({
        "model": str(tiny_folder), "budget": "85%", "method": "self-pruner", "dtype": "float32", "device": "cpu", "reduce": f"search({options})",
        "calibration": {"source": str(text_file), "samples": 4, "length": 16},
    })  # fmt: skip
    outcome = run(recipe, tmp_path / "run", listen=as_dicts(said.append))
    assert outcome is not None
    assert outcome.figures["params_after"] <= outcome.figures["budget"]
    warnings = [event["message"] for event in said if event["event"] == "warning"]
    told = [message for message in warnings if "the language model" in message]
    assert len(told) == 2
    assert all("wrote" in message for message in told), "it answered"
    assert math.isfinite(outcome.history[0]["loss"])


def test_a_model_and_its_proposals_go_together(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for options in ("proposals=language_model", "model=http://localhost:1/v1", "proposals=language_model, model=nowhere"):
        recipe = read({
            "model": str(tiny_folder), "budget": "85%", "method": "self-pruner", "reduce": f"search({options})", "device": "cpu",
            "calibration": {"source": str(text_file), "samples": 4, "length": 16},
        })  # fmt: skip
        with pytest.raises(
            UsageError, match="language_model needs a model, and no other takes one|model 'nowhere' does not exist"
        ):
            run(recipe, tmp_path / "run")
