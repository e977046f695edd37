"""How this process gets memory from the kernel: what training on a CPU gains from, and benchmarks have to hold fixed."""

import ctypes

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
