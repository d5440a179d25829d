"""A short round of hostile input with a fixed seed; `make fuzz` is the long one, with a new seed each time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import HANGS

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="attacks run in forked processes")
def test_hostile_input_gets_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ), "--seed", "1", "--count", "20", "--seconds", "15"]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    done = re.search(r"seed 1: (\d+) attacks in \d+ s, 0 failures", found.stdout)
    assert done, found.stdout[-500:]
    assert int(done[1]) >= 5, "in 15 seconds"
