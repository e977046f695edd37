"""Triton's kernels without a GPU: their values under its interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_are_right_under_the_interpreter():
    """In a process of its own: TRITON_INTERPRET must be set before a kernel is decorated."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).parent / "interpreted")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    print(result.stdout[-3000:], result.stderr[-2000:])
    assert result.returncode == 0
