"""What this installation is made of, and how many threads it uses when nobody says."""

import sys

import numpy as np

from autocompress_fast import _core


class Config(dict[str, object]):
    """A dict that prints as one aligned line per entry."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        shown = {key: ", ".join(value) or "none" if isinstance(value, tuple) else value for key, value in self.items()}
        return "\n".join(f"{key:<{width}}  {value}" for key, value in shown.items())


def default_threads() -> int:
    """Return the number of threads an operation uses when none is given.

    It is ``torch.get_num_threads()`` if torch is imported already, so that both use the machine alike, and otherwise
    the number of processors this process may run on.

    >>> default_threads() >= 1
    True
    """
    get_num_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return int(get_num_threads()) if get_num_threads is not None else _core.hardware_threads()


def show_config() -> Config:
    """Describe the installation: for bug reports, and for the conditions of a measurement.

    Returns:
        A dict with ``version``, ``compiler``, ``flags``, the instruction sets the package holds kernels for
        (``isas_compiled``), those this machine can run (``isas_supported``) and the one in use (``isa_active``; force
        one with the environment variable ``ACF_FORCE_ISA``), the instructions it has for products of narrow numbers,
        the quickest last (``bfloat16_units``, ``int8_units``), ``threads`` (the default count), and the versions of
        ``python``, ``numpy`` and ``torch`` (None unless torch is imported already). It prints as a small table.

    Raises:
        ValueError: ``ACF_FORCE_ISA`` names an instruction set that is unknown or cannot run here.

    >>> config = show_config()
    >>> config["isa_active"] in config["isas_supported"]
    True
    """
    return Config(
        version=_core.__version__,
        compiler=_core.compiler,
        flags=_core.flags,
        isas_compiled=tuple(_core.compiled_isas()),
        isas_supported=tuple(_core.supported_isas()),
        isa_active=_core.active_isa(),
        bfloat16_units=tuple(_core.narrow_units("bfloat16")),
        int8_units=tuple(_core.narrow_units("int8")),
        threads=default_threads(),
        python=".".join(map(str, sys.version_info[:3])),
        numpy=np.__version__,
        torch=getattr(sys.modules.get("torch"), "__version__", None),
    )
