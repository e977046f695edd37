"""CUDA tensors that are not there: no sync, few launches, the engine's gradients, the alignment a real launch has."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from bench import workloads
from bench.fake_gpu import HostSync, Pointer, backward, fake_gpu
from bench.shapes import SHAPES
from hyperllama.arena import Arena
from hyperllama.kernels.backend import GPUS
from hyperllama.kernels.rms_norm import rms_norm
from hyperllama.model import Llama
from hyperllama.settings import ModelConfig

SMALL = replace(SHAPES["180M"], vocab_size=1024)  # launches do not depend on it, plain torch's chunks do
# Of a layer with documents, so with our own attention, forward and backward; equal in every version of torch or this is to be
# changed with a reason. 31 in all.
LAYER_KERNELS = {
    "rms_norm._forward_kernel": 2, "rms_norm._backward_kernel": 2, "rope._rope_kernel": 2, "glu._glu_kernel": 2,
    "attention_triton._spans_kernel": 2,  # the table of documents, once a direction
    "attention_triton._forward_kernel": 1, "attention_triton._dq_kernel": 1, "attention_triton._dkv_kernel": 1,
}  # fmt: skip
LAYER_OPERATIONS = {
    "mm": 8, "addmm": 4,  # four linears: y and dx, and dW added to the arena
    "sum": 2, "add_": 2,  # the norms' weights: partial rows, then into the arena
    "zeros": 2,  # rope's flag of wrong positions: kept on a GPU, here no longer than the mode
}  # fmt: skip
# Of plain attention: torch decomposes its fused op here into 31 launches and copies that a GPU does not make. 62 measured, and
# three for another version's decomposition.
LAYER_WITH_SDPA = 65
STEP_LAUNCHES = 48  # look-up, last norm, head, tables, zeroing, whatever the layers; 45 measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("documents", [False, True])
def test_a_training_step_never_waits_for_the_gpu(dtype, documents):
    """Nothing of a step reads a value of the device: it would raise here. So a step can also be captured as a CUDA graph."""
    with fake_gpu(GPUS["sm_90"]) as trace:
        workloads.training_step(SMALL, dtype, 2, documents=documents)
    kernels = Counter(launch.name for launch in trace.launches)
    assert kernels["rms_norm._forward_kernel"] == kernels["rms_norm._backward_kernel"] == 5


def launched(num_layers, documents):
    """Launches of Triton's and of torch's ops, of a forward and backward."""
    with fake_gpu(GPUS["sm_90"]) as trace:
        workloads.gradients(SMALL, torch.bfloat16, 2, num_layers=num_layers, documents=documents)
    return Counter(launch.name for launch in trace.launches), Counter(trace.operations)


def test_a_layer_launches_what_its_ops_need():
    (kernels, operations), (more_kernels, more_operations) = (launched(n, True) for n in (1, 2))
    assert more_kernels - kernels == LAYER_KERNELS
    assert more_operations - operations == LAYER_OPERATIONS
    layer = sum(LAYER_KERNELS.values()) + sum(LAYER_OPERATIONS.values())
    assert kernels.total() + operations.total() - layer <= STEP_LAUNCHES


def test_a_layer_with_torchs_attention_launches_little():
    one, two = (sum(count.total() for count in launched(n, False)) for n in (1, 2))
    assert 0 < two - one <= LAYER_WITH_SDPA


def test_reading_a_value_raises():
    with fake_gpu(GPUS["sm_90"]):
        x = torch.zeros(4, device="cuda")
        for read in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: int(x.argmax()), x.tolist):
            with pytest.raises(DataDependentOutputException):
                read()
        with pytest.raises(DynamicOutputShapeException):
            x.nonzero()
        for read in (x.cpu, lambda: x.to("cpu", non_blocking=True), lambda: torch.zeros(4).copy_(x)):
            with pytest.raises(HostSync):
                read()


def test_gradient_functions_run_as_torchs_engine_runs_them():
    config = ModelConfig(**replace(SMALL, vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=16).settings(2))
    ids, grads = torch.randint(64, (2, 24)), []
    for run in (torch.Tensor.backward, backward):
        arena = Arena(config, torch.float32, "cpu", training=True)
        model = Llama(config, arena)
        model.init_weights(0)
        run(model.loss(ids, ids, loss_weight=1 / 48))
        grads.append(arena.grad)
    assert grads[0].abs().sum() > 0 and torch.equal(*grads)


def test_pointers_are_aligned_as_on_a_gpu():
    with fake_gpu(GPUS["sm_90"]) as trace:
        weight = torch.zeros(577, device="cuda")[1:]
        rms_norm(torch.zeros(64, 576, device="cuda"), weight, 1e-5)
    x, _residual, weight = trace.launches[0].arguments[:3]
    assert isinstance(x, Pointer) and x.data_ptr() % 512 == 0 and x.ptr_range() == 64 * 576 * 4
    assert weight.data_ptr() % 16 == 4
