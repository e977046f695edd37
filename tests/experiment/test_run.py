"""A whole study, tiny: every arm at exactly equal FLOPs, resumable, the same bytes twice, folders that transformers loads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hyperllama.errors import HyperLlamaError
from hyperllama.experiment.recipe import FAMILIES, load_experiment
from hyperllama.experiment.run import curve, describe, run_experiment
from hyperllama.flops import window_flops
from hyperllama.hub import open_folder

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "sample": {"bytes_per_language": 40_000, "dev_bytes": 3_000, "pairs": 12},
    "targets": ["swe", "fas"],
    "vocab": 512,
    "model": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
    "seq_len": 32,
    "global_batch": 4,
    "micro_batch": 4,
    "optimizer": {"lr": 3e-3},
    "schedule": {"warmup_steps": 2},
    "english_tokens": 8960,
    "adapt_tokens": 1792,
    "merge_methods": ["linear", "ties", "token_counts", "adam_v_learnt_by_row", "regmean"],
    "learn": {"bytes": 800, "steps": 2, "windows": 6},
    "dev_bytes": 1500,
}
LEARNT = {f"merge-{method}-{family}" for method in ("adam_v_learnt_by_row", "regmean") for family in FAMILIES}


def recipe(folder: Path, **changes: Any) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | {"out": str(folder / "out")} | changes))
    return file


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run_experiment(load_experiment(recipe(folder)))
    return folder / "out"


@pytest.fixture(scope="module")
def results(study):
    return json.loads((study / "results.json").read_text())


def test_compared_arms_end_at_the_same_integer(results):
    rows = {row["id"]: row for row in results["models"]}
    spend = results["budgets"]
    assert [group["flops"] for group in results["equal"]] == [
        spend["english"], spend["english"] + spend["adapt"], *[spend["english"] + 2 * spend["adapt"]] * 2,
    ]  # fmt: skip
    ids = [set(group["ids"]) for group in results["equal"]]
    assert ids[0] == {"eng-1x", "eng-2x", "eng-2x-scratch"}
    assert ids[1] == {f"{tag}-{family}" for tag in ("swe", "fas") for family in FAMILIES}
    merges = {f"merge-{method}-{family}" for method in ("linear", "ties", "token_counts") for family in FAMILIES}
    assert ids[2] == merges | {f"joint-{family}" for family in (*FAMILIES, "2x-scratch")}
    for group in results["equal"][:3]:
        assert group["by"] == "total"
        assert all(rows[name]["spent"] + rows[name]["inherited"] == group["flops"] for name in group["ids"])
    assert all(
        row["spent"] == 0 for row in results["models"] if row["kind"] in ("clone", "merge") and row["id"] not in LEARNT
    )


def test_a_merge_that_reads_text_is_equal_but_for_what_that_cost(study, results):
    """Steps x windows of training for what is learnt, and its total lies beyond the joint runs' by that much."""
    rows, group = {row["id"]: row for row in results["models"]}, results["equal"][3]
    assert set(group["ids"]) == LEARNT and group["by"] == "inherited"
    for name in LEARNT:
        assert rows[name]["inherited"] == group["flops"] == rows["joint-1x"]["total"]
        assert rows[name]["total"] == group["flops"] + rows[name]["spent"] > group["flops"]
    config = load_experiment(recipe(study.parent))
    shape = config.model.resolve(config.vocab, config.seq_len)
    assert rows["merge-adam_v_learnt_by_row-1x"]["spent"] == 2 * 6 * window_flops(shape, 32)
    assert rows["merge-adam_v_learnt_by_row-2x"]["spent"] == 2 * 6 * window_flops(shape.grown(2), 32)


def test_text_to_learn_on_is_not_measured(study, results):
    for tag in results["languages"]:
        measured, learnt = ((study / "dev" / f"{tag}{kind}.jsonl").read_text().splitlines() for kind in ("", ".learn"))
        assert measured and learnt and not set(measured) & set(learnt)
    recipe = yaml.safe_load((study / "merges" / "merge-adam_v_learnt_by_row-2x.yaml").read_text())
    assert recipe["hyperllama"]["learn"]["texts"] == [
        str(study / "dev" / f"{tag}.learn.jsonl") for tag in results["languages"]
    ]


def test_every_model_is_measured_on_every_language(results):
    for row in results["models"]:
        assert list(row["eval"]) == ["eng", "swe", "fas"]
        assert all(cell["bits_per_byte"] > 0 and 0 <= cell["accuracy"] <= 1 for cell in row["eval"].values())


def test_cloned_arms_and_their_merges_start_from_the_one_clone(study):
    assert sorted(path.name for path in (study / "clones").iterdir()) == ["eng-1x-cloned", "eng-seed-cloned"]
    clone = open_folder(study / "clones" / "eng-1x-cloned")
    for tag in ("swe", "fas"):
        assert str(clone.path) in json.dumps(
            open_folder(study / "runs" / f"{tag}-1x-cloned" / "model").card["made_from"]
        )
    merge = yaml.safe_load((study / "merges" / "merge-ties-1x-cloned.yaml").read_text())
    assert merge["base_model"] == str(clone.path)


