"""HyperCloning: the published tool's tensors bit for bit, and a function that stays the same."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from hyperllama.arena import Arena
from hyperllama.errors import HyperLlamaError
from hyperllama.files import read_json
from hyperllama.flops import window_flops
from hyperllama.grow.folder import grow_folder, plan_growth
from hyperllama.grow.operators import HyperClone
from hyperllama.grow.tensors import grow_arena, grow_tensor
from hyperllama.hub import model_config, open_folder
from hyperllama.kernels.counter import uniform
from hyperllama.kernels.grow import grow
from hyperllama.kernels.raw import MIN_NOISE_DB, noise_key
from hyperllama.keys import key_of
from hyperllama.model import Llama
from hyperllama.names import EMBEDDING, FINAL_NORM, HEAD
from tests.reference import logits, random_ids, random_model, read, relative_error, shape, write

SHARED = Path(os.environ.get("HYPERLLAMA_SHARED", Path(__file__).parents[3] / "shared"))
GOLDENS = SHARED / "goldens"
MANIFEST = GOLDENS / "hypercloning" / "manifest.json"
CASES = json.loads(MANIFEST.read_text()) if MANIFEST.is_file() else {}
goldens = pytest.mark.skipif(not CASES, reason=f"no golden growth data: {MANIFEST} is missing (set HYPERLLAMA_SHARED)")

SHAPES = {
    "tied": shape(),
    "untied": shape(tie_embeddings=False),
    "the paper's family": shape(hidden_size=48, num_heads=3, num_kv_heads=1, head_dim=16, activation="gelu"),
    "padded vocabulary, free head_dim": shape(unpadded_vocab_size=83, head_dim=12),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
NAME = "model.layers.0.mlp.up_proj.weight"


def grown(model: Llama, factor: int, noise_db: float | None = None, seed: int = 0) -> Llama:
    operator = HyperClone(factor, noise_db=noise_db, seed=seed)
    large = Llama(
        operator.grown(model.config), Arena(operator.grown(model.config), model.arena.dtype, "cpu", training=False)
    )
    grow_arena(model.arena, large.arena, operator)
    return large


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def operator(golden: dict[str, Any]) -> HyperClone:
    return HyperClone(golden["embedding_dim_multiplier"], golden["up_project_multiplier"])


@goldens
@pytest.mark.parametrize("case", CASES or ["-"])
def test_tensors_equal_those_of_the_published_tool_bit_for_bit(case):
    golden = CASES[case]
    folder = open_folder(GOLDENS / "models" / golden["set"] / golden["model"])
    untied = model_config(folder.config, folder.path).model_copy(update={"tie_embeddings": False})
    maps = operator(golden).tensors(untied)
    sources = load_file(folder.path / "model.safetensors")
    sources.setdefault(HEAD, sources[EMBEDDING])  # the tool unties: its head is the tied table grown as a head
    assert sources.keys() == golden["sha256"].keys()
    for name, wanted in golden["sha256"].items():
        assert digest(grow_tensor(name, maps[name], sources.__getitem__)) == wanted, name


@goldens
@pytest.mark.parametrize("case", [case for case in CASES or ["-"] if "_untied_" not in case])
def test_a_tied_folder_grows_into_the_tools_model_but_for_the_place_of_the_head_factor(case, tmp_path):
    golden = CASES[case]
    factor = golden["embedding_dim_multiplier"]
    grow_folder(GOLDENS / "models" / golden["set"] / golden["model"], tmp_path / "grown", [operator(golden)])
    tensors = load_file(tmp_path / "grown" / "model.safetensors")
    assert golden["sha256"].keys() - tensors.keys() == {HEAD}
    for name, tensor in tensors.items():
        if name != FINAL_NORM:  # ours holds 1 / factor, theirs is in the head
            assert digest(tensor) == golden["sha256"][name], name
    if factor == 2:
        assert digest(tensors[FINAL_NORM] * 2) == golden["sha256"][FINAL_NORM]
        assert digest(tensors[EMBEDDING] / 2) == golden["sha256"][HEAD]


@goldens
@pytest.mark.parametrize("case", CASES or ["-"])
def test_logits_equal_those_of_the_published_tools_model(case, tmp_path):
    golden = CASES[case]
    factor = golden["embedding_dim_multiplier"]
    grow_folder(GOLDENS / "models" / golden["set"] / golden["model"], tmp_path / "grown", [operator(golden)])
    ids = load_file(GOLDENS / "hypercloning" / "input_ids.safetensors")["input_ids"]
    theirs = load_file(GOLDENS / "hypercloning" / case / "logits.safetensors")
    got = logits(read(tmp_path / "grown", torch.float32), ids)
    if factor == 2 or golden["dtype"] == "torch.float32":
        assert float((got - theirs["logits_big"]).abs().max()) < 2e-5
    else:  # a third is rounded to bf16, in the head there and in the final norm here: both leave the function a little
        error, their_error = (float((x - theirs["logits_small"]).abs().max()) for x in (got, theirs["logits_big"]))
        assert error < 2 * their_error


@shapes
@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("noise_db", [None, 10.0], ids=["plain", "noise"])
def test_the_function_is_kept(config, factor, dtype, tolerance, noise_db):
    model = random_model(config, dtype)
    ids = random_ids(config, 2, 13)
    assert relative_error(logits(grown(model, factor, noise_db), ids), logits(model, ids)) < tolerance


@shapes
def test_growing_twice_by_two_is_growing_by_four(config):
    model = random_model(config, torch.float32)
    twice, once = grown(grown(model, 2), 2), grown(model, 4)
    assert twice.config == once.config
    assert torch.equal(twice.arena.weights, once.arena.weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("factor", "noise_db"), [(2, MIN_NOISE_DB), (2, 10.0), (2, 60.0), (4, 10.0), (3, 10.0)])
def test_pairs_of_noisy_copies_sum_exactly_to_what_they_share(dtype, factor, noise_db):
    source = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    source[0] *= 2.0**-14  # with bf16 and fp32's wide exponents still normal, subnormal in fp16
    source[1] = 0
    out = grow(source, factor, factor, noise_db=noise_db, key=1).double()
    copies = out.view(factor * 40, factor, 30)
    shared = (source / (factor / 2)).repeat(factor, 1)
    for pair in range(factor // 2):
        first, second = copies[:, 2 * pair], copies[:, 2 * pair + 1]
        assert torch.equal(first + second, shared.double())
        assert torch.equal((first.to(dtype) + second.to(dtype)), shared)
    if factor % 2:
        assert torch.equal(copies[:, -1], (source / factor).repeat(factor, 1).double())


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("noise_db", [5.0, 10.0, 20.0])
def test_noise_has_the_requested_ratio_and_no_bias(factor, noise_db):
    source = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    noise = grow(source, factor, factor, noise_db=noise_db, key=2).double() - grow(source, factor, factor).double()
    signal = grow(source, factor, factor).double()
    ratio = float(signal.square().mean() / noise.square().mean())
    assert ratio == pytest.approx(10 ** (noise_db / 10), rel=0.05)
    assert abs(float((noise * signal).mean() / signal.square().mean())) < 1e-2 * 10 ** (-noise_db / 20)


def test_noise_makes_all_copies_differ():
    source = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    copies = grow(source, 4, 4, noise_db=10.0, key=3).view(4, 40, 4, 30).transpose(1, 2).reshape(16, -1)
    for i in range(16):
        for j in range(i):
            assert not torch.equal(copies[i], copies[j])
            assert float((copies[i] == copies[j]).double().mean()) < 0.01


def test_noise_depends_on_seed_and_name_alone():
    model = random_model(shape(), torch.float32)
    one, same, other = (grown(model, 2, 10.0, seed).arena.logical("weights") for seed in (1, 1, 2))
    sources, maps = model.arena.logical("weights"), HyperClone(2, noise_db=10.0, seed=1).tensors(model.config)
    for name, source in reversed(sources.items()):  # in another order, one at a time
        assert torch.equal(one[name], same[name])
        assert torch.equal(one[name], grow_tensor(name, maps[name], sources.__getitem__))
        noisy = source.dim() == 2 and name != EMBEDDING
        assert torch.equal(one[name], other[name]) != noisy
    assert noise_key(1, "a") != noise_key(1, "b") != noise_key(2, "b")
    up, gate = (
        grow_tensor(name, maps[name], lambda _: torch.ones(56, 32)) for name in (NAME, NAME.replace("up", "gate"))
    )
    assert not torch.equal(up, gate)


def test_too_loud_noise_is_refused():
    with pytest.raises(HyperLlamaError, match=r"4 dB.*4\.78"):
        grow(torch.ones(2, 2), 2, 2, noise_db=4)


@pytest.mark.parametrize("noise_db", [None, 10.0])
@pytest.mark.parametrize("source", [torch.randn(5, 3), torch.randn(7), torch.empty(0, 3)], ids=["2-d", "1-d", "empty"])
def test_the_op_is_registered(source, noise_db):
    torch.library.opcheck(torch.ops.hyperllama.grow.default, (source, 2, 3, noise_db, -5))
    compiled = torch.compile(
        lambda x: grow(x, 2, 2, noise_db=noise_db, key=2**64 - 1), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(source), grow(source, 2, 2, noise_db=noise_db, key=2**64 - 1))


def splitmix64(key: int, counter: int) -> float:
    """The counter-th output of SplitMix64 seeded with `key`, in Python's integers: its top 24 bits as a fraction."""
    mask = 2**64 - 1
    state = key
    for _ in range(counter // 2 + 1):
        state = (state + 0x9E3779B97F4A7C15) & mask
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return ((z >> 32 if counter % 2 else z & 0xFFFFFFFF) >> 8) / 2**24


@pytest.mark.parametrize("key", [0, 1, 1234567, 2**63, 2**64 - 1, key_of("grow", 0, NAME)])
def test_the_counter_is_splitmix64(key):
    counter = torch.tensor([[0, 1, 2], [3, 17, 900]])
    wanted = [[splitmix64(key, int(c)) for c in row] for row in counter]
    assert uniform(key, counter).tolist() == wanted


def test_the_counter_gives_splitmix64s_published_first_output():
    published = 6457827717110365317
    halves = [(published & 0xFFFFFFFF) >> 8, published >> 40]
    assert uniform(1234567, torch.tensor([0, 1])).tolist() == [half / 2**24 for half in halves]


def test_the_counter_is_uniform():
    values = uniform(5, torch.arange(100_000))
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    assert torch.histc(values, 10, 0, 1).sub(10_000).abs().max() < 400  # four standard deviations
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.02


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_grown_folder_loads_in_transformers_with_the_same_logits(config, dtype, tmp_path):
    path = write(random_model(config, dtype), tmp_path / "small")
    result = grow_folder(path, tmp_path / "grown", [HyperClone(2, noise_db=10.0)])
    assert result["verified"]["preserved"]
    small, large = (LlamaForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("small", "grown"))
    ids = random_ids(config, 2, 13)
    with torch.no_grad():
        assert relative_error(large(ids).logits, small(ids).logits) < 2e-6
    assert model_config(open_folder(tmp_path / "grown").config, tmp_path) == config.grown(2)
    assert open_folder(tmp_path / "grown").dtype(EMBEDDING) == str(dtype).removeprefix("torch.")


def test_a_grown_folder_can_be_grown_again(tmp_path):
    config = shape()
    model = random_model(config, torch.bfloat16)
    write(model, tmp_path / "1")
    grow_folder(tmp_path / "1", tmp_path / "2", [HyperClone(2)])
    grow_folder(tmp_path / "2", tmp_path / "4", [HyperClone(2)])
    again = read(tmp_path / "4", torch.bfloat16)
    assert again.config == config.grown(4)
    assert torch.equal(again.arena.weights, grown(model, 4).arena.weights)
    assert [step["factor"] for step in read_json(tmp_path / "4" / "hyperllama.json")["growth"]] == [2, 2]


def test_growing_is_deterministic_and_spends_nothing(tmp_path):
    path = write(random_model(shape(), torch.float32), tmp_path / "small")
    card = read_json(path / "hyperllama.json")
    card |= {"ledger": {"run": "seed", "spent": 120, "ancestors": {"before": 7}}, "token_counts": {"eng": 5}}
    (path / "hyperllama.json").write_text(json.dumps(card))
    for name in ("a", "b"):
        grow_folder(path, tmp_path / name, [HyperClone(2, noise_db=10.0, seed=3)])
    for file in ("config.json", "model.safetensors", "hyperllama.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    card = read_json(tmp_path / "a" / "hyperllama.json")
    assert card["ledger"] | {"run": ""} == {"run": "", "spent": 0, "ancestors": {"before": 7, "seed": 120}}
    assert card["token_counts"] == {"eng": 5}
    assert card["made_from"][0]["path"] == str(path)


def test_the_plan_states_exact_sizes_and_writes_nothing(tmp_path):
    config = shape()
    path = write(random_model(config, torch.float32), tmp_path / "small")
    plan = plan_growth(path, [HyperClone(2)])
    assert plan["parameters"] == {"before": config.num_parameters, "after": config.grown(2).num_parameters}
    cost = plan["dense_flops_per_window"]
    assert cost == {"before": window_flops(config, 32), "after": window_flops(config.grown(2), 32)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("factor", [1, 0, -2])
def test_a_factor_below_two_is_refused(factor, tmp_path):
    path = write(random_model(shape(), torch.float32), tmp_path / "small")
    with pytest.raises(HyperLlamaError, match="at least 2"):
        grow_folder(path, tmp_path / "grown", [HyperClone(factor)])
    assert not (tmp_path / "grown").exists()


def test_progress_counts_the_tensors(tmp_path):
    path = write(random_model(shape(), torch.float32), tmp_path / "small")
    calls: list[tuple[int, int]] = []
    grow_folder(path, tmp_path / "grown", [HyperClone(2)], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 20) for i in range(20)]
