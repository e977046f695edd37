"""Freed blocks stay with the process, or go back to the kernel, as asked."""

import subprocess
import sys

PROGRAM = """
import ctypes, resource, sys
import torch
from hyperllama.memory import give_back_freed_blocks, keep_freed_blocks

if not hasattr(ctypes.CDLL(None), "mallopt"):
    assert not keep_freed_blocks() and give_back_freed_blocks() is None
    sys.exit()
assert keep_freed_blocks()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages = (64 << 20) // resource.getpagesize()
first = faults()
for _ in range(20):  # the heap takes some turns to settle: where a block lies decides what fits beside it
    faults()
kept = faults()
give_back_freed_blocks()
again = faults()
assert kept < pages / 100 < pages / 2 < min(first, again), (first, kept, again)
"""


def test_freed_blocks_are_kept_until_they_are_given_back():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
