"""Some of the mutated files; fuzz_acf.py goes on for as long as one likes, and CONTRIBUTING.md says how."""

import warnings
from collections import Counter

import fuzz_acf
import pytest

from autocompress_fast.engine import native


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setattr(native, "LEAST_EXPANSION", native.LEAST_EXPANSION)


def test_what_the_files_are_made_from_runs(tmp_path):
    for number, (_, whole) in enumerate(fuzz_acf.beginnings()):
        path = tmp_path / "net.acf"
        path.write_bytes(whole)
        assert fuzz_acf.outcome(path, number) == "ran"


def test_mutated_files_are_refused_or_run(tmp_path):
    path, seen = tmp_path / "net.acf", Counter()
    for number in range(1000):
        path.write_bytes(fuzz_acf.mutated(number))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seen[fuzz_acf.outcome(path, number)] += 1
    assert seen["refused"] > 500  # the mutations do damage,
    assert seen["ran"] > 100  # and not so much that only the first check is ever reached


def test_a_number_is_a_file():
    assert fuzz_acf.mutated(5) == fuzz_acf.mutated(5) != fuzz_acf.mutated(6)


def test_what_is_found_is_kept_and_a_run_goes_on(tmp_path, monkeypatch):
    def fails_at_3(path, number):
        if number == 3:
            raise KeyError(path)
        return "refused"

    monkeypatch.setattr(fuzz_acf, "outcome", fails_at_3)
    for last in (2, 5):
        state = fuzz_acf.State(tmp_path / "state", 0)
        fuzz_acf.work_through(tmp_path, tmp_path / "net.acf", state, last)
        assert state.number == last
    assert str(state) == "next 5: 4 refused, 0 ran, 0 large, 1 found"
    assert (tmp_path / "3.acf").read_bytes() == fuzz_acf.mutated(3)
    assert "KeyError" in (tmp_path / "3.txt").read_text()


def test_a_run_in_processes_of_its_own(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH")  # the process imports what lies beside its file
    assert fuzz_acf.supervise(tmp_path, 7, 27) == 0
    assert capfd.readouterr().out.splitlines()[-1].split("\r")[-1].startswith("next 27: ")
    assert not list(tmp_path.glob("*.txt"))
