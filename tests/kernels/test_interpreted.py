"""Triton's kernels without a GPU: values under its interpreter, resources and offsets by compiling ahead of time."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hyperllama.kernels.rms_norm import Launch, _backward_kernel, _forward_kernel

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


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


@pytest.mark.parametrize("n_cols", [576, 1152, 2048, 4096])
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "flag"), [(_forward_kernel, "HAS_RESIDUAL"), (_backward_kernel, "HAS_DSTREAM")])
def test_kernels_compile_for_gpus_without_spills(kernel, flag, n_cols, target):
    """Aligned bf16 pointers and, as at every model size, a width divisible by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    launch = Launch.of(131072, n_cols, 132)
    names = kernel.arg_names
    constants = {flag: True, "ROWS": launch.rows, "COLS": launch.cols}
    types = dict.fromkeys(names, "i32") | {name: "*bf16" for name in names if name.endswith("_ptr")}
    types |= {"rstd_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if name.endswith("_ptr")] + ["n_cols"]
    compiled = compile_kernel(
        ASTSource(
            kernel,
            {name: types[name] for name in names},
            constants,
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": launch.warps},
    )
    assert re.search(r"ld\.global\S*\.v[48]\.", compiled.asm["ptx"]), "rows are read 128 bits at a time"
    # rows x columns may pass 2^31: the offsets of every block of rows are 64-bit
    offsets = re.findall(r"tt\.addptr .*tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+x(i\d+)>", compiled.asm["ttir"])
    assert offsets and set(offsets) == {"i64"}
    assert spilled_bytes(compiled.asm["cubin"]) == 0


def spilled_bytes(cubin: bytes) -> int:
    """STACK and LOCAL memory a kernel uses, as cuobjdump reports it: registers that did not fit."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", report)
    assert found, report
    return sum(map(int, found))
