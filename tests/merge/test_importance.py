"""Shares by token counts and by v against their definitions in fp64, in merges of folders; what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file
from safetensors.torch import load_file

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import merge as kernels
from hyperllama.merge import merge_tensors, parse_recipe, plan, run
from hyperllama.names import EMBEDDING

NAMES = ("a", "b", "c")
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def models(make_model, tmp_path):
    """A base and three models, each with counts in two languages and v."""
    make_model("base", seed=1)
    for i, name in enumerate(NAMES):
        folder = make_model(name, seed=10 + i)
        rng = np.random.default_rng(i)
        counts = {tag: rng.integers(0, 50, 24) for tag in ("eng", name)}
        for array in counts.values():
            array[:3] = 0  # tokens that no run saw
        save_file(counts, folder / "token_counts.safetensors")
        shapes = {key: tensor.shape for key, tensor in load_file(folder / "model.safetensors").items()}
        v = {key: rng.exponential(1e-4 * (i + 1), shape).astype(np.float32) for key, shape in shapes.items()}
        save_file(v, folder / "adam_v.safetensors", metadata={"step": str(3 + i), "beta2": "0.95"})
    return tmp_path


def recipe(method: str = "task_arithmetic", weights=(1.0, 1.0, 1.0), **keys):
    value = {
        "merge_method": method,
        "models": [{"model": n, "parameters": {"weight": w}} for n, w in zip(NAMES, weights, strict=True)],
    }
    if method != "linear":
        value["base_model"] = "base"
    return parse_recipe(yaml.safe_dump(value | keys), "r.yaml")


def wide(folder: Path, name: str) -> np.ndarray:
    return load_file(folder / "model.safetensors")[name].double().numpy()


def score(folder: Path, i: int, name: str) -> np.ndarray:
    """What a share is made of, before smoothing."""
    from safetensors.numpy import load_file as load

    if name == EMBEDDING:
        return sum(load(folder / "token_counts.safetensors").values())[:, None].astype(np.float64)
    return load(folder / "adam_v.safetensors")[name].astype(np.float64) / (1 - 0.95 ** (3 + i))


@pytest.mark.parametrize(("power", "smoothing"), [(1.0, None), (0.5, 0.0), (2.0, 3.0)])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_merges_are_those_of_the_definition(models, method, power, smoothing):
    entries = [{"by": by, "power": power, "smoothing": smoothing} for by in ("token_counts", "adam_v")]
    parameters = {"normalize": method == "linear"} | ({"lambda": 1.25} if method != "linear" else {})
    weights = (0.7, 1.0, 1.5)
    r = recipe(method, weights, parameters=parameters, hyperllama={"importance": entries})
    run(plan(r, models), models / "out")
    merged = load_file(models / "out" / "model.safetensors")
    for name, by in ((EMBEDDING, "token_counts"), (Q, "adam_v"), ("model.norm.weight", "adam_v")):
        base = wide(models / "base", name) if method != "linear" else 0.0
        scores = [score(models / n, i, name) for i, n in enumerate(NAMES)]
        offset = {"token_counts": 1.0, "adam_v": 0.1}[by] if smoothing is None else smoothing
        if by == "adam_v":
            offset *= np.mean([s.mean() for s in scores])
        powers = [(s + offset) ** power for s in scores]
        total = sum(powers)
        shares = [np.divide(p, total, out=np.full_like(p, 1 / 3), where=total > 0) for p in powers]
        terms = [w * s * (wide(models / n, name) - base) for w, s, n in zip(weights, shares, NAMES, strict=True)]
        expected = sum(terms)
        if method == "linear":
            expected = expected / sum(w * s for w, s in zip(weights, shares, strict=True))
        else:
            expected = base + 1.25 * expected
        assert np.allclose(merged[name].double().numpy(), expected, rtol=2e-6, atol=2e-6)


def test_a_row_that_one_run_trained_is_taken_from_it(models):
    for i, name in enumerate(NAMES):
        counts = np.zeros(24, dtype=np.int64)
        counts[8 * i : 8 * i + 8] = 10**9
        save_file({"eng": counts}, models / name / "token_counts.safetensors")
    r = recipe(parameters={"normalize": True}, hyperllama={"importance": [{"by": "token_counts"}]})
    run(plan(r, models), models / "out")
    merged = load_file(models / "out" / "model.safetensors")
    owners = torch.cat(
        [load_file(models / n / "model.safetensors")[EMBEDDING][8 * i :][:8] for i, n in enumerate(NAMES)]
    )
    assert torch.allclose(merged[EMBEDDING], owners, atol=1e-6)
    mean = torch.stack([load_file(models / n / "model.safetensors")[Q] for n in NAMES]).mean(0)
    assert torch.allclose(merged[Q], mean, atol=1e-6)  # by token counts, other tensors keep the recipe's weights


def test_the_first_entry_that_matches_counts_and_others_are_left_alone(models):
    entries = [{"by": "adam_v", "filter": "q_proj", "power": 0.5}, {"by": "adam_v", "filter": "layers.1"}]
    steps = plan(recipe(hyperllama={"importance": entries}), models).steps
    found = {step.name: step.importance for step in steps}
    assert found[Q].power == 0.5 and found["model.layers.1.mlp.up_proj.weight"].power == 1.0
    assert found[EMBEDDING] is None and found["model.layers.0.mlp.up_proj.weight"] is None


@pytest.mark.parametrize("normalize", [False, True])
def test_the_weighted_sum_is_its_definition(normalize):
    generator = torch.Generator().manual_seed(0)
    base, *tensors = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(4))
    weights = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((5, 1), (5, 7), (5, 7))]
    for weight in weights:
        weight[0] = 0  # a row that nobody knows keeps the base
    merged = kernels.weighted(base, tensors, weights, 0.5, normalize)
    for row in range(5):
        for col in range(7):
            w = [weight.expand(5, 7)[row, col].item() for weight in weights]
            d = [tensor[row, col].item() - base[row, col].item() for tensor in tensors]
            total = sum(x * y for x, y in zip(w, d, strict=True))
            divisor = sum(w) if normalize and sum(w) > 0 else 1.0
            assert merged[row, col].item() == pytest.approx(base[row, col].item() + 0.5 * total / divisor, rel=1e-12)
    low = kernels.weighted(base.bfloat16(), [tensor.bfloat16() for tensor in tensors], weights)
    assert low.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one weight per tensor"):
        kernels.weighted(base, tensors, weights[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "ties"}, r"importance works with linear and task_arithmetic, not with ties"),
        ({"hyperllama": {"importance": [{"by": "adam_v"}], "compat": "mergekit"}}, "not with compat: mergekit"),
        ({"hyperllama": {"importance": [{"by": "fisher"}]}}, r"importance\[0\]\.by"),
        ({"hyperllama": {"importance": [{"by": "adam_v", "powr": 2}]}}, "did you mean 'power'"),
        ({"hyperllama": {"importance": [{"by": "adam_v", "power": 0.0}]}}, r"importance\[0\]\.power"),
    ],
)
def test_bad_recipes_are_refused(change, message):
    value = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}]}
    value["hyperllama"] = {"importance": [{"by": "adam_v"}]}
    with pytest.raises(HyperLlamaError, match=message):
        parse_recipe(yaml.safe_dump(value | change), "r.yaml")


def test_models_without_the_files_are_refused_before_any_work(models):
    (models / "b" / "adam_v.safetensors").unlink()
    with pytest.raises(HyperLlamaError, match=r"b has no adam_v\.safetensors"):
        plan(recipe(hyperllama={"importance": [{"by": "adam_v"}]}), models)
    save_file({"eng": np.zeros(7, dtype=np.int64)}, models / "c" / "token_counts.safetensors")
    with pytest.raises(HyperLlamaError, match=r"eng has shape \(7,\), the model asks for \(24,\)"):
        plan(recipe(hyperllama={"importance": [{"by": "token_counts"}]}), models)
    with pytest.raises(HyperLlamaError, match="merge folders, not live models"):
        merge_tensors(recipe(hyperllama={"importance": [{"by": "adam_v"}]}), {n: {} for n in ("base", *NAMES)})
