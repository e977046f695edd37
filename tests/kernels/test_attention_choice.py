"""The choice of an attention backend: checked against fp64, timed, the fastest that is right; a run keeps what it chose."""

import json
from types import SimpleNamespace

import pytest
import torch

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import attention_choice as choice
from hyperllama.kernels.attention_choice import Measured, Problem, measure, pick, table
from hyperllama.train import attention as of_runs
from hyperllama.train.distributed import Processes

ROWS = [
    Measured("xformers", 1.0, 2.0, 1.1),
    Measured("triton", 2.0, 3.0, 0.9),
    Measured("flash_attn_2", 2.0, 4.0, 1.0),
    Measured("sdpa_cudnn", 0.1, 0.1, 7.0, "its error is 7.0 times that of plain torch; 2 is allowed"),
    Measured("flash_attn_3", problem="needs flash_attn_interface, which can't be imported"),
]


def problem(dtype=torch.float32, documents=False, seq_len=24):
    return Problem(2, seq_len, 4, 2, 16, dtype, torch.device("cpu"), documents)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_of_a_cpu_passes_and_is_timed(dtype, documents):
    rows = measure(problem(dtype, documents), ("csrc", "sdpa", "sdpa_flash", "reference", "triton", "flash_attn_2"))
    by_name = {row.backend: row for row in rows}
    for name in ("csrc", "sdpa", "reference"):
        row = by_name[name]
        assert row.problem is None and row.error <= 2 and row.forward_ms > 0 and row.backward_ms > 0
    assert by_name["triton"].problem == by_name["flash_attn_2"].problem == "needs CUDA tensors; these are on cpu"
    assert (by_name["sdpa_flash"].problem == "takes no documents") == documents
    times = [row.milliseconds for row in rows]
    assert times == sorted(times) and pick(rows, deterministic=False) == rows[0].backend


def test_the_check_shares_no_path_with_what_it_checks():
    """Its output and gradient, put together from groups, are those of the whole."""
    made = problem(documents=True)
    check = choice._Check(made)
    qkv = check.qkv.double().requires_grad_()
    out = choice.forward_reference(qkv, 4, 2, check.borders)[0]
    torch.testing.assert_close(check.truth[0], out.detach())
    torch.testing.assert_close(check.truth[1], torch.autograd.grad(out, qkv, check.dy.double())[0])
    assert check.borders[0] == 0 and check.borders[-1] == 24 and len(check.borders) > 2


@pytest.mark.parametrize("fault", ["output", "gradient", "documents", "nan"])
def test_a_backend_that_is_wrong_is_not_chosen(fault, monkeypatch):
    right = choice.attention

    def attention(qkv, n, k, *, cu_seqlens, backend):
        if backend != "sdpa":
            return right(qkv, n, k, cu_seqlens=cu_seqlens, backend=backend)
        out = right(qkv, n, k, cu_seqlens=None if fault == "documents" else cu_seqlens, backend=backend)
        if fault == "gradient":
            return out.detach() + 1.01 * (out - out.detach())
        return out * {"output": 1.01, "nan": float("nan")}.get(fault, 1)

    monkeypatch.setattr(choice, "attention", attention)
    rows = measure(problem(torch.bfloat16, documents=True), ("csrc", "sdpa"))
    assert rows[1].backend == "sdpa" and "times that of plain torch; 2 is allowed" in rows[1].problem
    assert pick(rows, deterministic=False) == "csrc"


def test_a_backend_that_fails_is_told_and_not_chosen(monkeypatch):
    right = choice.attention

    def attention(qkv, n, k, *, cu_seqlens, backend):
        if backend == "sdpa":
            raise TypeError("unexpected keyword argument\nand more")
        return right(qkv, n, k, cu_seqlens=cu_seqlens, backend=backend)

    monkeypatch.setattr(choice, "attention", attention)
    rows = measure(problem(), ("csrc", "sdpa"))
    assert rows[1] == Measured("sdpa", problem="failed: unexpected keyword argument")


