"""csrc without torch: which library fits this CPU, its functions, and how many threads they use."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from hyperllama.errors import HyperLlamaError

# What torch asks of a CPU before it calls it by these names, as /proc/cpuinfo spells it.
_LEVELS = {"avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma", "avx2"}, "avx2": {"avx2", "fma"}}
FORCED: ContextVar[str | None] = ContextVar("hyperllama_backend", default=None)
"""The implementation that backend.use forces."""

_LIBRARIES = {"avx512": ["v4", "v3", "base"], "avx2": ["v3", "base"], "default": ["base"]}


@cache
def _cpuinfo(field: str) -> str:
    """What the first core's entry has for a field; "" without one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def cpu_vendor() -> str:
    """AuthenticAMD, GenuineIntel, ...; "" where the system doesn't say."""
    return _cpuinfo("vendor_id")


def _names(flags: set[str], asked: str | None) -> list[str]:
    """The libraries for a CPU with these flags, best first; `asked` is what ATEN_CPU_CAPABILITY limits torch to, or None."""
    level = next((level for level, needed in _LEVELS.items() if needed <= flags), "default")
    order = list(_LIBRARIES)
    if asked in order:
        level = order[max(order.index(level), order.index(asked))]
    return (["v4_bf16"] if level == "avx512" and "avx512_bf16" in flags else []) + _LIBRARIES[level]


@cache
def library() -> ctypes.CDLL | None:
    """csrc for this CPU, or None (said once) when hyperllama was installed without a compiler.

    ATEN_CPU_CAPABILITY limits it as it limits torch. Where torch is installed its OpenMP runtime is loaded first, so that both
    share one, whichever is imported first. Raises HyperLlamaError when HYPERLLAMA_CSRC names a folder without it.
    """
    names = _names(set(_cpuinfo("flags").split()), os.environ.get("ATEN_CPU_CAPABILITY"))
    for folder in _library_folders():
        for name in names:
            if (folder / f"hyperllama_{name}.so").is_file():
                _load_openmp()
                return ctypes.CDLL(str(folder / f"hyperllama_{name}.so"))
    if named := os.environ.get("HYPERLLAMA_CSRC"):
        raise HyperLlamaError(f"HYPERLLAMA_CSRC: {named} has none of hyperllama_{{{','.join(names)}}}.so for this CPU")
    import logging

    logging.getLogger("hyperllama").warning("hyperllama was installed without a C++ compiler: CPU ops use plain torch")
    return None


def usable() -> bool:
    """Whether csrc is there, and neither backend.use nor HYPERLLAMA_BACKEND forces another implementation."""
    return (FORCED.get() or os.environ.get("HYPERLLAMA_BACKEND") or "csrc") == "csrc" and library() is not None


def _load_openmp() -> None:
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    for path in (spec.submodule_search_locations or []) if spec else []:
        runtime = Path(path) / "lib" / "libgomp.so.1"
        if runtime.is_file():
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)


def csrc(name: str) -> Any:
    """The function hyperllama_<name> of the library, where there is one.

    Raises HyperLlamaError when the library is older than the code.
    """
    try:
        return getattr(library(), f"hyperllama_{name}")
    except AttributeError:
        raise HyperLlamaError(
            f"the installed csrc has no {name}: it is older than the code, install hyperllama again"
        ) from None


def address(data: Any) -> int:
    """Where the bytes of a buffer in one piece are: ctypes itself tells that of memory that may be written to, and of no other."""
    view = (ctypes.c_size_t * 10)()  # a Py_buffer, which begins with the address
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), view, 0)
    found = view[0]
    ctypes.pythonapi.PyBuffer_Release(view)
    return found


def threads() -> int:
    """How many threads an op uses: torch's number where torch is there, else OMP_NUM_THREADS or the cores of this process."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdigit() and int(asked) > 0 else len(os.sched_getaffinity(0))


def _library_folders() -> Iterator[Path]:
    """Where an installed package, or an editable one, has its libraries; HYPERLLAMA_CSRC names another folder."""
    import hyperllama

    if folder := os.environ.get("HYPERLLAMA_CSRC"):
        yield Path(folder)
        return
    yield from (Path(path) / "lib" for path in hyperllama.__path__)
    from importlib.metadata import PackageNotFoundError, files  # slow to import, and seldom needed

    try:
        installed = files("hyperllama") or []
    except PackageNotFoundError:  # used from a checkout, never installed
        installed = []
    yield from (Path(str(file.locate())).parent for file in installed if file.name.startswith("hyperllama_"))
