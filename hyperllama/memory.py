"""When this process gets memory from the kernel and looks for garbage: what training gains from, and benchmarks hold fixed."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD


def keep_freed_blocks() -> bool:
    """Make glibc keep freed blocks for later calls, big ones too; False where there is no glibc.

    By default a block of some MB is taken fresh from the kernel at every allocation and given back when freed, and its page
    faults cost more than the op that fills it. Figures: NOTES.md. `give_back_freed_blocks` ends a phase.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1))


def give_back_freed_blocks() -> None:
    """Return to the kernel what glibc keeps; does nothing where there is no glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def no_collections() -> Iterator[None]:
    """Have Python look for cyclic garbage only where `gc.collect` is called, and then only among what was made since.

    A collection at a moment of its own choice walks over every object of torch, in the middle of a step, and on each process in
    another one, for which all others wait.
    """
    before = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if before:
            gc.enable()
