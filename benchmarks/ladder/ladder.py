"""Claims about training after pruning, tested on small models with a paper's number of tokens a parameter.

    python benchmarks/ladder/ladder.py run quick [--folder DIR] [--processes 2] [--train SPEC --heldout SPEC]
    python benchmarks/ladder/ladder.py report quick [--folder DIR] [--figures FILE.jsonl]

`run` does the jobs of a plan of ladder.yaml that have no result yet, in order, in one process of one thread a core, and then reports.
It may be stopped at any moment: the same command goes on. What it makes lies in DIR (default: the cache folder's `ladder`), bases with
their recipes included. `report` writes ladder.md, ladder.html and pictures of what there is so far; with `--figures` of the
results kept in one file.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jobs import Job, Ladder
from reporting import write_report
from transformers.utils import logging

from adapt_pruner.core.system.files import cache_folder
from adapt_pruner.core.system.locks import locked
from adapt_pruner.errors import RunError, UsageError

_GLANCE = 2.0  # seconds until a process that has nothing to do looks again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["run", "work", "report"])
    parser.add_argument("plan", help="quick, long, evening, night, second-night, interleaving-x or interleaving-s")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "ladder")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--train", help="SPEC of the training text; read once, when the folder is new")
    parser.add_argument("--heldout", help="SPEC of the held-out text")
    parser.add_argument("--figures", type=Path, help="JSON lines of results, instead of the folder's")
    parser.add_argument("-o", "--output", type=Path, help="folder of the report [default: FOLDER/report]")
    asked = parser.parse_args()
    if bool(asked.train) != bool(asked.heldout):
        sys.exit("error: --train and --heldout go together; name both texts")
    ladder = Ladder(asked.folder, text={"train": asked.train, "heldout": asked.heldout} if asked.train else None)
    if asked.plan not in ladder.table["plans"]:
        sys.exit(f"error: there is no plan {asked.plan!r}; known: {', '.join(ladder.table['plans'])}")
    jobs = ladder.jobs(asked.plan)
    try:
        if asked.do == "run":
            _in_processes(asked.plan, asked.folder, asked.processes, ladder)
        elif asked.do == "work":
            work(ladder, jobs)
            return
    except (UsageError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    if asked.figures:
        results = [json.loads(line) for line in asked.figures.read_text(encoding="utf-8").splitlines()]
    else:  # those of other plans too: arms of one are compared with arms of another
        results = ladder.results_of({job.rung for job in jobs})
    print(write_report(results, ladder.table, asked.output or asked.folder / "report", plan=asked.plan, jobs=jobs))


def _in_processes(plan: str, folder: Path, processes: int, ladder: Ladder) -> None:
    """Work with so many processes of one thread each until every job is done."""
    words = [sys.executable, __file__, "work", plan, "--folder", str(folder)]
    words += ["--train", ladder.text["train"], "--heldout", ladder.text["heldout"]]
    jobs = ladder.jobs(plan)
    for rung in {job.rung for job in jobs}:
        ladder.check(rung)
    ladder.forget_failures(jobs)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    children = [subprocess.Popen(words, env=environment) for _ in range(processes)]
    try:
        failed = sum(abs(child.wait()) for child in children)  # each is waited for
    except KeyboardInterrupt:  # which reached them too
        for child in children:
            child.wait()
        raise
    if failed:
        raise RunError("a process of the ladder has ended before its time; see its message; the same command continues")


def work(ladder: Ladder, jobs: Sequence[Job]) -> None:
    """Do the jobs that have no result and that no other process is at, until all have one."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    while undone := [job for job in jobs if ladder.result(job) is None]:
        if not any(_tried(ladder, job, jobs) for job in undone):
            time.sleep(_GLANCE)


def _tried(ladder: Ladder, job: Job, jobs: Sequence[Job]) -> bool:
    """Do a job, or train the base it needs; False if another process is at either, or the job has to wait for learning rates."""
    named = ladder.table["arms"][job.arm]["lr"]
    sweep = set(ladder.sweep(job.rung, named)) & set(jobs) if isinstance(named, str) and job.lr is None and job.at else ()
    if any(ladder.result(one) is None for one in sweep):
        return False
    source = ladder.source(job)
    if source is not None and ladder.result(source) is None:
        return False
    home = ladder.home(job.rung)
    base = home / f"base-{job.base}"
    if not (base / "model").exists():
        with _claimed(home / "text.lock") as free:
            if not free:
                return False
            ladder.prepare(job.rung)
        with _claimed(home / f"base-{job.base}.lock") as free:
            if not free:
                return False
            began = time.perf_counter()
            ladder.base(job.rung, job.base)
            print(f"base {job.rung}-{job.base}: {time.perf_counter() - began:.0f} s", flush=True)
            return True
    with _claimed(ladder.folder / "runs" / f"{job.name}.lock") as free:
        if not free or ladder.result(job) is not None:
            return False
        try:
            done = ladder.do(job)
        except (UsageError, RunError) as error:  # the others go on; the next `run` tries it once more
            ladder.failed(job, error)
            print(f"{job.name}: {error}", flush=True)
            return True
        print(f"{job.name}: {done['loss']:.4f} nats, {done['params']:,} parameters, {done['cpu_seconds']:.0f} CPU-s", flush=True)
        return True


@contextmanager
def _claimed(lock: Path) -> Iterator[bool]:
    """Whether no other process holds this lock; if so, it is this process's while the context lasts."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = locked(lock)
    except UsageError:
        yield False
        return
    try:
        yield True
    finally:
        file.close()


if __name__ == "__main__":
    main()
