"""Triton's attention compiled ahead of time for a GPU that is not here; its registers are bench.resources' to judge."""

import re

import pytest
import torch

from hyperllama.kernels.attention_triton import Launch, _dkv_kernel, _dq_kernel, _forward_kernel

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkv": _dkv_kernel}
HEADS = {64: (9, 3), 128: (32, 8)}  # of the 180M and 8B models


def compiled(name: str, head: int, dtype: torch.dtype = torch.bfloat16, documents: bool = True):
    """A kernel as it is launched on an H100: aligned pointers, B T a multiple of 16. Other GPUs are bench.resources' to compile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    kernel, tile = KERNELS[name], getattr(Launch.of(head, dtype, "sm_90"), name)
    n, k = HEADS[head]
    constants = {
        "HEADS": n, "KV_HEADS": k, "WIDTH": head, "DEPTH": head, "DOCUMENTS": documents, "PRECISION": "ieee",
        "ROWS": tile.rows, "COLS": tile.cols,
    }  # fmt: skip
    names = kernel.arg_names
    values = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    types = dict.fromkeys(names, "i32") | {name: values for name in names if name.endswith("_ptr")} | {"scale": "fp32"}
    types |= {"lse_ptr": "*fp32", "sums_ptr": "*fp32", "starts_ptr": "*i32", "ends_ptr": "*i32"}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if name.endswith("_ptr")] + ["n_tokens", "seq_len"]
    return compile_kernel(
        ASTSource(
            kernel,
            {name: types[name] for name in names},
            constants,
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", KERNELS)
def test_matrix_instructions_and_wide_loads(name, head):
    kernel = compiled(name, head)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", kernel.asm["ptx"])
    sizes = [int(size, 0) for size in copies]  # tiles come 16 bytes at a time; dkv also loads lse and D, 4 bytes a row
    assert set(sizes) == ({16, 4} if name == "dkv" else {16}) and sizes.count(16) >= 8


@pytest.mark.parametrize("name", KERNELS)
def test_fp32_is_exact(name):
    kernel = compiled(name, 64, torch.float32)
    assert "fma.rn.f32" in kernel.asm["ptx"] and "mma" not in kernel.asm["ptx"]  # a matrix unit would round to tf32


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_offsets_that_grow_with_the_tokens_are_64_bit(name, documents):
    """A tile's place passes 2^31 at 2.2 million tokens of the 180M model; only places within a tile may be 32-bit."""
    code = compiled(name, 64, documents=documents).asm["ttir"]
    places = dict(re.findall(r"(%\w+) = tt\.addptr %\w+, %\w+ : !tt\.ptr<\w+>, (i\d+)", code))
    tiles = re.findall(r"tt\.splat (%\w+) : !tt\.ptr<\w+> -> tensor<\d+x\d+x!tt\.ptr<\w+>>", code)
    assert tiles and {places[tile] for tile in tiles} == {"i64"}
    # what is added to a tile's place: multiples of the row length by a range, nothing that a program's number is in
    inside = re.findall(r"tt\.addptr %\w+, (%\w+) : tensor<\d+x\d+x!tt\.ptr<\w+>>", code)
    assert inside and not any(comes_from(offset, "tt.get_program_id", code) for offset in inside)


def comes_from(value: str, operation: str, code: str) -> bool:
    """Whether `operation` is among those that `value` is computed from."""
    found = re.search(rf"^\s*{value} = (\S+)(.*)$", code, re.M)
    if found is None:  # an argument, or a loop's
        return True
    if found[1] == operation:
        return True
    return any(comes_from(name, operation, code) for name in re.findall(r"%\w+", found[2].partition(" : ")[0]))
