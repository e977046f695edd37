"""bench.gpu without a GPU: order, resumption, formulas, judgement, and that its problems run and are right (on the CPU)."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import gpu, gpu_ops, harness, resources
from bench.fake_gpu import fake_gpu
from bench.shapes import SHAPES
from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.backend import GPUS, use

ABOUT = {"device": "a GPU", "torch": "2", "triton": "3", "git": "abc"}
TINY = replace(
    SHAPES["180M"], vocab_size=96, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=16
)


def test_correctness_comes_first_then_the_papers_shapes_where_targets_bind():
    order = gpu.cells()
    ops = len(gpu_ops.PROBLEMS)
    assert len({cell.key for cell in order}) == len(order) == ops + ops * (4 * 3 * 3)
    assert {cell.mode for cell in order[:ops]} == {"correct"}
    binding = order[ops : 3 * ops]
    assert {(c.shape, c.tokens, c.mode) for c in binding} == {("180M", 65536, "cold"), ("572M", 65536, "cold")}
    assert {cell.shape for cell in order[: ops + 2 * 3 * 3 * ops]} == {"180M", "572M"}


def test_it_goes_on_where_it_stopped_and_lists_the_rest(tmp_path):
    path, order, done, clock = tmp_path / "gpu.json", gpu.cells()[:5], [], iter(range(0, 10_000, 40))

    def find_out(cell):
        done.append(cell.key)
        if len(done) == 2:
            raise RuntimeError("out of memory\nand more")
        return {"correct": {"right": True}}

    first = gpu.work(path, ABOUT, 2, find_out, order, lambda: next(clock))
    assert done == [cell.key for cell in order[:2]] and len(gpu.unfinished(first, order)) == 3
    last = gpu.work(path, ABOUT, 9, find_out, order)
    assert done == [cell.key for cell in order] and gpu.unfinished(last, order) == []
    assert gpu.faults(last) == [f"{order[1].key}: RuntimeError: out of memory"]
    with pytest.raises(HyperLlamaError, match="another GPU, commit or version"):
        gpu.work(path, ABOUT | {"git": "def"}, 9, find_out, order)


def test_faults_are_wrong_results_and_missed_targets():
    def speed(met):
        return {"speed": {"targets": [{"met": met}]}}

    cells = {"a": speed(True), "b": speed(None), "c": speed(False), "d": {"correct": {"right": False}}}
    assert [fault[:2] for fault in gpu.faults({"cells": cells})] == ["c:", "d:"]


def test_targets_bind_at_the_papers_shapes_and_are_told_elsewhere():
    def asked(op, shape="180M", tokens=65536, mode="cold"):
        problem = gpu_ops.PROBLEMS[op](SHAPES[shape], tokens)
        return {(t.provider, t.against): t.least for t in gpu.targets(gpu.Cell(op, shape, tokens, mode), problem)}

    shares = {
        "rms_norm": 0.92, "rms_norm backward": 0.88, "rope": 0.90, "rope backward": 0.90, "glu": 0.93, "glu backward": 0.92,
        "softmax_gradient": 0.88, "adamw": 0.93, "grow": 0.92, "remap": 0.92, "merge_linear": 0.92,
    }  # fmt: skip
    for op, share in shares.items():
        assert asked(op)["triton", "copy"] == asked(op)["triton", "copy_triton"] == share
        assert asked(op, tokens=2048)["triton", "copy"] is asked(op, mode="warm")["triton", "copy"] is None
        assert asked(op, "8B")["triton", "copy"] is None
    head = "linear_cross_entropy with backward"
    assert asked(head)["triton", "products"] == 1 / 1.15 and asked(head, "572M")["triton", "products"] == 1 / 1.10
    assert set(asked("linear_cross_entropy epilogue with backward").values()) == {None}
    assert asked("attention")["triton", "flash_attn_3"] == 0.80
    assert asked("attention backward")["triton", "sdpa_cudnn"] == 0.75
    both = asked("attention with backward")
    assert both["auto", "flash_attn_3"] == 0.98 and both["triton", "flash_attn_3"] is None
    assert asked("adamw")["triton", "torch fused"] == 1.0
    assert asked("rms_norm", tokens=2048)["triton", "liger"] == 1.0


def test_traffic_and_flops_are_those_of_the_definitions():
    made = {op: make(SHAPES["180M"], 16384) for op, make in gpu_ops.PROBLEMS.items()}
    t, h, i, v = 16384, 576, 1536, 128256
    assert made["rms_norm"].bytes == 8 * t * h + 6 * h + 4 * t
    assert made["rope"].bytes == 4 * t * (9 + 3) * 64
    assert (made["glu"].bytes, made["glu backward"].bytes) == (6 * t * i, 10 * t * i)
    head = made["linear_cross_entropy with backward"]
    assert (head.flops, head.bytes) == (6 * t * v * h, 4 * t * v)
    assert made["attention"].flops == 2 * t * 2048 * 576
    assert made["attention backward"].flops == 2.5 * made["attention"].flops
    assert made["attention with backward"].flops == 3.5 * made["attention"].flops
    assert made["softmax_gradient"].bytes == 4 * 8192 * v + 13 * 8192
    assert made["adamw"].bytes == 30 * t * h
    assert made["merge_linear"].bytes == 12 * t * h and made["grow"].bytes == 10 * t * h


@pytest.mark.parametrize("op", gpu_ops.PROBLEMS)
def test_every_problem_runs_and_its_plain_torch_is_the_same_op(op, monkeypatch):
    monkeypatch.setattr(gpu_ops, "SEQ_LEN", 32)
    problem = gpu_ops.PROBLEMS[op](TINY, 64)
    inputs = problem.inputs("cpu")
    outputs = gpu.outputs_of(problem, gpu.clones(inputs), "reference")
    assert outputs and all(torch.isfinite(x).all() for x in outputs)
    if problem.plain is not None:
        assert gpu.close(problem.plain(*gpu.clones(inputs)), outputs) is None
        assert gpu.close([2 * x for x in outputs], outputs) is not None
    if not problem.in_place and op not in gpu.ATTENTION_LEAST:
        held = sum(x.nbytes for x in [*inputs, *outputs])
        assert problem.bytes == pytest.approx(held, rel=0.3)


@pytest.mark.parametrize("op", ["attention", "attention backward", "attention with backward", "adamw"])
def test_peers_that_are_torchs_own_do_the_same(op, monkeypatch):
    monkeypatch.setattr(gpu_ops, "SEQ_LEN", 32)
    problem = gpu_ops.PROBLEMS[op](TINY, 64)
    inputs = problem.inputs("cpu")
    expected = gpu.outputs_of(problem, gpu.clones(inputs), "reference")
    peer = problem.peers["torch fused" if op == "adamw" else "auto"]
    once = gpu_ops.timed(peer, gpu.clones(inputs))
    assert gpu.close(once(), expected) is None and len(gpu.flat(once())) == len(expected)


@pytest.mark.parametrize("op", ["rms_norm", "softmax_gradient", "embedding backward"])
def test_every_way_of_timing_runs_and_compares(op, monkeypatch):
    """On the CPU's clock, ours being plain torch here; a cold call goes round clones, whose outputs are not one memory."""
    monkeypatch.setattr(gpu_ops, "SEQ_LEN", 32)
    monkeypatch.setitem(SHAPES, "180M", TINY)
    monkeypatch.setattr(gpu, "FLUSH_BYTES", 1 << 16)
    monkeypatch.setattr(gpu, "use", lambda backend: use("reference"))
    monkeypatch.setattr(gpu, "copy_roofs", lambda traffic, mode: {})
    monkeypatch.setattr(gpu, "targets", lambda cell, problem: ())
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for mode, at_least in (("cold", 2), ("warm", 1)):
        case = gpu.case_of(gpu.Cell(op, "180M", 64, mode), "cpu")
        assert case.calls >= at_least and (mode == "cold" or case.calls == 1)
        found = harness.run(case, rounds=6, min_sample=0)["providers"]
        assert found["triton"]["reason"] is None and found["compiled"]["ratio"], found
    assert gpu.missing([{"providers": found}]) == (
        ["liger_kernel", "quack"] if op == "rms_norm" else ["liger_kernel"] if op == "softmax_gradient" else []
    )


