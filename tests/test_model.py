"""The Llama against transformers' LlamaForCausalLM: logits, losses and every gradient, to rounding in fp64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.arena import Arena
from hyperllama.model import IGNORE, Llama
from hyperllama.names import logical_tensors
from hyperllama.settings import ModelConfig
from tests.reference import random_ids, random_model, relative_error, shape, their_logits, transformers_llama

CASES = {
    "the paper's family": shape(hidden_size=48, num_heads=3, num_kv_heads=1, head_dim=16, activation="gelu"),
    "silu, untied, all heads": shape(num_kv_heads=4, tie_embeddings=False),
    "gelu_tanh, one kv head": shape(num_kv_heads=1, activation="gelu_tanh"),
    "head_dim apart from hidden / heads": shape(head_dim=12, tie_embeddings=False),
    "rope_theta 500000, eps 1e-6": shape(rope_theta=500000.0, rms_norm_eps=1e-6),
    "one layer, one head": shape(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32),
    "padded vocabulary": shape(unpadded_vocab_size=83),
    "padded vocabulary, untied": shape(unpadded_vocab_size=83, tie_embeddings=False),
    "head factor": shape(lm_head_normalization_factor=2.0),
}
SIZES = {"the paper's family": (2, 13), "one layer, one head": (3, 5), "head factor": (1, 32)}
cases = pytest.mark.parametrize("case", CASES)


def batch(config: ModelConfig, *size: int) -> tuple[Tensor, Tensor]:
    """Ids and targets, some of them ignored."""
    ids, targets = random_ids(config, *size), random_ids(config, *size, seed=2)
    targets.flatten()[3::5] = IGNORE
    return ids, targets


def their_loss_and_gradients(model: Llama, ids: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean cross-entropy, and the gradient of every logical tensor (a tied head's added to the table's)."""
    theirs = transformers_llama(model)
    logits = their_logits(theirs, model.config, ids)
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in theirs.named_parameters()}


def functional_gradients(model: Llama) -> dict[str, Tensor]:
    """`.grad` of the packed weights, under the names of the logical ones."""
    by_memory = {weight.data_ptr(): weight.grad for weight in model.parameters()}
    packed = {name: by_memory[view.data_ptr()] for name, view in model.arena.packed("weights").items()}
    return {t.name: packed[t.packed][t.start : t.start + t.shape[0]] for t in logical_tensors(model.config)}


def check_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) < tolerance, name


@cases
def test_logits_equal_transformers(case):
    model = random_model(CASES[case], torch.float64)
    ids = random_ids(model.config, *SIZES.get(case, (2, 17)))
    with torch.no_grad():
        logits = model.logits(model(ids))
        want = their_logits(transformers_llama(model), model.config, ids)
    valid = model.config.unpadded_vocab_size or model.config.vocab_size
    assert relative_error(logits[..., :valid], want) < 1e-10
    assert bool((logits[..., valid:] == -torch.inf).all())


@cases
def test_loss_and_gradients_equal_transformers_in_functional_form(case):
    model = random_model(CASES[case], torch.float64, functional=True)
    ids, targets = batch(model.config, *SIZES.get(case, (2, 17)))
    loss = model.loss(ids, targets, loss_weight=1 / int((targets != IGNORE).sum()))
    loss.backward()
    want, gradients = their_loss_and_gradients(model, ids, targets)
    assert relative_error(loss, want) < 1e-10
    check_gradients(functional_gradients(model), gradients, 1e-10)


@cases
def test_loss_and_gradients_equal_transformers_through_the_arena(case):
    model = random_model(CASES[case], torch.float64, training=True)
    ids, targets = batch(model.config, *SIZES.get(case, (2, 17)))
    loss = model.loss(ids, targets, loss_weight=1 / int((targets != IGNORE).sum()))
    loss.backward()
    want, gradients = their_loss_and_gradients(model, ids, targets)
    assert relative_error(loss, want) < 1e-10
    check_gradients(model.arena.logical("grad"), gradients, 1e-10)
    assert all(weight.grad is None for weight in model.parameters())


@cases
def test_token_losses_equal_transformers(case):
    model = random_model(CASES[case], torch.float64)
    ids, targets = batch(model.config, 2, 9)
    with torch.no_grad():
        logits = their_logits(transformers_llama(model), model.config, ids)
    want = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    got = model.token_losses(ids, targets)
    assert relative_error(got, want.view(targets.shape)) < 1e-10
    assert bool((got[targets == IGNORE] == 0).all())


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_documents_see_what_they_see_alone(backend):
    model = random_model(shape(), torch.float64, training=True, backend=backend)
    ids, targets = batch(model.config, 2, 12)
    borders = [0, 5, 6, 12, 21, 24]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    with torch.no_grad():
        logits = model.logits(model(ids, cu_seqlens)).flatten(0, 1)
    model.loss(ids, targets, loss_weight=0.1, cu_seqlens=cu_seqlens).backward()
    together = {name: view.clone() for name, view in model.arena.logical("grad").items()}
    model.arena.grad.zero_()
    for start, end in pairwise(borders):
        alone, wanted = ids.flatten()[None, start:end], targets.flatten()[None, start:end]
        with torch.no_grad():
            assert relative_error(logits[start:end], model.logits(model(alone))[0]) < 1e-10
        model.loss(alone, wanted, loss_weight=0.1).backward()
    check_gradients(together, model.arena.logical("grad"), 1e-10)


