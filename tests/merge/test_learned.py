"""Weights by gradient: the gradient against autograd through the merge in fp64, the loss it lowers, FLOPs, what is refused."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hyperllama.arena import Arena
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate import evaluate_folder
from hyperllama.flops import window_flops
from hyperllama.hub import model_config, open_folder, read_weights
from hyperllama.merge import learned, parse_recipe, plan, run
from hyperllama.model import Llama
from hyperllama.train.loop import train
from tests.study import LANGUAGES, SEQ_LEN, make_study, run_config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and a model of each of two languages that starts from it."""
    folder = make_study(tmp_path_factory.mktemp("learned"))
    base = run_config(folder, folder / "base", budget={"windows": 160})
    train(base, quiet=True)
    for tag in LANGUAGES:
        data = {"sources": [{"path": str(folder / "shards" / tag)}], "seq_len": SEQ_LEN}
        changes = {"model": None, "init_from": str(folder / "base" / "model"), "data": data, "budget": {"windows": 80}}
        train(run_config(folder, folder / tag, **changes, export={"adam_v": True}), quiet=True)
    return folder


def texts(models) -> list[str]:
    return [str(models / "corpus" / "text" / tag / "dev.jsonl") for tag in LANGUAGES]


def recipe(models, weight=0.5, method="task_arithmetic", extra=None, **keys):
    value = {
        "merge_method": method,
        "base_model": "base/model",
        "models": [{"model": f"{tag}/model", "parameters": {"weight": weight}} for tag in LANGUAGES],
        "parameters": {"normalize": False},
        "hyperllama": {"learn": {"texts": texts(models), "windows": 8, "steps": 12} | keys} | (extra or {}),
    }
    return parse_recipe(yaml.safe_dump(value), "r.yaml")


def test_the_gradient_is_that_of_autograd_through_the_merge(models):
    """One step of plain descent in fp64, both granularities: what Adam is given."""
    folders = [open_folder(models / name / "model") for name in ("base", *LANGUAGES)]
    config = model_config(folders[0].config, folders[0].path)
    flats = []
    for folder in folders:
        arena = Arena(config, torch.float64, "cpu", training=True)
        read_weights(folder, config, arena.logical("weights"))
        flats.append({name: view.clone() for name, view in arena.logical("weights").items()})
    ids = torch.randint(512, (2, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    arena = Arena(config, torch.float64, "cpu", training=True)
    model = Llama(config, arena)
    name = "model.layers.1.mlp.down_proj.weight"
    differences = [flat[name] - flats[0][name] for flat in flats[1:]]

    def loss(c: torch.Tensor) -> torch.Tensor:
        for key, view in arena.logical("weights").items():
            view.copy_(flats[0][key])
        target = arena.logical("weights")[name]
        for weight, difference in zip(c, differences, strict=True):
            target += weight[:, None] * difference
        arena.grad.zero_()
        return model.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), loss_weight=1.0)

    for rows in (1, differences[0].shape[0]):
        c = torch.full((2, rows), 0.5, dtype=torch.float64)
        loss(c).backward()
        found = learned._dots(arena.logical("grad")[name].clone(), differences, rows > 1)
        for i, row in ((0, 0), (1, rows - 1)):
            step = torch.zeros_like(c)
            step[i, row] = 1e-5
            numeric = (loss(c + step).item() - loss(c - step).item()) / 2e-5
            assert found[i, row].item() == pytest.approx(numeric, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("by", ["tensor", "row"])
def test_learning_lowers_the_loss_and_its_flops_are_spent(models, by, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    shares = {"importance": [{"by": "token_counts"}, {"by": "adam_v"}]}
    run(plan(recipe(models, 1.5, extra={"learn": None} | shares), models), before)
    result = run(plan(recipe(models, 1.5, by=by, extra=shares), models), after)
    means = [
        sum(text["bits_per_byte"] for text in evaluate_folder(folder, texts(models), [])["texts"].values()) / 2
        for folder in (before, after)
    ]
    assert means[1] < means[0] - 0.01
    card = json.loads((after / "hyperllama.json").read_text())
    config = model_config(json.loads((after / "config.json").read_text()), after)
    assert card["ledger"]["spent"] == 12 * 8 * window_flops(config, SEQ_LEN) == result["ledger"]["spent"]
    assert json.loads((before / "hyperllama.json").read_text())["ledger"]["spent"] == 0
    assert len(card["learned"]["bits_per_byte"]) == 12 and card["made_from"][-1]["path"] == texts(models)[1]


def test_learning_is_deterministic_and_starts_at_the_recipe(models, tmp_path):
    made = [plan(recipe(models, steps=2, rate=rate), models) for rate in (0.1, 0.1, 1e-9)]
    for i, each in enumerate(made):
        run(each, tmp_path / f"o{i}")
    run(plan(recipe(models, extra={"learn": None}), models), tmp_path / "plain")
    first, again, still, plain = (load_file(tmp_path / n / "model.safetensors") for n in ("o0", "o1", "o2", "plain"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], plain[name]) for name in first)
    for name in plain:
        torch.testing.assert_close(still[name], plain[name], rtol=1e-5, atol=1e-7)


def test_a_folded_head_factor_is_learnt_as_stored(models):
    """Files of a grown model hold the norm over the factor: the model that learning runs must have the same loss."""
    from hyperllama.grow.folder import grow_folder
    from hyperllama.grow.operators import HyperClone

    for name in ("base", *LANGUAGES):
        if not (models / f"grown-{name}").is_dir():
            grow_folder(models / name / "model", models / f"grown-{name}", [HyperClone(2)])
    value = yaml.safe_load(recipe(models, 0.5, steps=1).source)
    small = learned.learn(plan(parse_recipe(yaml.safe_dump(value), "r"), models))
    value["base_model"] = "grown-base"
    value["models"] = [{"model": f"grown-{tag}", "parameters": {"weight": 0.5}} for tag in LANGUAGES]
    large = learned.learn(plan(parse_recipe(yaml.safe_dump(value), "r"), models))
    assert math.isclose(small.losses[0], large.losses[0], rel_tol=1e-5)


def test_bad_recipes_and_texts_are_refused(models, tmp_path):
    with pytest.raises(HyperLlamaError, match="learn works with task_arithmetic, not with linear"):
        recipe(models, method="linear")
    with pytest.raises(HyperLlamaError, match=r"hyperllama\.learn\.by"):
        recipe(models, by="layer")
    (tmp_path / "short.txt").write_text("a b")
    with pytest.raises(HyperLlamaError, match=r"short\.txt has \d+ tokens, fewer than one window of 33"):
        run(plan(recipe(models, texts=[str(tmp_path / "short.txt")]), models), tmp_path / "out")
    with pytest.raises(HyperLlamaError, match="missing"):
        run(plan(recipe(models, texts=[str(tmp_path / "missing.txt")]), models), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_an_error(models, tmp_path):
    tensors = load_file(models / "swe" / "model" / "model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (models / "swe" / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * math.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    value = yaml.safe_load(recipe(models).source)
    value["models"][1]["model"] = str(broken)
    with pytest.raises(HyperLlamaError, match="loss of the merged model is nan in step 1"):
        run(plan(parse_recipe(yaml.safe_dump(value), "r"), models), tmp_path / "out")