@pytest.mark.parametrize("op", gpu_ops.PROBLEMS)
def test_correctness_is_asked_of_every_dtype(op, monkeypatch):
    """Ours being plain torch here: it is right, and the same twice."""
    monkeypatch.setattr(gpu_ops, "SEQ_LEN", 32)
    monkeypatch.setitem(SHAPES, "180M", TINY)
    monkeypatch.setattr(gpu, "outputs_of", partial(_as_reference, gpu.outputs_of))
    found = gpu.correct(gpu.Cell(op, "180M", 64, "correct"), "cpu")
    assert found["right"] and found["same_bits"]
    fp16 = set() if "epilogue" in op else {"float16"}
    assert {row["dtype"] for row in found["outputs"]} == {"bfloat16", "float32"} | fp16


def _as_reference(original, problem, inputs, backend):
    return original(problem, inputs, "reference")


def test_copies_are_kernels_that_compile_and_no_larger_than_they_need_be():
    """The bytes of a head of 65536 tokens, in parts of which three fit a GPU at once."""
    traffic = 4 * 65536 * 128256
    with fake_gpu(GPUS["sm_90"]) as trace:
        for roof in (roofs := gpu.copy_roofs(traffic, "cold")).values():
            roof.setup()()
    [launch] = trace.launches
    source, target, n = launch.arguments
    assert source.bytes == target.bytes == 4 * n <= gpu.LARGEST_COPY / 2
    assert all(roof.scale * 8 * n == pytest.approx(traffic) for roof in roofs.values())
    found = resources.compiled(resources.specialized(launch, "sm_90"))
    assert not isinstance(found, str), found
    assert (found.wide, found.accesses, found.spilled) == (8, 8, 0)


def test_it_imports_nothing_that_a_bare_gpu_machine_lacks():
    script = (
        "import sys; sys.modules |= dict.fromkeys(['pydantic', 'rich', 'yaml', 'typer', 'safetensors', 'tokenizers', "
        "'transformers', 'matplotlib'])\nimport bench.gpu"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