def test_a_head_factor_is_a_scaling_of_the_logits():
    plain = random_model(shape(), torch.float64)
    divided = random_model(shape(lm_head_normalization_factor=2.0), torch.float64)
    ids = random_ids(plain.config, 2, 7)
    with torch.no_grad():
        assert torch.equal(divided.logits(divided(ids)), plain.logits(plain(ids)) / 2)


def test_z_loss_adds_the_squared_logsumexp():
    model = random_model(shape(), torch.float64, functional=True)
    ids, targets = batch(model.config, 2, 9)
    loss = model.loss(ids, targets, loss_weight=1.0, z_loss=0.01)
    logits = model.logits(model(ids))[targets != IGNORE]
    wanted = functional.cross_entropy(logits, targets[targets != IGNORE], reduction="sum")
    wanted = wanted + 0.01 * logits.logsumexp(-1).square().sum()
    assert relative_error(loss, wanted) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_in_a_compute_dtype_are_no_larger_than_twice_those_of_transformers(dtype):
    model = random_model(CASES["the paper's family"], dtype)
    exact = Llama(model.config, Arena(model.config, torch.float64, "cpu", training=False))
    exact.arena.weights.copy_(model.arena.weights)
    ids = random_ids(model.config, 2, 29)
    with torch.no_grad():
        truth = exact.logits(exact(ids))
        ours = relative_error(model.logits(model(ids)), truth)
        theirs = relative_error(their_logits(transformers_llama(model), model.config, ids), truth)
    assert ours < 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_accumulate_in_fp32_over_micro_batches(dtype):
    model = random_model(shape(), dtype, training=True)
    parts = []
    for seed in (1, 2):
        ids = random_ids(model.config, 2, 9, seed=seed)
        model.arena.grad.zero_()
        model.loss(ids, ids.roll(-1, 1), loss_weight=0.1).backward()
        parts.append((ids, model.arena.grad.clone()))
    model.arena.grad.zero_()
    for ids, _ in parts:
        model.loss(ids, ids.roll(-1, 1), loss_weight=0.1).backward()
    assert model.arena.grad.dtype == torch.float32
    assert relative_error(model.arena.grad, parts[0][1] + parts[1][1]) < 1e-6


def test_a_compiled_functional_model_gives_the_same_loss_and_gradients():
    model = random_model(shape(), torch.float64, functional=True)
    ids, targets = batch(model.config, 2, 9)
    eager = model.loss(ids, targets, loss_weight=0.1)
    eager.backward()
    want = {name: grad.clone() for name, grad in functional_gradients(model).items()}
    model.zero_grad()
    compiled = torch.compile(
        lambda ids, targets: model.loss(ids, targets, loss_weight=0.1), backend="aot_eager", fullgraph=True
    )
    loss = compiled(ids, targets)
    loss.backward()
    assert relative_error(loss, eager) < 1e-10
    check_gradients(functional_gradients(model), want, 1e-10)


def test_initial_weights_are_a_function_of_the_seed_alone():
    config = shape(num_layers=8, unpadded_vocab_size=83, tie_embeddings=False, hidden_size=128, vocab_size=512)
    models = [Llama(config, Arena(config, dtype, "cpu", training=True)) for dtype in (torch.float32, torch.bfloat16)]
    for model in models:
        model.init_weights(3)
    fp32, bf16 = (model.arena.weights for model in models)
    assert torch.equal(fp32.bfloat16(), bf16)
    assert torch.equal(models[1].arena.master, bf16.float())
    models[0].init_weights(4)
    assert not torch.equal(fp32.bfloat16(), bf16)


def test_initial_weights_have_the_stated_spread():
    config = shape(num_layers=8, unpadded_vocab_size=500, tie_embeddings=False, hidden_size=128, vocab_size=512)
    model = Llama(config, Arena(config, torch.float64, "cpu", training=False))
    model.init_weights(3)
    for name, view in model.arena.logical("weights").items():
        if view.dim() == 1:
            assert bool((view == 1).all())
        elif view.shape[0] == config.vocab_size:
            assert bool((view[500:] == 0).all())
            assert float(view[:500].std()) == pytest.approx(0.02, rel=0.05)
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert float(view.std()) == pytest.approx(0.02 / 4 if into_stream else 0.02, rel=0.05)