def test_the_fastest_that_may_be_used_is_picked():
    assert pick(ROWS, deterministic=False) == "xformers"


def test_where_bits_are_promised_no_clock_decides():
    assert pick(ROWS, deterministic=True) == "flash_attn_2"  # triton is faster here, xformers the fastest
    with pytest.raises(HyperLlamaError, match=r"auto found no deterministic backend: sdpa_cudnn its error is 7.0"):
        pick([ROWS[0], ROWS[3]], deterministic=True)


def test_the_table_names_what_was_chosen_and_why_not_the_others():
    lines = table(ROWS, "xformers").splitlines()
    assert lines[1].split() == ["xformers", "1.000", "2.000", "1.10", "chosen"]
    assert " ".join(lines[5].split()) == "flash_attn_3 needs flash_attn_interface, which can't be imported"


# ---- of a run


class Run:
    """A plan, on a device that only pretends: nothing is computed on it."""

    def __init__(self, out, attention="auto", dtype=torch.bfloat16):
        self.dtype = dtype
        self.model, self.growth = SimpleNamespace(num_heads=4, num_kv_heads=2, head_dim=16), None
        data = SimpleNamespace(seq_len=24, documents="across")
        self.config = SimpleNamespace(out=str(out), attention=attention, micro_batch=2, data=data)


def on(device):
    return Processes(0, 1, torch.device(device))


def test_a_run_measures_once_and_goes_on_with_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(of_runs, "measure", lambda problem: ROWS)
    record = of_runs.attention_backend(Run(tmp_path), on("meta"), quiet=False)
    assert record["backend"] == "xformers" and record["measured"][1]["forward_ms"] == 2.0
    assert "chosen" in capsys.readouterr().err
    (tmp_path / "attention.json").write_text(json.dumps(record | {"backend": "sdpa"}))
    monkeypatch.setattr(of_runs, "measure", None)
    assert of_runs.attention_backend(Run(tmp_path), on("meta"), quiet=True)["backend"] == "sdpa"


def test_a_run_that_grows_measures_both_shapes(tmp_path, monkeypatch):
    heads = []

    def measured(problem):
        heads.append(problem.num_heads)
        return ROWS

    monkeypatch.setattr(of_runs, "measure", measured)
    run = Run(tmp_path)
    run.growth = SimpleNamespace(model=SimpleNamespace(num_heads=8, num_kv_heads=4, head_dim=16))
    record = of_runs.attention_backend(run, on("meta"), quiet=True)
    assert heads == [4, 8] and record["backend"] == record["grown"]["backend"] == "xformers"
    (tmp_path / "attention.json").write_text(json.dumps({"backend": "sdpa", "grown": {"backend": "reference"}}))
    monkeypatch.setattr(of_runs, "measure", None)
    again = of_runs.attention_backend(run, on("meta"), quiet=True)
    assert (again["backend"], again["grown"]["backend"]) == ("sdpa", "reference")


def test_a_record_that_names_nothing_known_is_refused(tmp_path):
    (tmp_path / "attention.json").write_text('{"backend": "magic"}')
    with pytest.raises(HyperLlamaError, match=r"attention\.json: backend is 'magic'; one of reference, sdpa"):
        of_runs.attention_backend(Run(tmp_path), on("meta"), quiet=True)


def test_a_cpu_does_not_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(of_runs, "measure", None)
    assert of_runs.attention_backend(Run(tmp_path), on("cpu"), quiet=True) == {"backend": "csrc"}
    assert of_runs.attention_backend(Run(tmp_path, dtype=torch.float16), on("cpu"), quiet=True) == {"backend": "sdpa"}
    assert of_runs.attention_backend(Run(tmp_path, "reference"), on("cpu"), quiet=True) == {"backend": "reference"}


def test_a_backend_that_can_not_run_here_is_refused(tmp_path):
    with pytest.raises(
        HyperLlamaError, match="attention: attention backend triton needs CUDA tensors; these are on cpu"
    ):
        of_runs.attention_backend(Run(tmp_path, "triton"), on("cpu"), quiet=True)
