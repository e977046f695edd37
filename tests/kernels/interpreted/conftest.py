"""Triton's interpreter on CPU tensors: run by test_interpreted.py in a process where TRITON_INTERPRET is set.

The interpreter keeps bf16 as raw uint16. Loading, widening to fp32 and storing are right, and our kernels do arithmetic only on
what they have widened. But its narrowing from fp32 cuts the low bits off, where hardware rounds to nearest even, and its tl.dot
multiplies the raw bits.
"""

import os

import pytest

# Elsewhere the kernels would be decorated for a GPU: these files are collected only in a process of their own.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Triton for every op, with fp32 narrowed to bf16 as hardware does it: by torch."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    from hyperllama.kernels import backend

    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32)).bfloat16()
            return interpreter.TensorHandle(values.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return original(self, source, target)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )
    with backend.use("triton"):
        yield
