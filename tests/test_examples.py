"""The scripts in examples/ run as written."""

import os
import subprocess
import sys
from pathlib import Path

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.budget import count_parameters
from conftest import HANGS

ROOT = Path(__file__).parents[1]


def test_the_loop_by_hand_prunes_trains_and_saves(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "loop.py", tiny_folder, text_file, tmp_path / "small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    dense, small = count_parameters(load(str(tiny_folder)).model), load(str(tmp_path / "small"))
    assert count_parameters(small.model) <= round(0.8 * dense)
    assert small.mask is not None
    trained = [line.partition("loss ")[2].split(" → ") for line in done.stdout.splitlines() if "trained" in line]
    assert len(trained) == 2, "a line for each stage"
    assert float(trained[-1][1]) < float(trained[0][0]), "the second stage ends below where the first began"