def test_a_clone_measures_as_its_source_does(results):
    rows = {row["id"]: row for row in results["models"]}
    for tag, cell in rows["eng-1x"]["eval"].items():
        assert rows["eng-1x-cloned"]["eval"][tag]["nll_nats"] == pytest.approx(cell["nll_nats"], rel=1e-5)


def test_transformers_loads_base_grown_and_merged(study, results):
    for row in results["models"]:
        if row["kind"] in ("base", "clone", "merge"):
            _, report = AutoModelForCausalLM.from_pretrained(study / row["path"], output_loading_info=True)
            assert not any(report.values())


def test_there_is_a_report_with_plots(study):
    names = {path.name for path in study.iterdir()}
    assert {"report.html", "loss.png", "forgetting.png", "merges.png", "ledger.csv", "results.json"} <= names


def test_interrupted_and_resumed_elsewhere_it_gives_the_same_bytes(study, tmp_path):
    """Ctrl-C in an arm, SIGTERM with two jobs, then SIGKILL in a later arm, then to the end by two, in another folder."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hyperllama", "experiment", str(recipe(tmp_path))]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for arm, jobs, number, code in (
        ("eng-1x", 1, signal.SIGINT, 130), ("fas-1x", 2, signal.SIGTERM, 143), ("fas-2x", 1, signal.SIGKILL, -9)
    ):  # fmt: skip
        process = subprocess.Popen(
            [*command, "--jobs", str(jobs)], cwd=ROOT, env=threads, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not (out / "runs" / arm / "metrics.jsonl").is_file():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert not (out / "results.json").exists()
    done = subprocess.run([*command, "--jobs", "2"], cwd=ROOT, env=threads, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("results.json", "report.html", "evaluation.csv", "loss.png"):
        assert (out / name).read_bytes() == (study / name).read_bytes()


def test_a_curve_counts_every_window_once_and_its_last_point_is_no_single_window(tmp_path):
    file = tmp_path / "metrics.jsonl"
    windows = [4 * i for i in range(1, 500)] + [4 * 499 + 1]
    lines = [
        {"batch": min(4, windows[-1] - 4 * i), "total_flops": 10 * w, "loss": 9.0 if w == windows[-1] else i % 2}
        for i, w in enumerate(windows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = curve(file)
    assert len(points) == 166 and points[-1][0] == 10 * windows[-1]
    ends = [point[0] / 10 for point in points]
    weights = [end - before for end, before in zip(ends, [0, *ends], strict=False)]
    mean = sum(w * loss for w, (_, loss) in zip(weights, points, strict=True)) / sum(weights)
    assert mean == pytest.approx((4 * 249 + 9) / windows[-1], abs=1e-6)
    assert points[-1][1] < 2
    lines.insert(7, {"batch": 4, "total_flops": 0, "loss": None})  # a step that was skipped
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve(file) == points


def test_another_recipe_is_refused_in_the_same_folder(study):
    before = (study / "experiment.yaml").read_bytes()
    with pytest.raises(HyperLlamaError, match="holds a study with another seed"):
        run_experiment(load_experiment(study.parent / "study.yaml", ["seed=1"]))
    assert (study / "experiment.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sample": None}, "either sample"),
        ({"targets": ["eng"]}, "targets must be different languages"),
        ({"adapt_tokens": 40}, "adapt_tokens is 40, but budgets that all arms share are multiples of"),
        ({"dev_bytes": 10**9}, "leaves no development text of eng for merges to learn on: lower it"),
        ({"merge_methods": ["lineer"]}, "merge_methods: 'lineer' is unknown; did you mean 'linear'"),
        ({"merge_method": []}, "unknown key merge_method; did you mean 'merge_methods'"),
        ({"sample": None, "corpus": "nowhere"}, "text/eng has no train.jsonl"),
    ],
)
def test_a_bad_study_is_refused_before_any_work(tmp_path, changes, sentence):
    with pytest.raises(HyperLlamaError, match=sentence):
        run_experiment(load_experiment(recipe(tmp_path, **changes)))
    assert not list(tmp_path.rglob("runs"))


@pytest.mark.parametrize("name", ["demo", "real-text"])
def test_the_recipes_that_come_along_have_a_plan(tmp_path, name):
    for language in ("eng", "est", "fao", "fas", "isl", "swe"):
        (tmp_path / "text" / language).mkdir(parents=True)
        for part in ("train", "dev"):
            (tmp_path / "text" / language / f"{part}.jsonl").touch()
    corpus = [f"corpus={tmp_path}"] if name == "real-text" else []
    plan = describe(load_experiment(ROOT / "recipes" / f"{name}.yaml", corpus))
    assert plan["training_flops"] == sum(arm["flops"] for arm in plan["arms"]) and len(plan["merges"]) == 9
    assert all(arm["flops"] % plan["budgets"]["quantum"] == 0 for arm in plan["arms"])
