"""Triton's kernels without a GPU: values under its interpreter, resources by compiling ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperllama.kernels.rms_norm import Launch, _backward_kernel, _forward_kernel


def test_kernels_are_right_under_the_interpreter():
    """In a process of its own: TRITON_INTERPRET must be set before a kernel is decorated."""
    cases = Path(__file__).parent / "interpreted" / "cases.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-2000:]


@pytest.mark.parametrize("n_cols", [576, 1152, 2048, 4096])
@pytest.mark.parametrize("target", [80, 90, 100])
def test_kernels_compile_for_gpus_without_spills(n_cols, target):
    """Aligned bf16 pointers and, as at every model size, a width divisible by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    launch = Launch.of(131072, n_cols, 132)
    for kernel, pointers, flag in (
        (_forward_kernel, ["x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "stream_ptr"], "HAS_RESIDUAL"),
        (_backward_kernel, ["dy_ptr", "dstream_ptr", "stream_ptr", "weight_ptr", "dx_ptr"], "HAS_DSTREAM"),
    ):
        names = kernel.arg_names
        signature = dict.fromkeys(names, "i32")
        signature |= dict.fromkeys(pointers, "*bf16") | {"rstd_ptr": "*fp32"}
        if kernel is _backward_kernel:
            signature["partial_ptr"] = "*fp32"
        else:
            signature["eps"] = "fp32"
        constants = {flag: True, "ROWS": launch.rows, "COLS": launch.cols}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = [*pointers, "rstd_ptr", "n_cols", *(["partial_ptr"] if kernel is _backward_kernel else [])]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        compiled = compile_kernel(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", target, 32),
            options={"num_warps": launch.warps},
        )
        ptx = compiled.asm["ptx"]
        assert "ld.global.v4" in ptx or "ld.global.v8" in ptx or "v4.b32" in ptx, "rows are read 128 bits at a time"
        assert spilled_bytes(compiled.asm["cubin"]) == 0


def spilled_bytes(cubin: bytes) -> int:
    """LOCAL memory a kernel uses, as cuobjdump reports it: registers that did not fit."""
    import re
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", report)
    assert found, report
    return sum(map(int, found))


def test_importing_needs_neither_triton_nor_a_compiler():
    """The package, its ops and a training step on a machine that has neither."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, logging; logging.disable()\n"
        "from hyperllama.kernels import backend\n"
        "backend._library_folders = lambda: []\n"
        "from hyperllama.kernels.rms_norm import rms_norm\n"
        "print(rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum().item())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout.strip() == "8.0", result.stderr[-2000:]
    assert torch.ones(1).item() == 1.0
