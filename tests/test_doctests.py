"""The examples in the docstrings of the installed package run as written."""

import doctest
import importlib
import pkgutil

import pytest

import autocompress_fast

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(autocompress_fast.__path__, "autocompress_fast.")
    if not info.name.endswith(("._core", ".__main__"))
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_a_wrong_example_would_be_found():
    function = type("Wrong", (), {"__doc__": ">>> 1 + 1\n3\n"})
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(function, "wrong"):
        assert runner.run(test, out=lambda _: None).failed == 1
