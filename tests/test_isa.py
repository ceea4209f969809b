"""Which instruction set runs: the forced one, or an error that says what is possible."""

import pytest

from autocompress_fast import _core, show_config

PRINT_ACTIVE = "import autocompress_fast as acf; print(acf.show_config()['isa_active'])"


def test_each_supported_isa_can_be_forced_at_the_start(run_python):
    for name in _core.supported_isas():
        result = run_python(PRINT_ACTIVE, ACF_FORCE_ISA=name)
        assert result.stdout.strip() == name, result.stderr


def test_empty_value_means_the_fastest(run_python):
    assert run_python(PRINT_ACTIVE, ACF_FORCE_ISA="").stdout.strip() == _core.supported_isas()[-1]


@pytest.mark.parametrize("value", ["sse9", "AVX2", "generic,avx2", " "])
def test_nonsense_is_an_error_that_names_what_is_allowed(run_python, value):
    result = run_python(PRINT_ACTIVE, ACF_FORCE_ISA=value)
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ValueError: ACF_FORCE_ISA must be one of ")
    assert f"got '{value}'" in error
    assert all(name in error for name in _core.supported_isas())


def test_an_isa_that_cannot_run_here_is_refused(run_python):
    for name in {"generic", "avx2", "avx512", "neon"} - set(_core.supported_isas()):
        result = run_python(PRINT_ACTIVE, ACF_FORCE_ISA=name)
        assert result.returncode == 1
        assert f"got '{name}'" in result.stderr


def test_a_kernel_refuses_to_run_with_nonsense(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("ACF_FORCE_ISA", "sse9")
        with pytest.raises(ValueError, match="got 'sse9'"):
            _core.reload_isa()
        with pytest.raises(ValueError, match="got 'sse9'"):
            _core.active_isa()
    assert _core.reload_isa() == _core.active_isa()


def test_reload_follows_the_environment(isa):
    assert _core.active_isa() == isa
    assert show_config()["isa_active"] == isa


def test_supported_isas_are_compiled_in():
    assert _core.supported_isas()[0] == "generic"
    assert set(_core.supported_isas()) <= set(_core.compiled_isas())
