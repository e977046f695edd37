"""Micro-batches that are compiled or replayed give what plain ones give."""

import gc
import shutil
from functools import partial

import pytest
import torch
import torch._inductor.config

from hyperllama.errors import HyperLlamaError
from hyperllama.memory import no_collections
from hyperllama.train import micro
from hyperllama.train.distributed import Processes
from hyperllama.train.graphs import WARM_UP
from hyperllama.train.loop import train
from hyperllama.train.micro import Graphed, MicroStep
from hyperllama.train.parallel import exchange
from tests.reference import random_ids, random_model, shape
from tests.study import run_config, settings
from tests.train.test_loop import metrics

ONE = Processes(0, 1, torch.device("cpu"))


def test_a_compiled_run_has_the_losses_of_a_plain_one(study, tmp_path, monkeypatch):
    """In one graph, by inductor where there is a C++ compiler for it, else by autograd's graphs alone.

    Same operations in fp32 in another order of sums: a hundred roundings, 3e-7 measured.
    """
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    monkeypatch.setattr(micro.torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no processes that outlive the test
    for name, compiled in (("plain", False), ("compiled", True)):
        train(run_config(study, tmp_path / name, compile=compiled, budget={"windows": 40}), quiet=True)
    for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_replayed_micro_batches_have_the_bits_of_plain_ones(records):
    """Of the recorded shape and weight; others run as they stand, and the arena gets the gradients of all."""
    models = [random_model(shape(), torch.float32, training=True) for _ in range(2)]
    plain, replayed = (
        kind(m, exchange(m.arena, ONE), 0.0) for kind, m in zip((MicroStep, Graphed), models, strict=True)
    )
    borders = torch.tensor([0, 5, 16, 32], dtype=torch.int32)
    kinds = [(2, None, 0.1)] * WARM_UP + [(1, None, 0.1)] + [(2, None, 0.1)] * 3  # one that is smaller is not recorded
    kinds += [(1, None, 0.1), (2, borders, 0.1), (2, None, 0.2), (2, None, 0.1)]
    for i, (rows, cut, weight) in enumerate(kinds):
        ids = random_ids(models[0].config, rows, 17, seed=i)
        a, b = (step(ids[:, :-1], ids[:, 1:], cut, weight) for step in (plain, replayed))
        assert torch.equal(a, b)
    assert torch.equal(models[0].arena.grad, models[1].arena.grad)
    assert len(records) == 1 and replayed.ids.shape == (2, 16)


def test_a_micro_batch_during_which_processes_talk_is_not_replayed(records):
    model = random_model(shape(), torch.float32, training=True)
    between = exchange(model.arena, Processes(0, 2, torch.device("cpu")))
    step, ids = Graphed(model, between, 0.0), random_ids(model.config, 2, 17)
    between.last = True
    for _ in range(WARM_UP + 2):
        step(ids[:, :-1], ids[:, 1:], None, 0.1)
    assert not records
    between.last = False
    for _ in range(WARM_UP + 2):
        step(ids[:, :-1], ids[:, 1:], None, 0.1)
    assert len(records) == 1


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"compile": True, "parallel": "fsdp"}, "compile and parallel: fsdp do not go together"),
        ({"compile": True, "activation_checkpointing": True}, "compile and activation_checkpointing"),
        ({"cuda_graphs": True, "parallel": "fsdp"}, "cuda_graphs replays nothing with parallel: fsdp"),
        ({"cuda_graphs": True, "data": {"mask_document_start": True}}, "nothing with data.mask_document_start"),
        ({"cuda_graphs": True, "device": "cpu"}, "cuda_graphs: this run has no CUDA device"),
    ],
)
def test_what_can_not_be_recorded_or_compiled_is_refused(study, tmp_path, changes, sentence):
    data = settings(study, tmp_path)["data"] | changes.get("data", {})
    with pytest.raises(HyperLlamaError, match=sentence):
        train(run_config(study, tmp_path / "run", **changes | {"data": data}), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_leaves_no_tensor_to_the_garbage_collector(recompute):
    """Which stands still in the loop: a cycle that held a tensor would hold its memory."""
    model = random_model(shape(), torch.float32, training=True, recompute=recompute)
    step, ids = MicroStep(model, exchange(model.arena, ONE), 0.0), random_ids(model.config, 2, 17)
    step(ids[:, :-1], ids[:, 1:], None, 0.1)
    with no_collections():
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(3):
                step(ids[:, :-1], ids[:, 1:], None, 0.1)
            gc.collect()
            assert not [kept for kept in gc.garbage if isinstance(kept, torch.Tensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
    assert gc.isenabled()
