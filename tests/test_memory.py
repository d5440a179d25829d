"""Memory of the process: what a file's pages take of it, and what may not be touched when they go."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapt_pruner.core.system import memory
from adapt_pruner.core.system.memory import take_into_memory, usable_bytes
from conftest import VOCAB, byte_tokenizer, tiny_model

MB = 2**20
needs_maps = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="the system does not tell what a process has mapped"
)


def resident(path: Path) -> int:
    """Bytes of a file that this process has in memory, on whatever file system the file lies."""
    _, *its = Path("/proc/self/smaps").read_text().split(f" {path}\n")
    return sum(int(rest.partition("\nRss:")[2].split()[0]) * 1024 for rest in its)


@needs_maps
def test_a_files_pages_go_and_come_back(tmp_path: Path) -> None:
    there = torch.arange(16 * MB, dtype=torch.float32)
    save_file({"weight": there}, tmp_path / "weights")
    size = (tmp_path / "weights").stat().st_size
    mapped = torch.from_file(str(tmp_path / "weights"), size=size // 4, dtype=torch.float32)
    mapped.sum()
    before = resident(tmp_path / "weights")
    owner, again = mapped.view(-1), mapped.view(-1)
    take_into_memory([owner])
    after = resident(tmp_path / "weights")
    assert after < MB < before, "the system may have taken pages before; of those that were left none is but the ends"
    assert owner.data_ptr() != mapped.data_ptr()
    assert torch.equal(owner[-16 * MB :], there)
    assert torch.equal(again[-16 * MB :], there), "whoever reads the file's own pages has them back"


@needs_maps
def test_memory_that_is_no_files_is_left_alone() -> None:
    own = torch.ones(16 * MB)
    take_into_memory([own.view(-1)])
    assert bool((own == 1).all())


@needs_maps
def test_a_model_is_held_once_while_it_is_loaded(tmp_path: Path) -> None:
    """Twelve layers of 12 MB each: both a file's pages and their copies would come to 288 MB, twice the weights.

    Half a model on either side is for the allocator and for the peak that the process has had before.
    """
    tiny, large = tmp_path / "tiny", tmp_path / "large"
    tiny_model(vocab_size=VOCAB).save_pretrained(tiny)
    tiny_model(vocab_size=VOCAB, hidden_size=252, intermediate_size=4096, num_hidden_layers=12).save_pretrained(large)
    for folder in (tiny, large):
        byte_tokenizer().save_pretrained(folder)
    weights = (large / "model.safetensors").stat().st_size
    script = (
        "from adapt_pruner.checkpoint.load import load\n"
        "from adapt_pruner.core.system.memory import peak_rss_bytes\n"
        f"load({str(tiny)!r})\n"
        "before = peak_rss_bytes()\n"
        f"load({str(large)!r})\n"
        "print(peak_rss_bytes() - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert 0.5 * weights < grown < 1.5 * weights


KEPT = """
import resource
from pathlib import Path
import torch
from adapt_pruner.core.system.memory import keeping_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

usual, began = faults(), resident()
with keeping_freed():
    torch.zeros(2**24)
    kept = faults()
print(usual, kept, faults(), resident() - began)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has what it sets")
def test_freed_memory_is_kept_for_the_next_tensor_and_then_returned() -> None:
    """Each page that is new to a process is a fault: 16,384 of them for the 64 MB of a tensor, unless the memory was kept."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    usual, kept, afterwards, more = map(int, done.stdout.split())
    assert usual > 50_000
    assert kept < 5_000
    assert afterwards > 50_000
    assert more < 8_192, "pages of 4 kB: the 64 MB are returned"


@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_a_container_has_the_memory_that_its_limit_leaves(
    limit: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\nHugePages_Total: 0\n")
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t 3000 kB\nVmRSS:\t 2000 kB\n")
    (tmp_path / "memory").mkdir()
    for name in ("_SYSTEM", "_STATUS", "_CONTAINER"):
        monkeypatch.setattr(memory, name, tmp_path / {"_SYSTEM": "meminfo", "_STATUS": "status"}.get(name, ""))
    assert memory.peak_rss_bytes() == 3_000 * 1024
    assert usable_bytes() == 60_002_000 * 1024, "no container"
    (tmp_path / used).write_text("1500000000\n")
    (tmp_path / used).with_name("memory.stat").write_text("anon 900000000\ninactive_file 400000000\nactive_file 100000000\n")
    (tmp_path / limit).write_text("max\n")
    assert usable_bytes() == 60_002_000 * 1024, "no limit"
    (tmp_path / limit).write_text("4000000000\n")
    assert usable_bytes() == 3_000_000_000 + 2_000 * 1024, "what is cached of files can be had"
    (tmp_path / "meminfo").unlink()
    assert usable_bytes() is None
