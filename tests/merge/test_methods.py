"""The merge methods by themselves: against their definitions in fp64, at their edges, and their statistics where they draw."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from hyperllama.cli import app
from hyperllama.errors import HyperLlamaError
from hyperllama.merge import merge_tensors, parse_recipe, plan, spherical
from hyperllama.merge.methods import METHODS
from tests.merge.conftest import MakeModel

NAME = "model.layers.0.self_attn.q_proj.weight"
LLAMA = {"model.embed_tokens.weight": (6, 4), NAME: (8, 4), "model.norm.weight": (4,)}


def models(count: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """base and m0, m1, ...: base plus differences of a tenth of its size."""
    draw = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=draw) for name, shape in LLAMA.items()}
    made = {"base": base}
    for i in range(count):
        made[f"m{i}"] = {name: x + 0.1 * torch.randn(x.shape, generator=draw) for name, x in base.items()}
    return made


def merged(method: str, given: dict[str, dict[str, Tensor]], base: bool, top: Any = None, **keys: Any) -> Tensor:
    """NAME of the merge of all given models; `keys` are parameters of each model, lists of one per model."""
    names = [name for name in given if name != "base"]
    listed = [
        {"model": name, "parameters": {key: values[i] for key, values in keys.items()}} for i, name in enumerate(names)
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": listed, "parameters": top or {}}
    if base:
        recipe["base_model"] = "base"
    else:
        given = {name: tensors for name, tensors in given.items() if name != "base"}
    return dict(merge_tensors(parse_recipe(json.dumps(recipe), "recipe"), given))[NAME]


def fp64(given: dict[str, dict[str, Tensor]]) -> tuple[np.ndarray, list[np.ndarray]]:
    base, *others = (tensors[NAME].double().numpy() for tensors in given.values())
    return base, others


def close(ours: Tensor, truth: np.ndarray) -> None:
    np.testing.assert_allclose(ours.double().numpy(), truth, rtol=1e-6, atol=1e-6)


def arc(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    angle = math.acos((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


class TestDefinitions:
    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_slerp(self, t: float) -> None:
        given = models(1) | {"m0": models(1, seed=9)["m0"]}
        base, (other,) = fp64(given)
        close(merged("slerp", given, True, {"t": t}), arc(base, other, t))

    @pytest.mark.parametrize("based", [True, False])
    def test_nuslerp_flat_and_by_rows_and_columns(self, based: bool) -> None:
        given = models(2)
        base, others = fp64(given)
        a, b = [x - base * based for x in others]
        weights = {"weight": [1.0, 3.0]}
        close(merged("nuslerp", given, based, **weights), base * based + arc(a, b, 0.75))
        rows = np.stack([arc(x, y, 0.75) for x, y in zip(a, b, strict=True)])
        close(merged("nuslerp", given, based, {"nuslerp_flatten": False}, **weights), base * based + rows)
        columns = np.stack([arc(x, y, 0.75) for x, y in zip(a.T, b.T, strict=True)]).T
        top = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
        close(merged("nuslerp", given, based, top, **weights), base * based + columns)

    @pytest.mark.parametrize("based", [True, False])
    def test_multislerp(self, based: bool) -> None:
        given = models(3)
        base, others = fp64(given)
        xs, w = [x - base * based for x in others], np.array([0.5, 0.2, 0.3])
        norms = [np.linalg.norm(x) for x in xs]
        units = [x / n for x, n in zip(xs, norms, strict=True)]
        mean = sum(a * u for a, u in zip(w, units, strict=True))
        mean /= np.linalg.norm(mean)
        tangent = sum(a * (u - (u * mean).sum() * mean) for a, u in zip(w, units, strict=True))
        speed = np.linalg.norm(tangent)
        point = np.cos(speed) * mean + np.sin(speed) * tangent / speed
        truth = base * based + point * sum(a * n for a, n in zip(w, norms, strict=True))
        close(merged("multislerp", given, based, weight=[5, 2, 3]), truth)

    def test_karcher_is_where_the_logarithms_cancel(self) -> None:
        given = models(4)
        _, others = fp64(given)
        ours = merged("karcher", given, False, {"max_iter": 50, "tol": 1e-9}).double().numpy()
        assert np.linalg.norm(ours) == pytest.approx(np.mean([np.linalg.norm(x) for x in others]), rel=1e-6)
        mean, pull = ours / np.linalg.norm(ours), np.zeros_like(ours)
        for x in others:
            unit = x / np.linalg.norm(x)
            angle = math.acos((unit * mean).sum())
            pull += angle / math.sin(angle) * (unit - math.cos(angle) * mean)
        assert np.linalg.norm(pull) < 1e-5

    @pytest.mark.parametrize("by_rows", [False, True])
    def test_model_stock(self, by_rows: bool) -> None:
        given = models(3)
        base, others = fp64(given)

        def stock(b: np.ndarray, xs: list[np.ndarray]) -> np.ndarray:
            pairs = list(itertools.combinations([x - b for x in xs], 2))
            c = np.mean([(p * q).sum() / np.linalg.norm(p) / np.linalg.norm(q) for p, q in pairs])
            t = len(xs) * c / (1 + (len(xs) - 1) * c)
            return t * np.mean(xs, axis=0) + (1 - t) * b

        rows = [stock(base[i], [x[i] for x in others]) for i in range(len(base))]
        truth = np.stack(rows) if by_rows else stock(base, others)
        close(merged("model_stock", given, True, {"filter_wise": by_rows}), truth)

    def test_nearswap(self) -> None:
        given = models(1)
        base, (other,) = fp64(given)
        weight = np.clip(0.05 / np.abs(other - base), 0, 1)
        close(merged("nearswap", given, True, {"t": 0.05}), base + weight * (other - base))

    def test_arcee_fusion(self) -> None:
        given = models(1)
        base, (other,) = fp64(given)
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) + 1e-8 for x in (other, base))
        importance = np.abs(other - base) * (p * np.log(p / q)).sum(1, keepdims=True)
        low, median, high = np.quantile(importance, [0.25, 0.5, 0.75], method="lower")
        taken = importance >= median + 1.5 * (high - low)
        assert 0 < taken.sum() < taken.size
        close(merged("arcee_fusion", given, True), base + (other - base) * taken)

    def test_ram(self) -> None:
        given = models(3)
        base, others = fp64(given)
        truth, plus = base.copy(), base.copy()
        big = np.array([np.abs(x - base) > 0.1 for x in others])
        count = big.sum(0)
        for x, mine in zip(others, big, strict=True):
            alone = mine & (count == 1)
            boost = 1 + 0.5 * min((mine & (count > 1)).sum() / alone.sum(), 0.7)
            truth += np.where(mine, (x - base) / np.maximum(count, 1), 0)
            plus += np.where(mine, (x - base) / np.maximum(count, 1), 0) * np.where(alone, boost, 1)
        close(merged("ram", given, True, {"epsilon": 0.1}), truth)
        close(merged("ramplus_tl", given, True, {"epsilon": 0.1, "r": 0.5, "alpha": 0.7}), plus)

    @pytest.mark.parametrize("top_k", [0.0, 0.4, 1.0])
    def test_sce(self, top_k: float) -> None:
        given = models(3)
        base, others = fp64(given)
        deltas = np.array([x - base for x in others])
        kept = np.argsort(-deltas.var(0).ravel(), kind="stable")[: int(top_k * base.size)]
        mask = np.zeros(base.size)
        mask[kept] = 1
        deltas = deltas * mask.reshape(base.shape)
        weights = (deltas**2).sum((1, 2))
        agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
        share = weights[:, None, None] * agree
        divisor = share.sum(0)
        divisor[divisor == 0] = 1
        close(merged("sce", given, True, {"select_topk": top_k}), base + (deltas * share).sum(0) / divisor)

    def test_breadcrumbs_drop_the_largest_and_the_smallest(self) -> None:
        given = models(1)
        base, (other,) = fp64(given)
        order = np.argsort(-np.abs(other - base).ravel())
        kept = np.zeros(base.size)
        kept[order[3 : 3 + 16]] = 1
        ours = merged("breadcrumbs", given, True, weight=[1], density=[0.5], gamma=[0.1])
        close(ours, base + (other - base) * kept.reshape(base.shape))

    def test_passthrough_scales(self) -> None:
        given = models(1)
        assert torch.equal(merged("passthrough", given, False), given["m0"][NAME])
        assert torch.equal(merged("passthrough", given, False, scale=[0.5]), given["m0"][NAME] / 2)


class TestEdges:
    @pytest.mark.parametrize(
        "method", ["multislerp", "nuslerp", "model_stock", "sce", "ram", "ties", "della", "dare_ties"]
    )
    def test_a_model_equal_to_the_base_leaves_all_finite(self, method: str) -> None:
        given = models(2)
        given["m1"] = given["base"]
        own: dict[str, Any] = {"weight": [1, 1]} if "weight" in METHODS[method].model_parameters else {}
        assert merged(method, {**given, "m1": dict(given["base"])}, True, **own).isfinite().all()

    @pytest.mark.parametrize("scale", [1.0, -1.0, -3.0, 0.0, 1 + 1e-6])
    def test_parallel_antiparallel_and_zero_tensors(self, scale: float) -> None:
        given = models(1)
        given["m1"] = {name: tensor * scale for name, tensor in given["m0"].items()}
        a, b = given["m0"][NAME], given["m1"][NAME]
        close(
            merged("nuslerp", given, False, weight=[1, 1]),
            ((a + b) / 2 if scale else math.sqrt(0.5) * a).double().numpy(),
        )
        assert merged("karcher", given, False).norm() <= max(a.norm(), b.norm()) * 1.001
        ours = merged("multislerp", given, False, weight=[1, 1])
        close(ours, (a / 2 if not scale else (a + b) / 2).double().numpy())

    def test_slerp_weights_of_the_gram_matrix_at_its_edges(self) -> None:
        assert spherical.slerp([[1, 1], [1, 1]], 0.25) == [0.75, 0.25]
        assert spherical.slerp([[1, -1], [-1, 1]], 0.25) == [0.75, 0.25]
        assert spherical.slerp([[0, 0], [0, 1]], 0.5) == pytest.approx([math.sqrt(0.5)] * 2)
        assert spherical.model_stock([[1, -1], [-1, 1]]) == [0, 0]
        assert spherical.model_stock([[0, 0], [0, 0]]) == [0, 0]
        assert spherical.karcher([[0, 0], [0, 0]], 10, 1e-5) == [0, 0]

    def test_densities_that_keep_nothing_leave_the_base(self) -> None:
        given = models(2)
        for method in ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"):
            ours = merged(method, given, True, weight=[1, -1], density=[0, 0])
            assert torch.equal(ours, given["base"][NAME]), method

    @pytest.mark.parametrize(
        ("method", "count", "top", "sentence"),
        [
            ("slerp", 2, {"t": 0.5}, r"slerp merges exactly 2 models, .* has 3: base, m0, m1"),
            ("nuslerp", 3, {"weight": 1}, r"nuslerp merges exactly 2 models besides its base_model base, .* has 3"),
            ("nearswap", 2, {"t": 0.5}, r"nearswap merges exactly 1 model besides"),
            ("model_stock", 1, {}, r"model_stock merges at least 2 models besides"),
            ("slerp", 1, {}, r"no t is given for tensor"),
            ("della", 1, {"weight": 1, "density": 0.9}, r"density 0.9 and epsilon 0.15 give no chances between 0 and 1"),
            ("breadcrumbs", 1, {"weight": 1, "gamma": 2}, r"gamma of .* is 2, expected a share between 0 and 1"),
            ("ram", 1, {"epsilon": -1}, r"epsilon of tensor .* expected a number that is not negative"),
        ],
    )  # fmt: skip
    def test_refusals(self, method: str, count: int, top: dict[str, Any], sentence: str) -> None:
        with pytest.raises(HyperLlamaError, match=sentence):
            merged(method, models(count), True, top)

    @pytest.mark.parametrize("method", ["ties", "multislerp"])
    def test_a_slice_without_the_base_is_refused(self, method: str, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("base", 1), make_model("a", 2)
        slices = [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]
        keys = {"merge_method": method, "base_model": "base", "slices": slices, "parameters": {"weight": 1}}
        with pytest.raises(HyperLlamaError, match=f"lacks a source with its base_model base, which {method} needs"):
            plan(parse_recipe(json.dumps(keys), "recipe"), tmp_path)


class TestRandomMasks:
    @pytest.mark.parametrize("case", ["dare_linear1", "dare_linear2_norescale", "dare_ties_paper5", "della_linear1"])
    def test_statistics_are_those_of_mergekit(self, case: str, goldens: Path) -> None:
        entry = json.loads((goldens / "random_stats" / "manifest.json").read_text())[case]
        labels = ["models/A_tied_bf16/base", *(model["model"] for model in entry["config"]["models"])]
        given = {label: load_file(goldens / label / "model.safetensors") for label in labels}
        small = {label: {name: tensors[name] for name in LLAMA} for label, tensors in given.items()}
        golden = load_file(goldens / "random_stats" / f"{case}.safetensors")
        sums, shares, seeds = [], [], 32
        mean = torch.zeros_like(golden[f"{NAME}.mean"], dtype=torch.float64)
        for seed in range(seeds):
            recipe = parse_recipe(json.dumps(entry["config"] | {"hyperllama": {"seed": seed}}), "recipe")
            result = dict(merge_tensors(recipe, small))[NAME]
            mean += result.double() / seeds
            delta = result - small[labels[0]][NAME].float()
            sums.append(float(delta.double().abs().sum()))
            shares.append(float((delta != 0).float().mean()))
        spread = golden[f"{NAME}.std"].double() * math.sqrt(1 / seeds + 1 / entry["seeds"])
        size = float(golden[f"{NAME}.std"].mean())
        assert ((mean - golden[f"{NAME}.mean"]).abs() <= 6 * spread + 0.01 * size).double().mean() > 0.995
        expected = entry["tensors"][NAME]
        error = 4 * (np.std(sums) + expected["l1_delta_std"]) / math.sqrt(seeds)
        assert np.mean(sums) == pytest.approx(expected["l1_delta_mean"], abs=error + 1e-6 * expected["l1_delta_mean"])
        assert np.mean(shares) == pytest.approx(
            expected["changed_share_mean"], abs=4 * np.std(shares) / math.sqrt(seeds)
        )

    def test_a_mask_depends_on_seed_tensor_and_model_alone(self) -> None:
        given = models(3)
        one = merged(
            "dare_linear", {k: given[k] for k in ("base", "m1")}, True, {"rescale": False}, weight=[1], density=[0.5]
        )
        two = merged("dare_linear", given, True, {"rescale": False}, weight=[0, 1, 0], density=[0.9, 0.5, 0.1])
        assert torch.equal(one, two)
        assert not torch.equal(one, given["m1"][NAME])


SCALES = ("180M", "572M-2x", "572M-cloned")
SUBSETS = [
    subset for size in range(2, 6) for subset in itertools.combinations(("isl", "fao", "ekk", "fas", "swe"), size)
]
PAPER = ("linear", "task_arithmetic", "ties", "dare_ties", "multislerp")


def test_the_papers_390_recipes_parse_and_plan(make_model: MakeModel, tmp_path: Path) -> None:
    for scale, language in itertools.product(SCALES, ("eng", "isl", "fao", "ekk", "fas", "swe")):
        make_model(f"{scale}-{language}", num_hidden_layers=1)
    planned = 0
    for method, scale, subset in itertools.product(PAPER, SCALES, SUBSETS):
        trims = {} if method in ("linear", "multislerp") else {"density": 0.5}
        recipe: dict[str, Any] = {
            "merge_method": method,
            "dtype": "float16",
            "models": [{"model": f"{scale}-{name}", "parameters": {"weight": 1.0, **trims}} for name in subset],
            "parameters": {"normalize": True, "int8_mask": True},
        }
        if trims:
            recipe["base_model"] = f"{scale}-eng"
        made = plan(parse_recipe(json.dumps(recipe), "recipe"), tmp_path)
        assert "int8_mask has no effect under " + method in made.notes
        assert ("density has no effect under task_arithmetic" in made.notes) == (method == "task_arithmetic")
        assert ("normalize has no effect under multislerp" in made.notes) == (method == "multislerp")
        assert {step.dtype for step in made.steps} == {"float16"}
        planned += 1
    assert planned == 390


def test_seed_and_compat_on_the_command_line(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("base", 1), make_model("a", 2)
    models = "models: [{model: a, parameters: {weight: 1, density: 0.5}}]"
    (tmp_path / "r.yaml").write_text(f"merge_method: dare_ties\nbase_model: base\n{models}\n")
    monkeypatch.chdir(tmp_path)
    for out, options in {"o0": [], "o1": ["--seed", "1"], "o2": ["--seed", "0", "--compat", "mergekit"]}.items():
        assert CliRunner().invoke(app, ["merge", "r.yaml", out, "--quiet", *options]).exit_code == 0
    first, other, rounded = (load_file(f"o{i}/model.safetensors")[NAME] for i in range(3))
    assert not torch.equal(first, other)
    torch.testing.assert_close(first, rounded)
    assert json.loads(Path("o1/hyperllama.json").read_text())["hyperllama"] == {"seed": 1, "compat": None}
    result = CliRunner().invoke(app, ["merge", "r.yaml", "o3", "--compat", "x"])
    assert str(result.exception) == "--compat 'x': Input should be 'mergekit'"
    assert not Path("o3").exists()
