"""What the test files share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import autocompress_fast
from autocompress_fast import _core

# Programs that tests start see the installed package too, not the source tree's folder without the native module.
os.environ["PYTHONSAFEPATH"] = "1"


def pytest_report_header() -> list[str]:
    """Print the conditions of the run."""
    return [f"{Path(autocompress_fast.__file__).parent}:", *repr(autocompress_fast.show_config()).splitlines()]


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test once with each instruction set this machine has; the value is its name."""
    with monkeypatch.context() as patch:
        patch.setenv("ACF_FORCE_ISA", request.param)
        assert _core.reload_isa() == request.param
        yield request.param
    _core.reload_isa()


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Run a program in a fresh interpreter and an empty folder: run_python(text, VARIABLE="value")."""

    def run(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run a file of tests on tiny tensors with one thread of torch: more would wait for each other most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
