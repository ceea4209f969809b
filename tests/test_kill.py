"""Runs that are killed without warning: whatever lies on the disk then, they go on and end as one that was not."""

import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_pipeline as pipeline

from autocompress_fast.pipeline import Result
from autocompress_fast.progress import Progress
from autocompress_fast.training import TrainingConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


TIMED = ("result.json", "report.txt", "report.html")  # files that say how long it took


def rows(path: Path) -> list[dict]:
    """Of a file of JSON lines, without times."""
    return pipeline.without_seconds([json.loads(line) for line in path.read_text().splitlines()])


def assert_ended_alike(folder: Path, expected: Path) -> None:
    """The same files: weights, plans, constants bit for bit, and in the logs each epoch and each candidate once."""
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == sorted(
        p.relative_to(expected) for p in expected.rglob("*")
    )
    for path in expected.iterdir():
        found = folder / path.name
        if path.suffix == ".jsonl":
            assert rows(found) == rows(path), path.name
        elif path.is_file() and path.suffix != ".ckpt" and path.name not in TIMED:
            assert found.read_bytes() == path.read_bytes(), path.name
    logged = [(row["stage"], row["epoch"]) for row in rows(folder / "log.jsonl")]
    assert len(set(logged)) == len(logged)


# SIGKILL at random moments

COMMAND = "compress lenet_digits --data digits --target 4x --batch-size 128 --precision float32 --threads 1"
RUN = "--base-epochs 3 --rounds 2 --search 6 --admm-epochs 3 --retrain-epochs 2 --final-epochs 3"
PURIFICATION = "--purify-rounds 1 --purify-tolerance 5 --purify-epochs 2"
STAGES = ["base", "round1.admm", "round1.retrain", "round2.admm", "round2.final", "purify1"]
KILLS = 20

# Reads [work directory, seconds], runs the command there in a process of its own, and kills it when it has computed for
# so long since it made the directory; writes its exit code and for how long it computed from then to its report, after
# which it draws plots. Time is the processor's, so that the moments are the same on a machine that is busy with other
# things. Processes are forked, as importing everything takes longer than the run.
LAUNCHER = """
import json, os, signal, sys, time

import matplotlib.figure, sklearn.datasets, torch

import autocompress_fast as acf
from autocompress_fast.cli import app, commands, job

torch.set_num_threads(1)
acf.inspect(torch.nn.Linear(2, 2), torch.zeros(1, 2))
for line in sys.stdin:
    folder, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv += ["--workdir", folder]
        app()
    begun, reported, now, ended = None, None, 0.0, 0
    while not ended:
        try:
            now = time.clock_gettime(~child << 3 | 2)  # what clock_getcpuclockid says on Linux
        except OSError:  # it has just ended
            pass
        if begun is None and os.path.exists(folder):
            begun = now
        if reported is None and os.path.exists(folder + "/report.txt"):
            reported = now
        if begun is not None and now - begun >= seconds:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    print(json.dumps([os.waitstatus_to_exitcode(status), (reported or now) - begun]), flush=True)
"""

Launch = Callable[..., tuple[int, float]]


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """The command in a work directory, killed after some seconds or never: exit code, and seconds to its report."""
    arguments = f"{COMMAND} {RUN} {PURIFICATION}".split()
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as launcher:

        def run(folder: Path, seconds: float = math.inf) -> tuple[int, float]:
            launcher.stdin.write(json.dumps([str(folder), seconds]) + "\n")
            launcher.stdin.flush()
            code, lived = json.loads(launcher.stdout.readline())
            return code, lived

        yield run


@pytest.fixture(scope="module")
def uninterrupted(launch, tmp_path_factory) -> tuple[Path, float]:
    """The work directory of a run that nobody killed, and how long it computed from making it to its report."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, seconds = launch(folder)
    assert code == 0
    assert list(dict.fromkeys(row["stage"] for row in rows(folder / "log.jsonl"))) == STAGES
    return folder, seconds


@pytest.mark.skipif(sys.platform != "linux", reason="another process's clock, as Linux numbers it")
@pytest.mark.parametrize("number", range(KILLS))
def test_a_command_killed_at_any_moment_goes_on_and_ends_as_one_that_was_not(launch, uninterrupted, number, tmp_path):
    expected, seconds = uninterrupted
    folder = tmp_path / "run"
    moment = seconds * (number + random.Random(number).random()) / KILLS
    while launch(folder, moment)[0] != -signal.SIGKILL:
        shutil.rmtree(folder)  # it was done before
        moment /= 2
    print(f"killed after {moment:.2f} s of {seconds:.2f} s; it left", pipeline.files(folder))
    assert launch(folder)[0] == 0
    assert_ended_alike(folder, expected)


# What a kill at any moment can leave

RECIPE = pipeline.variant(
    rounds=2, search=3, admm_epochs=2, final_epochs=2, purify_rounds=1, purify_tolerance=10.0, purify_epochs=2
)
BASE = TrainingConfig(2, optimizer="adam", lr=0.01, weight_decay=0.0)


def run_in(folder: Path) -> Result:
    """A run with every kind of stage, of a search and of purification."""
    base = pipeline.train(pipeline.network(), pipeline.SPLITS, BASE, batch_size=32, workdir=folder, progress=Progress())
    return pipeline.run(base, target="4x", recipe=RECIPE, workdir=folder)


def contents(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        with open(path, "rb") as file:  # not path.open, which is watched
            found[path.name] = file.read()
    return found


@contextlib.contextmanager
def watched(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[list[dict[str, bytes]]]:
    """Everything that lies in `folder` at one moment or another: before and after every operation on files."""
    states: list[dict[str, bytes]] = []

    def note() -> None:
        if (state := contents(folder)) not in states[-1:]:
            states.append(state)

    def noting(function: Callable) -> Callable:
        def call(*arguments, **options):
            note()
            try:
                return function(*arguments, **options)
            finally:
                note()

        return call

    with patch.context() as patched:
        for module, names in ((io, ["open"]), (os, ["fdopen", "fsync", "chmod", "replace"]), (tempfile, ["mkstemp"])):
            for name in names:
                patched.setattr(module, name, noting(getattr(module, name)))
        yield states


def test_whatever_a_kill_leaves_on_the_disk_a_run_goes_on_from(tmp_path, monkeypatch):
    expected = tmp_path / "whole"
    with watched(expected, monkeypatch) as states:
        result = run_in(expected)
    partial = [state for state in states if any(name.endswith(".partial") for name in state)]
    assert len(partial) > 20
    told_apart: dict[tuple[tuple[str, bytes], ...], dict[str, bytes]] = {}
    for state in states:  # nobody reads the partial ones; that they go is seen with one of them
        told_apart[tuple((name, part) for name, part in state.items() if not name.endswith(".partial"))] = state
    assert len(told_apart) > 30
    for number, state in enumerate(told_apart.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in state.items():
            (folder / name).write_bytes(content)
        continued = run_in(folder)
        pipeline.assert_same(pipeline.state(continued.model), pipeline.state(result.model))
        assert continued.plan == result.plan
        assert_ended_alike(folder, expected)
