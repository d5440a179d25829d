"""A short round of hostile input with a fixed seed; `make fuzz` is the long one, with a new seed each time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import HANGS

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="attacks run in forked processes")
def test_hostile_input_gets_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ), "--seed", "1", "--count", "40", "--seconds", "20"]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    assert "seed 1: " in found.stdout
    assert ", 0 failures" in found.stdout
