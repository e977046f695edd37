"""Every operator: shapes, the function kept where that is said, and AdamW's next steps where dynamics are said to be kept."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from hyperllama.arena import Arena
from hyperllama.errors import HyperLlamaError
from hyperllama.grow.folder import grow_folder
from hyperllama.grow.operators import (
    Deepen,
    GrowVocabulary,
    HyperClone,
    Operator,
    RandomCopies,
    grown_config,
    make_operators,
)
from hyperllama.grow.tensors import grow_arena, grow_tensor, grow_through
from hyperllama.model import Llama
from hyperllama.names import EMBEDDING, logical_tensors
from tests.reference import (
    logits,
    random_ids,
    random_model,
    relative_error,
    shape,
    their_logits,
    transformers_llama,
    write,
)

CONFIGS = {
    "tied": shape(num_layers=3),
    "untied": shape(num_layers=3, tie_embeddings=False),
    "MQA, free head_dim, padded": shape(
        hidden_size=30, num_heads=3, num_kv_heads=1, head_dim=12, unpadded_vocab_size=83
    ),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
KEEPS_DYNAMICS = {
    "hyperclone x2": HyperClone(2),
    "hyperclone x3": HyperClone(3),
    "hyperclone x2, FFN x3": HyperClone(2, 3),
    "hyperclone x3, FFN x1": HyperClone(3, 1),
    "dyadic x4": HyperClone(4, split="dyadic"),
    "lemon x2": HyperClone(2, split="uneven"),
    "lemon x3, FFN x2": HyperClone(3, 2, split="uneven"),
    "net2wider x2": RandomCopies(2, seed=1),
    "net2wider x3, FFN x2": RandomCopies(3, 2, seed=2),
    "fpi x2": RandomCopies(2, rule="fpi", seed=3),
    "fpi x3": RandomCopies(3, rule="fpi", seed=4),
}
KEEPS_FUNCTION: dict[str, Operator] = KEEPS_DYNAMICS | {
    "dyadic x3": HyperClone(3, split="dyadic"),
    "dyadic x5, FFN x3": HyperClone(5, 3, split="dyadic"),
    "noise": HyperClone(2, 3, noise_db=10.0),
    "identity x2": Deepen("identity"),
    "identity x3": Deepen("identity", 3),
}
CHANGES_FUNCTION: dict[str, Operator] = {
    "aki": RandomCopies(2, rule="aki"),
    "stack": Deepen("stack"),
    "interleave": Deepen("interleave", 3),
    "solar": Deepen("solar", drop=1),
}


def named(operators):
    return pytest.mark.parametrize("operator", operators.values(), ids=operators)


def grown(model: Llama, operator: Operator) -> Llama:
    config = operator.grown(model.config)
    large = Llama(config, Arena(config, model.arena.dtype, "cpu", training=model.arena.training))
    grow_arena(model.arena, large.arena, operator)
    return large


def factors(large: Arena, operator: Operator, config) -> tuple[torch.Tensor, torch.Tensor]:
    """eps' / eps and lr' / lr of every element of the grown arena."""
    scratch = Arena(large.config, torch.float64, "cpu", training=True)
    scratch.m.fill_(1)  # padding between tensors
    scratch.v.fill_(1)
    eps, lr = scratch.logical("m"), scratch.logical("v")
    for name, how in operator.tensors(config).items():
        rows, cols = how.gradient_factors()
        lr_cols = how.lr_factors()
        if cols is None:
            eps[name].copy_(torch.from_numpy(rows))
        else:
            eps[name].copy_(torch.from_numpy(rows[:, None] * cols))
            lr[name].copy_(torch.from_numpy(lr_cols).expand(eps[name].shape))
    return scratch.m, scratch.v


def adamw(model: Llama, ids: torch.Tensor, step: int, eps=1.0, lr=1.0) -> None:
    """One step in plain torch, eps and lr per element; weight decay is lr times decay, as for the small model."""
    arena = model.arena
    arena.grad.zero_()
    model.loss(ids[:, :-1], ids[:, 1:], loss_weight=1 / ids[:, 1:].numel()).backward()
    arena.m.mul_(0.9).add_(arena.grad, alpha=0.1)
    arena.v.mul_(0.95).addcmul_(arena.grad, arena.grad, value=0.05)
    update = (arena.m / (1 - 0.9**step)) / ((arena.v / (1 - 0.95**step)).sqrt() + 1e-6 * eps)
    with torch.no_grad():
        arena.weights.sub_(1e-2 * (lr * update + 0.1 * arena.weights))


@configs
@named(KEEPS_FUNCTION)
def test_the_function_is_kept(config, operator):
    assert operator.preserves
    model = random_model(config, torch.float64)
    large, ids = grown(model, operator), random_ids(config, 2, 13)
    assert relative_error(logits(large, ids), logits(model, ids)) < 1e-12
    theirs = their_logits(transformers_llama(large), large.config, ids)  # by another program's arithmetic
    assert relative_error(theirs, logits(model, ids)) < 1e-12


@configs
@named(KEEPS_DYNAMICS)
def test_the_next_adamw_steps_are_the_small_models(config, operator):
    model = random_model(config, torch.float64, training=True)
    for step in range(1, 4):  # moments worth carrying
        adamw(model, random_ids(config, 2, 14, seed=step), step)
    large, ids = grown(model, operator), random_ids(config, 2, 13)
    eps, lr = factors(large.arena, operator, config)
    before = logits(model, ids)
    for step in range(4, 9):
        batch = random_ids(config, 2, 14, seed=step)
        adamw(model, batch, step)
        adamw(large, batch, step, eps, lr)
        assert relative_error(logits(large, ids), logits(model, ids)) < 1e-12
    assert relative_error(before, logits(model, ids)) > 1e-2  # the steps went somewhere


def test_shares_on_the_residual_stream_keep_the_function_but_not_the_dynamics():
    model = random_model(CONFIGS["tied"], torch.float64, training=True)
    operator = HyperClone(3, split="dyadic")
    adamw(model, random_ids(model.config, 2, 14), 1)
    large, ids = grown(model, operator), random_ids(model.config, 2, 13)
    assert relative_error(logits(large, ids), logits(model, ids)) < 1e-12
    eps, lr = factors(large.arena, operator, model.config)
    adamw(model, ids, 2)
    adamw(large, ids, 2, eps, lr)
    assert relative_error(logits(large, ids), logits(model, ids)) > 1e-5


@configs
@pytest.mark.parametrize("factor", [3, 5, 6, 7])
def test_dyadic_shares_lose_no_bit_of_bf16(config, factor):
    model, operator = random_model(config, torch.bfloat16), HyperClone(factor, split="dyadic")
    large, exact = grown(model, operator), Llama(config, Arena(config, torch.float64, "cpu", training=False))
    exact.arena.weights.copy_(model.arena.weights)
    wide = Llama(large.config, Arena(large.config, torch.float64, "cpu", training=False))
    wide.arena.weights.copy_(large.arena.weights)
    ids = random_ids(config, 2, 13)
    assert relative_error(logits(wide, ids), logits(exact, ids)) < 1e-12


@configs
@named(KEEPS_FUNCTION | CHANGES_FUNCTION | {"vocabulary": GrowVocabulary(tuple((i % 80,) for i in range(100)))})
def test_tensors_have_the_grown_shape_and_all_roles_follow_it(config, operator):
    model = random_model(config, torch.bfloat16, training=True)
    model.arena.master_from_weights()
    model.arena.m.normal_()
    model.arena.v.uniform_()
    large = grown(model, operator)
    assert list(operator.tensors(config)) == [tensor.name for tensor in logical_tensors(large.config)]
    assert torch.equal(large.arena.weights, large.arena.master.bfloat16())
    sources = model.arena.logical("m")
    for name, how in operator.tensors(config).items():
        rows = how.rows.index() if how.pieces is None else None
        if rows is None or how.upper or how.fresh:
            continue
        wanted = sources[how.source][rows]
        row_factor, col_factor = how.gradient_factors()
        if how.cols is not None:
            wanted = wanted[:, how.cols.index()] * torch.from_numpy(row_factor[:, None] * col_factor)
        else:
            wanted = wanted * torch.from_numpy(row_factor)
        assert relative_error(large.arena.logical("m")[name], wanted) < 1e-6, name


@pytest.mark.parametrize(
    ("operator", "layers"),
    [
        (Deepen("stack", 2), [0, 1, 2, 3, 0, 1, 2, 3]),
        (Deepen("interleave", 2), [0, 0, 1, 1, 2, 2, 3, 3]),
        (Deepen("solar"), [0, 1, 2, 1, 2, 3]),
        (Deepen("solar", drop=2), [0, 1, 2, 3]),
        (Deepen("identity", 2), [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
    ids=str,
)
def test_depth_copies_these_layers(operator, layers):
    model = random_model(shape(num_layers=4), torch.float32)
    small, large = model.arena.logical("weights"), grown(model, operator).arena.logical("weights")
    for new, old in enumerate(layers):
        part = "mlp.gate_proj.weight"
        assert torch.equal(large[f"model.layers.{new}.{part}"], small[f"model.layers.{old}.{part}"])
        inserted = operator.rule == "identity" and new % 2
        assert bool(large[f"model.layers.{new}.mlp.down_proj.weight"].any()) != bool(inserted)
        assert bool(large[f"model.layers.{new}.self_attn.o_proj.weight"].any()) != bool(inserted)


def test_aki_takes_the_rows_of_new_units_from_the_layer_above():
    config = CONFIGS["tied"]
    model, fpi, aki = random_model(config, torch.float32), RandomCopies(2, rule="fpi"), RandomCopies(2, rule="aki")
    small, large = model.arena.logical("weights"), grown(model, aki).arena.logical("weights")
    for name, how in aki.tensors(config).items():
        plain = grow_tensor(name, fpi.tensors(config)[name], small.__getitem__)
        if how.upper is None:
            assert torch.equal(large[name], plain)
            continue
        old = small[name].shape[0]
        assert how.upper == name.replace("layers.0", "layers.1") or "layers.1" in name
        assert torch.equal(large[name][:old], plain[:old])
        scale = torch.from_numpy(how.cols.share()).float()
        wanted = small[how.upper][how.rows.index()[old:]][:, how.cols.index()] * scale
        assert torch.equal(large[name][old:], wanted)


@configs
def test_new_tokens_start_at_the_mean_of_their_pieces(config):
    real = config.unpadded_vocab_size or config.vocab_size
    pieces = (*((i,) for i in reversed(range(real))), (1, 2), (3, 4, 5))
    operator, model = GrowVocabulary(pieces), random_model(config, torch.float64)
    large = grown(model, operator)
    assert (large.config.vocab_size, large.config.unpadded_vocab_size) == (128, real + 2)
    for name in {EMBEDDING, "lm_head.weight"} & operator.tensors(config).keys():
        old, new = model.arena.logical("weights")[name], large.arena.logical("weights")[name]
        assert torch.equal(new[:real], old[:real].flip(0))
        assert torch.allclose(new[real], (old[1] + old[2]) / 2, rtol=1e-15)
        assert torch.allclose(new[real + 1], old[3:6].mean(0), rtol=1e-15)
        assert not new[real + 2 :].any()
    ids = random_ids(config, 2, 13)
    assert relative_error(logits(large, real - 1 - ids)[..., :real].flip(-1), logits(model, ids)) < 1e-14


def test_operators_in_turn_tensor_by_tensor_are_operators_in_turn_model_by_model():
    operators = [HyperClone(2, noise_db=10.0), Deepen("identity"), RandomCopies(2, 3), HyperClone(3)]
    model = random_model(CONFIGS["untied"], torch.float64)
    maps, large = [], model
    for operator in operators:
        maps.append(operator.tensors(large.config))
        large = grown(large, operator)
    assert large.config == grown_config(operators, model.config)
    read = model.arena.logical("weights").__getitem__
    for name, tensor in large.arena.logical("weights").items():
        assert torch.equal(grow_through(maps, name, read), tensor), name
    ids = random_ids(model.config, 2, 13)
    assert relative_error(logits(large, ids), logits(model, ids)) < 1e-12


def test_random_maps_depend_on_the_seed_alone():
    maps = [RandomCopies(3, seed=seed, rule="fpi").tensors(shape()) for seed in (1, 1, 2)]
    for name in maps[0]:
        one, same, other = (how[name].rows.index() for how in maps)
        assert (one == same).all()
        assert name == EMBEDDING or (one != other).any()


def test_an_arena_of_another_shape_is_refused():
    model = random_model(shape(), torch.float32)
    with pytest.raises(HyperLlamaError, match="hyperclone"):
        grow_arena(model.arena, Arena(shape(), torch.float32, "cpu", training=False), HyperClone(2))


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["hyperclon"], {}, "hyperclone"),
        (["net2wider"], {"factor": 1}, "at least 2"),
        (["hyperclone"], {"ffn_factor": 0}, "at least 1"),
        (["net2wider"], {"noise_db": 10.0}, "--noise-db is for hyperclone"),
        (["hyperclone"], {"noise_db": 10.0, "dyadic": True}, "equal shares"),
        (["lemon"], {"dyadic": True}, "--dyadic is for hyperclone"),
        (["stack"], {"factor": 2}, "--factor is for"),
        (["stack"], {"depth_factor": 1}, "--depth-factor is 1"),
        (["solar"], {"depth_factor": 3}, "exactly 2"),
        (["stack"], {"drop": 1}, "--drop is for solar"),
        (["vocabulary"], {}, "--tokenizer"),
        (["hyperclone"], {"pieces": ((0,),)}, "--tokenizer is for vocabulary"),
    ],
)
def test_wrong_options_are_refused(methods, options, message):
    with pytest.raises(HyperLlamaError, match=message):
        make_operators(methods, **options)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Deepen("solar", drop=2), "0 to 1"),
        (GrowVocabulary(((0,),) * 95), "fewer than the model's 96"),
        (GrowVocabulary(((0,),) * 96 + ((96,),)), "pieces of new token 96"),
        (GrowVocabulary(((0,),) * 96 + ((),)), "pieces of new token 96"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_model_is_refused(operator, message):
    with pytest.raises(HyperLlamaError, match=message):
        operator.grown(shape())


def test_plans_need_no_torch():
    code = "import sys, hyperllama.grow.operators; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@configs
@pytest.mark.parametrize(
    "operator", [HyperClone(3, 5, split="dyadic"), RandomCopies(2), Deepen("identity")], ids=lambda o: o.method
)
def test_a_grown_folder_loads_in_transformers_with_the_same_logits(config, operator, tmp_path):
    dtype = torch.bfloat16 if operator.exact else torch.float32
    path = write(random_model(config, dtype), tmp_path / "small")
    assert grow_folder(path, tmp_path / "grown", [operator])["verified"]["preserved"]
    small, large = (LlamaForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("small", "grown"))
    ids = random_ids(config, 2, 13)
    with torch.no_grad():
        assert relative_error(large(ids).logits, small(ids).logits) < 3e-6
