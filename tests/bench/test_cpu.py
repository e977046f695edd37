"""The CPU benchmark: every kind of case runs, transformers and we do the same work, and missed targets are an exit code.

Nothing here is about speed.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperllama.bench import cpu, harness, ops, training, worker
from hyperllama.bench.harness import Case, run
from hyperllama.kernels import backend

SMALL = cpu.llama(64, 96, 2, 4, 2, 16, 128, 32)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ops.dtype_name)
FEW = ("transformers", "csrc", "reference")  # no compiled provider: it is the same model, and takes half a minute


def once(case: Case) -> dict[str, Any]:
    result = run(case, rounds=1, warmup=0, min_sample=0.0)
    json.dumps(result)
    return result


def right(result: dict[str, Any]) -> list[str]:
    """The providers that ran, all with a passed check; csrc may be missing, but never wrong."""
    for name, found in result["providers"].items():
        assert found["reason"] is None or (name == "csrc" and re.match("HyperLlamaError", found["reason"])), found
    return [name for name, found in result["providers"].items() if found["samples"]]


@pytest.mark.parametrize("name", ops.MEMORY_BOUND)
def test_every_op_agrees_with_its_reference_beside_a_copy_of_as_many_bytes(name: str) -> None:
    make, dtypes = ops.MEMORY_BOUND[name]
    for dtype in dtypes:
        case = make(SMALL, dtype, 1 << 16)
        assert type(case.bytes) is int and 1 << 16 <= case.bytes < 1 << 18 and case.flops == 0
        result = once(case)
        assert {"reference", "copy"} <= set(right(result))
        [target] = result["targets"]
        assert (target["provider"], target["against"]) == ("csrc", "copy")
        assert (target["measured"] is None) == (not result["providers"]["csrc"]["samples"])
        if name == "softmax_gradient":
            assert target["least"] is target["met"] is None
        else:
            assert 0 < target["least"] <= 1 and (target["met"] is None) == (target["measured"] is None)


def test_least_traffic_counts_every_tensor_once_and_ties_both_its_passes() -> None:
    rows, width = 64, SMALL.hidden_size

    def of(name: str, row_bytes: int) -> int:
        return ops.MEMORY_BOUND[name][0](SMALL, torch.float32, rows * row_bytes).bytes

    assert of("glu forward", 4 * 3 * SMALL.intermediate_size) == rows * 4 * 3 * SMALL.intermediate_size
    assert of("rms_norm forward", 4 * 4 * width) == rows * 4 * 4 * width + 4 * width + 4 * rows
    assert of("merge_linear", 4 * 6 * width) == rows * 4 * 6 * width
    assert of("merge_task_arithmetic", 4 * 7 * width) == rows * 4 * 7 * width
    assert of("merge_ties", 4 * 13 * width) == rows * 4 * 13 * width
    assert of("grow", 4 * 5 * width) == rows * 4 * 5 * width
    assert of("grad_norm", 4) == rows * 4 and of("adamw", 28) == rows * 28


def test_an_op_without_cpp_is_not_timed_as_if_it_had_some() -> None:
    assert not ops.calls_csrc(lambda: torch.ones(3))
    with pytest.raises(Exception, match="no C"):
        ops.providers(lambda: lambda: torch.ones(3))["csrc"]()
    if backend.library() is not None:
        x = torch.ones(4, 8)
        assert all(ops.calls_csrc(lambda: ops.OPS.rms_norm(x, None, x[0], 1e-5)) for _ in range(2))


def test_errors_of_another_shape_or_with_nan_are_infinite() -> None:
    x = torch.ones(3)
    assert (
        ops.relative_error(x, x) == 0 and ops.relative_error(x[:2], x) == ops.relative_error(x / 0 * 0, x) == torch.inf
    )
    assert ops.close(0.1)((x, x), (x, x)) is None and "relative error 1" in str(ops.close(0.1)(x, 2 * x - 0.5 * 3))


@BOTH
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_attention_counts_the_pairs_that_are_seen(dtype: torch.dtype, documents: bool, backward: bool) -> None:
    case = ops.attention_case(2, 32, 4, 2, 8, dtype, documents=documents, backward=backward)
    pairs = 2 * sum(n * (n + 1) // 2 for n in ((4, 8, 2, 18) if documents else (32,)))
    assert case.flops == (12 if backward else 4) * 4 * 8 * pairs and case.bytes > 0
    result = once(case)
    assert "sdpa" in right(result)
    assert [target["least"] for target in result["targets"]] == [2.0 if backward else None]


@BOTH
def test_the_head_stands_beside_its_products_alone(dtype: torch.dtype) -> None:
    case = ops.linear_cross_entropy_case(48, SMALL, dtype)
    assert case.flops == 6 * 48 * SMALL.vocab_size * SMALL.hidden_size
    result = once(case)
    assert {"reference", "gemms"} <= set(right(result))
    assert result["targets"][0]["least"] == pytest.approx(1 / 1.15)


@BOTH
def test_transformers_and_ours_take_the_same_step(dtype: torch.dtype) -> None:
    targets = {"transformers": 2.0, "transformers compiled": None, "matmul": 0.5}
    case = training.step_case("small", SMALL, 2, dtype, targets, FEW, None)
    assert case.reference == "transformers" and type(case.flops) is int and case.flops > 0
    assert case.roofs["matmul"].scale == case.flops / (2 * training.MATMUL**3)
    result = once(case)
    assert {"transformers", "reference", "matmul"} <= set(right(result))
    assert result["providers"]["reference"]["ratio"]["median"] > 0
    assert [(target["against"], target["least"]) for target in result["targets"]] == [
        ("transformers", 2.0),
        ("matmul", 0.5),
    ]
    assert "tokens" in result["params"] and result["params"]["tokens"] == 64


def test_providers_stay_together_over_several_steps() -> None:
    case = training.step_case("small", SMALL, 2, torch.float32, {}, FEW[:2], None)
    theirs, ours = (setup() for setup in case.providers.values())
    for _ in range(5):
        want, got = theirs(), ours()
    assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-4) and float(want.loss) < 4.8


@pytest.mark.parametrize("wrong", ["loss", "norm", "gradient"])
def test_a_step_that_is_other_mathematics_fails_the_check(wrong: str) -> None:
    case = training.step_case("small", SMALL, 2, torch.float32, {}, FEW[:1], None)
    step = case.providers["transformers"]()()
    gradients = {name: value * (1.01 if wrong == "gradient" else 1) for name, value in step.gradients().items()}
    other = training.Step(
        step.loss * (1.01 if wrong == "loss" else 1), step.norm * (1.01 if wrong == "norm" else 1), lambda: gradients
    )
    assert case.check is not None and case.check(step, step) is None
    assert str(case.check(other, step)).startswith(f"the first {'gradient norm' if wrong == 'norm' else wrong}")


def test_providers_that_do_not_fit_into_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = training.step_case("small", SMALL, 2, torch.float32, {}, FEW, None)
    # transformers: four buffers, logits and twice as much in fp32; ours four buffers; both activations
    most = 2 * 4 * 4 * SMALL.num_parameters + 12 * 64 * SMALL.vocab_size + 2 * 4 * 64 * 2 * (12 * 64 + 4 * 96)
    monkeypatch.setattr(training, "MEMORY", most)
    providers = once(case)["providers"]
    assert providers["transformers"]["samples"] and providers["csrc"]["samples"]
    assert str(providers["reference"]["reason"]).startswith("MemoryError")


def test_steps_in_processes_of_their_own_are_the_same_steps() -> None:
    alone, here = (
        training.step_case("small", SMALL, 2, torch.float32, {}, FEW[1:2], malloc) for malloc in ("users", None)
    )
    apart, step = alone.providers["csrc"](), here.providers["csrc"]()
    for _ in range(2):
        got, want = apart(), step()
        assert got.loss == want.loss and got.norm == want.norm
    assert alone.check is not None and alone.check(got, want) is None


def test_a_worker_says_what_went_wrong() -> None:
    with pytest.raises(worker.WorkerError, match=r"^ValueError: first line$"):
        worker.apart(broken, keep=False)
    ask = worker.apart(breaking, keep=True)
    for _ in range(2):
        with pytest.raises(worker.WorkerError, match=r"^ValueError: first line$"):
            ask("run")
    assert ask("pass") == 1


def broken() -> dict[str, Any]:
    raise ValueError("first line\nsecond line")


def breaking() -> dict[str, Any]:
    return {"run": broken, "pass": partial(int, "1")}


def test_every_job_has_a_name_of_its_own_and_quick_leaves_some_out() -> None:
    jobs = [*cpu.step_jobs(quick=False), *cpu.op_jobs()]
    assert len({job.name for job in jobs}) == len(jobs) > 50
    assert {job.name for job in jobs if not job.quick} >= {"step 180M 2048 bfloat16"}
    assert cpu.M180.num_parameters == 180_078_912 and 14e6 < cpu.M15.num_parameters < 16e6


@pytest.mark.parametrize(("seconds", "code"), [(0.5, 0), (2.0, 1)], ids=["met", "missed"])
def test_exit_code_and_file_tell_a_missed_target(
    seconds: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(case: Case, **options: Any) -> dict[str, Any]:
        target = harness._judged(
            case.targets[0],
            {"csrc": {"samples": [seconds], "reason": None}, "copy": {"samples": [1.0], "reason": None}},
            comparable=True,
        )
        return {**real(case, **{**options, "rounds": 1}), "targets": [target]}

    real = harness.run
    make = partial(ops.MEMORY_BOUND["glu forward"][0], SMALL, torch.float32, 1 << 12)
    monkeypatch.setattr(cpu, "run", fake)
    monkeypatch.setattr(cpu, "op_jobs", lambda: [cpu.Job("glu", make, 1, 1), cpu.Job("slow glu", make, 1, 0)])
    monkeypatch.setattr(cpu, "keep_freed_blocks", lambda: True)
    monkeypatch.setattr(cpu, "copy_bandwidth", dict)
    monkeypatch.setattr(cpu, "matmul_rate", lambda **_: {})
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--quick", "--only", "glu", "--out", str(tmp_path)])
    assert cpu.main() == code
    told = capsys.readouterr()
    assert "csrc >= 0.8 x copy" in told.out and ("NO" in told.out) == bool(code)
    assert "[1/1] glu ..." in told.err and "left out" in told.out and "slow glu" in told.out
    [file] = tmp_path.glob("*/cpu.json")
    assert harness.read_results(file)["results"][0]["targets"][0]["met"] is (code == 0)


def test_an_interrupt_keeps_what_was_measured() -> None:
    saved: list[int] = []

    def interrupt() -> Case:
        raise KeyboardInterrupt

    make = partial(ops.MEMORY_BOUND["grow"][0], SMALL, torch.float32, 1 << 12)
    with pytest.raises(KeyboardInterrupt):
        cpu.measure(
            [cpu.Job("a", make, 1, 1), cpu.Job("b", interrupt, 1, 1)], True, lambda done: saved.append(len(done))
        )
    assert saved == [1]
