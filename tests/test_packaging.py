"""The package as it is installed: version, names, dependencies, stubs, sources."""

import ast
import importlib
import operator
import re
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import autocompress_fast as acf
from autocompress_fast import _core
from autocompress_fast.config import Config, default_threads

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(acf.__file__).parent


def test_one_version():
    in_pyproject = re.search(r'^version = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert in_pyproject is not None
    assert {acf.__version__, _core.__version__, metadata.version("autocompress-fast")} == {in_pyproject[1]}


def test_only_numpy_and_safetensors_are_required():
    required = [line for line in metadata.requires("autocompress-fast") or [] if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in required) == ["numpy", "safetensors"]


def test_type_information_is_installed():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_core.pyi").is_file()


# ---- public names


def test_public_names_exist_and_are_listed():
    for name in acf.__all__:
        assert getattr(acf, name) is not None
    assert dir(acf) == sorted(acf.__all__)
    assert sorted(acf.__all__) == sorted({"__version__", *acf._LAZY, *acf._SUBMODULES})


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {}
    for node in block.body:
        for alias in node.names:
            assert alias.asname == alias.name, f"write 'import {alias.name} as {alias.name}', which marks it as public"
            imports[alias.name] = node.module
    expected = {name: f"autocompress_fast.{module}" for name, module in acf._LAZY.items()}
    assert imports == {**expected, **dict.fromkeys(acf._SUBMODULES, "autocompress_fast")}


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'autocompress_fast' has no attribute 'prune_everything'"):
        _ = acf.prune_everything


def test_importing_a_module_does_not_hide_the_function_of_its_name(run_python):
    result = run_python(
        "import importlib, types, autocompress_fast as acf\n"
        "for name, module in acf._LAZY.items():\n"
        "    importlib.import_module('autocompress_fast.' + module)\n"
        "    assert not isinstance(getattr(acf, name), types.ModuleType), name\n"
    )
    assert result.returncode == 0, result.stderr


# ---- importing


def test_import_is_light(run_python):
    program = (
        "import sys, time, numpy\n"
        "start = time.perf_counter(); import autocompress_fast as acf; acf.show_config(); dir(acf)\n"
        "print(time.perf_counter() - start)\n"
        "heavy = {'torch', 'typer', 'rich', 'sklearn', 'matplotlib', 'PIL', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    results = [run_python(program) for _ in range(5)]
    assert all(result.returncode == 0 for result in results), results[0].stderr
    print(f"import autocompress_fast: {min(float(result.stdout) for result in results):.3f} s after numpy's")


@pytest.mark.parametrize("name", ["ops", "engine", "plan", "data"])
def test_runs_with_numpy_alone(run_python, name):
    result = run_python(
        "import sys\n"
        "for absent in ('torch', 'typer', 'rich', 'sklearn', 'matplotlib', 'PIL', 'scipy'):\n"
        "    sys.modules[absent] = None  # importing it raises ImportError\n"
        f"import autocompress_fast.{name}"
    )
    assert result.returncode == 0, result.stderr


def test_missing_native_module_gives_advice(run_python, tmp_path):
    (tmp_path / "autocompress_fast").mkdir()
    (tmp_path / "autocompress_fast" / "__init__.py").write_bytes((PACKAGE / "__init__.py").read_bytes())
    result = run_python(
        f"import sys; sys.meta_path[:] = sys.meta_path[-3:]; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import autocompress_fast"
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: autocompress_fast in ")
    assert "pip install" in result.stderr.splitlines()[-1]


def test_command_without_its_extra_says_what_to_install(run_python):
    result = run_python(
        "import sys\nsys.modules['typer'] = None\nsys.argv = ['autocompress', 'demo']\n"
        "from autocompress_fast.cli import app\napp()"
    )
    assert result.returncode != 0
    assert "autocompress-fast[demo]" in result.stderr
    assert "Traceback" not in result.stderr


# ---- show_config


def test_config_prints_one_line_per_entry():
    config = acf.show_config()
    assert config["version"] == acf.__version__
    assert config["numpy"] == np.__version__
    lines = repr(config).splitlines()
    assert [line.split()[0] for line in lines] == list(config)
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in lines}) == 1, "values are aligned"


def test_config_says_none_of_what_a_machine_lacks():
    assert repr(Config(int8_units=("avx2", "vnni"), bfloat16_units=())).splitlines() == [
        "int8_units      avx2, vnni",
        "bfloat16_units  none",
    ]


def test_threads_are_the_processors_until_torch_is_loaded(run_python):
    result = run_python(
        "import sys, os; from autocompress_fast.config import default_threads\n"
        "assert default_threads() == len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1\n"
        "assert 'torch' not in sys.modules\n"
        "import torch; torch.set_num_threads(3); assert default_threads() == 3, default_threads()\n"
    )
    assert result.returncode == 0, result.stderr


def test_threads_survive_a_half_imported_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert default_threads() == _core.hardware_threads()


# ---- _core and its stub


def parameters(signature: str) -> tuple[str, ...]:
    """Names of the parameters of a function, in order, "*" and "/" included and with "=" where there is a default."""
    arguments = ast.parse(f"def {signature}: ...").body[0].args
    positional = [*arguments.posonlyargs, *arguments.args]
    has_default = [False] * (len(positional) - len(arguments.defaults)) + [True] * len(arguments.defaults)
    names = [arg.arg + "=" * default for arg, default in zip(positional, has_default, strict=True)]
    if arguments.posonlyargs:
        names.insert(len(arguments.posonlyargs), "/")
    if arguments.kwonlyargs:
        names.append("*")
    names += [
        arg.arg + "=" * (default is not None)
        for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return tuple(names)


def methods(node: ast.ClassDef) -> dict[str, list[tuple[str, ...]]]:
    """Of a class in the stub, by "class.method", without those of Python itself."""
    return {
        f"{node.name}.{part.name}": [parameters(f"{part.name}({ast.unparse(part.args)})")]
        for part in node.body
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")
    }


def built_signatures(name: str) -> list[tuple[str, ...]]:
    function, last = operator.attrgetter(name)(_core), name.rpartition(".")[2]
    lines = re.findall(rf"^(?:\d+\. )?({last}\(.*\) -> .*)$", function.__doc__, re.MULTILINE)
    return sorted(parameters(line) for line in lines if "*args, **kwargs" not in line)


def test_stub_mirrors_the_built_module():
    stub: dict[str, list[tuple[str, ...]]] = {}
    for node in ast.parse((PACKAGE / "_core.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            stub.setdefault(node.name, []).append(parameters(f"{node.name}({ast.unparse(node.args)})"))
        elif isinstance(node, ast.AnnAssign) and node.value is None:  # with a value it is a type alias
            assert isinstance(getattr(_core, node.target.id), str)
        elif isinstance(node, ast.ClassDef):
            stub |= methods(node)
    public = [name for name in dir(_core) if not name.startswith("__") and callable(getattr(_core, name))]
    classes = [name for name in public if isinstance(getattr(_core, name), type)]
    made = {f"{name}.{part}" for name in classes for part in vars(getattr(_core, name)) if not part.startswith("_")}
    assert stub.keys() == made | {name for name in public if name not in classes}
    for name in stub:
        assert sorted(stub[name]) == built_signatures(name), name


# ---- the source tree


def native_sources():
    return [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp"}]


def test_only_the_bindings_know_python_and_nothing_knows_torch():
    assert len(native_sources()) > 5
    for path in native_sources():
        included = re.findall(r"#include\s+[<\"](\S+)[>\"]", path.read_text(encoding="ascii"))
        if path.parent.name != "bindings":
            assert not any(re.match(r"(pybind11|Python\.h|numpy)", name) for name in included), path
        assert not any(re.match(r"(torch|ATen|c10|omp\.h)", name) for name in included), path


def test_native_library_does_not_print_or_abort():
    for path in native_sources():
        if path.parent.name != "tests":
            found = re.search(r"std::(cout|cerr|clog|abort|exit)\b|\bf?printf\(", path.read_text(encoding="ascii"))
            assert found is None, f"{path}: {found[0]}"


def test_sdist_holds_what_a_build_needs(monkeypatch, tmp_path):
    build = importlib.import_module("scikit_build_core.build")
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in native_sources()}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "autocompress_fast").rglob("*.py")}
    fixed = {"pyproject.toml", "CMakeLists.txt", "cmake/isa.cmake", "README.md", "LICENSE", "constraints.txt"}
    assert sources | modules | fixed | {"autocompress_fast/_core.pyi", "autocompress_fast/py.typed"} <= names
    built = re.compile(r"(^|/)(build|dist|runs|__pycache__|\.git|\.venv)/|\.(so|o|pyc|whl)$")
    assert not [name for name in names if built.search(name)]
