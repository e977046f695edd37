"""The resource gate passes here, and fails on regressions made on purpose."""

import re

import pytest
import torch

from bench import resources
from bench.fake_gpu import fake_gpu
from bench.shapes import SHAPES
from bench.workloads import softmax_in_epilogue
from hyperllama.kernels import rms_norm
from hyperllama.kernels.backend import GPUS, constexpr, jit, tl

FINE = resources.Figures(registers=64, spilled=0, shared=0, accesses=10, wide=10, widest=128, matrix="wgmma")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def test_every_kernel_is_within_its_limits_and_its_baseline():
    versions = resources.read_baseline()
    measured = resources.measure(resources.TARGETS)
    assert len(measured) > 50
    assert resources.check(measured, versions.get(resources.triton.__version__)) == []


def judge(run, target="sm_90", baseline=None):
    """Sentences on the last launch of `run`."""
    with fake_gpu(GPUS[target]) as trace:
        run()
    build = resources.specialized(trace.launches[-1], target)
    return build, resources.compiled(build), lambda known: resources.judged(build, resources.compiled(build), known)


def norm(width=576):
    return lambda: rms_norm.rms_norm(
        torch.zeros(4096, width, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(width, dtype=torch.bfloat16, device="cuda"), 1e-5,
    )  # fmt: skip


def test_a_row_stride_that_is_not_aligned_is_caught():
    known, before, _ = judge(norm())
    _, after, judged = judge(norm(577))
    assert before.wide == 9 and after.wide < before.wide
    [sentence] = judged(None) if not after.wide else judged({known.name: before})[-1:]
    assert "rms_norm._forward_kernel" in sentence and "sm_90" in sentence and "128" in sentence


def test_one_warp_for_a_huge_block_is_caught(monkeypatch):
    launch = rms_norm.Launch(rows=16, cols=1024, warps=1, programs=264)
    monkeypatch.setattr(rms_norm, "_launch", lambda x: launch)
    build, found, judged = judge(norm())
    assert found.spilled > 0
    assert judged(None)[0].startswith(f"{build.name}: spills {found.spilled} bytes a thread")


def test_offsets_of_rows_are_of_64_bits():
    """Rows times columns may pass 2^31."""
    build, _, _ = judge(norm())
    ttir = resources.assembled(build).asm["ttir"]
    offsets = re.findall(r"tt\.addptr .*tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+x(i\d+)>", ttir)
    assert offsets and set(offsets) == {"i64"}


def test_offsets_of_a_heads_tiles_are_of_64_bits():
    """Tokens times vocabulary pass 2^31 in every chunk; only places within a tile may be of 32 bits."""
    with fake_gpu(GPUS["sm_90"]) as trace:
        softmax_in_epilogue(SHAPES["180M"], torch.bfloat16, True)
    launches = {launch.kernel.__name__: launch for launch in trace.launches}
    assert set(launches) == {"_guess_kernel", "_product_kernel", "_finish_kernel", "_rescale_kernel"}
    for launch in launches.values():
        code = resources.assembled(resources.specialized(launch, "sm_90")).asm["ttir"]
        whole = re.findall(r"(%\w+) = tt\.splat %\w+_ptr : !tt\.ptr<\w+> -> tensor<\d+x\d+x", code)  # blocks' bases
        blocks = re.findall(r"tt\.addptr (%\w+), %\w+ : tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+x(i\d+)>", code)
        places = [width for base, width in blocks if base in whole]
        places += re.findall(r"tt\.addptr %(?:x|weight|u)_ptr, %\w+ : !tt\.ptr<bf16>, (i\d+)", code)
        assert places and set(places) == {"i64"}, launch.name


@jit
def _product_kernel(a_ptr, b_ptr, out_ptr, TILE: constexpr):
    at = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def product(tile):
    def run():
        a = torch.zeros(tile, tile, dtype=torch.bfloat16, device="cuda")
        _product_kernel[(1,)](a, a, a.float(), TILE=tile, num_warps=4)

    return run


@pytest.mark.parametrize(("target", "kind", "less"), [("sm_90", "wgmma", "mma"), ("sm_100", "tcgen05", "mma")])
def test_tiles_too_small_for_the_newest_matrix_instructions_are_caught(target, kind, less):
    known, before, _ = judge(product(64 if target == "sm_90" else 128), target)
    _, after, judged = judge(product(16), target)
    assert (before.matrix, after.matrix) == (kind, less)
    assert judged({known.name: before})[-1].endswith(f"its products are {less}, {kind} in the baseline")


def test_matrix_instructions_and_widths_are_read_on_every_target():
    kinds = {target: judge(product(64), target)[1] for target in ("sm_80", "gfx942")}
    assert {target: found.matrix for target, found in kinds.items()} == {"sm_80": "mma", "gfx942": "mfma"}
    assert all(found.widest == 128 for found in kinds.values())


def test_sentences_have_both_figures():
    build, _, _ = judge(norm())
    worse = resources.Figures(registers=255, spilled=8, shared=300_000, accesses=10, wide=4, widest=128, matrix="mma")
    text = "\n".join(resources.judged(build, worse, {build.name: FINE}))
    for part in ("spills 8 bytes", "uses 300000 bytes of shared memory, the device has 232448", "40% of", "100% were"):
        assert part in text
    assert "products are mma, wgmma in the baseline" in text
    assert (
        "widest access is of 64 bits"
        in resources.judged(build, resources.Figures(32, 0, 0, 10, 0, 64, "wgmma"), None)[0]
    )
    assert resources.judged(build, FINE, None) == resources.judged(build, FINE, {build.name: FINE}) == []
    assert "not in the baseline" in resources.judged(build, FINE, {})[0]


def test_kernels_that_no_launch_reaches_are_named():
    assert "rms_norm._forward_kernel" in resources.unreached([])
    build, _, _ = judge(norm())
    assert "rms_norm._forward_kernel" not in resources.unreached([build])


def test_a_baseline_is_one_line_a_launch_and_reads_back(tmp_path):
    path = tmp_path / "resources.json"
    resources.write_baseline({"3.9.0": {"b": FINE, "a": FINE}, "3.6.0": {}}, path)
    assert [line.split(":")[0].strip() for line in path.read_text().splitlines() if "registers" in line] == [
        '"a"',
        '"b"',
    ]
    assert resources.read_baseline(path) == {"3.6.0": {}, "3.9.0": {"a": FINE, "b": FINE}}
