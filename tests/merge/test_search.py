"""The search: what it tries, in its budget, at what cost; its best recipe is a merge that anyone can repeat."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from hyperllama.cli import app, spread_lists
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate import evaluate_folder
from hyperllama.merge import parse_recipe, plan, read_recipe, run
from hyperllama.merge.search import Candidate, Development, candidates, search
from hyperllama.train.loop import train
from tests.study import LANGUAGES, SEQ_LEN, make_study, run_config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and a model of each of two languages that starts from it, with counts and v; text to choose by and to learn on."""
    folder = make_study(tmp_path_factory.mktemp("search"))
    train(run_config(folder, folder / "base", budget={"windows": 160}), quiet=True)
    for tag in LANGUAGES:
        data = {"sources": [{"path": str(folder / "shards" / tag)}], "seq_len": SEQ_LEN}
        changes = {"model": None, "init_from": str(folder / "base" / "model"), "data": data, "budget": {"windows": 80}}
        train(run_config(folder, folder / tag, **changes, export={"adam_v": True}), quiet=True)
        lines = (folder / "corpus" / "text" / tag / "dev.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{tag}.jsonl").write_text("".join(lines[::2]))
        (folder / f"{tag}-learn.jsonl").write_text("".join(lines[1::2]))
    return folder


def recipe(**changes: Any):
    value = {
        "merge_method": "task_arithmetic",
        "base_model": "base/model",
        "models": [{"model": f"{tag}/model", "parameters": {"weight": 0.2}} for tag in LANGUAGES],
    }
    return parse_recipe(yaml.safe_dump({k: v for k, v in (value | changes).items() if v is not None}), "r.yaml")


def files(models: Path, suffix: str = "") -> list[Path]:
    return [models / f"{tag}{suffix}.jsonl" for tag in LANGUAGES]


def test_a_measurement_is_that_of_the_merged_folder(models, tmp_path):
    planned = plan(recipe(), models)
    development = Development(files(models), planned)
    run(planned, tmp_path / "out")
    measured = evaluate_folder(tmp_path / "out", files(models), [])["texts"]
    for text, bits in development.measure(planned).items():
        assert bits == pytest.approx(measured[text]["bits_per_byte"], rel=1e-6)
    assert development.flops * 3 % SEQ_LEN == 0 < development.flops


def test_the_best_is_the_best_of_what_was_tried_and_its_recipe_repeats_it(models, tmp_path):
    found = search(recipe(), files(models), 60, learn_texts=files(models, "-learn"), cwd=models)
    means = [row["mean"] for row in found.rows]
    assert means == sorted(means) and found.evaluations <= 60
    names = [row["merge"] for row in found.rows]
    assert len(set(names)) == len(names) and {"the recipe as given", "ties", "dare_ties", "multislerp"} <= set(names)
    assert "task_arithmetic by token_counts, adam_v^0.5" in names
    assert sum("learnt by row" in name for name in names) == 1
    assert any("lambda 1.25" in name or "lambda 0.8" in name for name in names)

    summary = run(found.plan, tmp_path / "found", found=found)
    assert summary["ledger"]["spent"] == found.flops
    card = json.loads((tmp_path / "found" / "hyperllama.json").read_text())
    assert card["search"]["evaluations"] == found.evaluations and card["search"]["tried"] == found.rows
    measured = evaluate_folder(tmp_path / "found", files(models), [])["texts"]
    assert math.isclose(sum(t["bits_per_byte"] for t in measured.values()) / 2, means[0], rel_tol=1e-6)
    again = parse_recipe(found.plan.recipe.source, "again")
    run(plan(again, models), tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("found", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("budget", [1, 3, 9])
def test_a_budget_is_kept(models, budget):
    found = search(recipe(), files(models), budget, learn_texts=files(models, "-learn"), cwd=models)
    assert 1 <= found.evaluations <= budget and len(found.rows) <= budget
    planned = plan(recipe(), models)
    assert found.flops <= budget * Development(files(models), planned).flops


def test_candidates_are_what_the_models_allow(models, tmp_path):
    names = [c.describe() for c in candidates(recipe(), plan(recipe(), models))]
    assert names[:4] == ["task_arithmetic", "multislerp", "ties", "dare_ties"] and len(names) == 8
    alone = recipe(merge_method="linear", base_model=None)
    assert [c.method for c in candidates(alone, plan(alone, models))] == ["linear", "multislerp"]
    found = search(alone, files(models), 5, cwd=models)
    assert {row["merge"] for row in found.rows} == {"the recipe as given", "linear", "multislerp"}
    value = yaml.safe_load(Candidate("ties", lam=1.25).recipe(recipe(dtype="bfloat16")).source)
    assert value["dtype"] == "bfloat16" and value["parameters"] == {"lambda": 1.25, "normalize": True}
    assert value["models"][0]["parameters"] == {"weight": 1.0, "density": 0.5}


def test_the_command_writes_the_best_recipe_and_merges_by_it(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    (tmp_path / "r.yaml").write_text(recipe().source)
    out = tmp_path / "out"
    common = ["merge", str(tmp_path / "r.yaml"), str(out), "--search", "--evaluations", "6", "--quiet", "--json"]
    arguments = spread_lists([*common, "--dev", *map(str, files(models))])
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0 and json.loads(dry.output)["candidates"][0] == "task_arithmetic" and not out.exists()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    value = json.loads(result.output)
    assert value["evaluations"] == len(value["tried"]) == 6
    run(plan(read_recipe(out.with_name("out.yaml")), models), tmp_path / "again")
    one, two = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    refused = CliRunner().invoke(app, [*arguments[:2], str(tmp_path / "new"), *arguments[3:]])
    assert refused.exit_code == 0
    occupied = CliRunner().invoke(app, [*arguments[:2], str(tmp_path / "again"), *arguments[3:]])
    assert "again already exists" in str(occupied.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search"], "--search needs --dev FILE..., text to choose by"),
        (["--dev", "eng.jsonl"], "--dev and --learn are for --search"),
        (["--search", "--dev", "eng.jsonl", "--evaluations", "0"], "evaluations is 0; at least 1"),
        (["--search", "--dev", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_arguments_are_refused(models, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(models)
    (tmp_path / "r.yaml").write_text(recipe().source)
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--quiet", *arguments])
    assert isinstance(result.exception, HyperLlamaError) and message in str(result.exception)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.yaml").exists()


def test_slices_are_refused(models):
    sources = [{"model": f"{tag}/model", "layer_range": [0, 2], "parameters": {"weight": 1.0}} for tag in LANGUAGES]
    sliced = recipe(merge_method="linear", base_model=None, models=None, slices=[{"sources": sources}])
    with pytest.raises(HyperLlamaError, match="needs a recipe with 'models'"):
        search(sliced, files(models), 3, cwd=models)
