"""A study over two seeds, tiny: a sweep with equal trials, results that are gone on from, an article whose figures are theirs."""

import copy
import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml

from hyperllama.errors import HyperLlamaError
from hyperllama.experiment.article import article
from hyperllama.experiment.questions import Arms, closing, interval, pairs, verdict
from hyperllama.experiment.recipe import budgets, grid
from hyperllama.experiment.seeds import VARIANTS, describe_seeds, load_seeds, run_seeds
from tests.experiment.test_run import SETTINGS

ROOT = Path(__file__).parents[2]
RATES = [1e-3, 2e-2]


def recipe(folder: Path, **changes: Any) -> Path:
    settings = SETTINGS | {
        "out": str(folder / "out"), "results": str(folder / "results"), "article": str(folder / "study.md"),
        "seeds": [1, 2], "sweep": {"rates": RATES, "language": "swe", "seed": 9, "dev_bytes": 1500}, "dev_bytes": 1000,
        "merge_methods": ["linear", "token_counts", "regmean"], "learn": {"bytes": 600}, "dev_pairs": 6, "targets": ["swe"],
    }  # fmt: skip
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(settings | changes))
    return file


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    run_seeds(load_seeds(recipe(folder)))
    return folder


def results(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "results" / f"{name}.json").read_text())


def test_the_sweep_tries_every_group_equally_and_chooses_the_least(done: Path) -> None:
    sweep = results(done, "sweep")
    groups = {"base/1x", "base/2x", "base/2x-scratch", "adapt/1x", "adapt/1x-cloned", "adapt/2x"}
    assert set(sweep["chosen"]) == groups
    for group in groups:
        trials = [row for row in sweep["trials"] if row["group"] == group]
        assert [row["rate"] for row in trials] == RATES and len({row["flops"] for row in trials}) == 1
        assert sweep["chosen"][group] == min(trials, key=lambda row: row["bits_per_byte"])["rate"]
    assert sweep["flops"] == sum(row["flops"] for row in sweep["trials"])
    assert sweep["flops"] == describe_seeds(load_seeds(done / "study.yaml"))["training_flops"]["the sweep"]
    measured = (done / "out" / "sweep" / "dev" / "swe.jsonl").read_text().splitlines()
    assert measured and not set(measured) & set((done / "out" / "data" / "dev" / "swe.jsonl").read_text().splitlines())


def test_arms_train_at_the_rates_of_their_group(done: Path) -> None:
    chosen = results(done, "sweep")["chosen"]
    for arm in (row for row in results(done, "tuned-1")["models"] if row["spent"] and row["kind"] != "merge"):
        config = yaml.safe_load((done / "out" / "tuned-1" / "runs" / arm["id"] / "config.yaml").read_text())
        group = {"eng-seed": "base/1x", "joint-2x-scratch": "base/2x-scratch"}.get(
            arm["id"], f"{'base' if arm['kind'] == 'base' else 'adapt'}/{arm['family']}"
        )
        assert config["optimizer"]["lr"] == chosen[group]
        single = yaml.safe_load((done / "out" / "single-1" / "runs" / arm["id"] / "config.yaml").read_text())
        assert single["optimizer"]["lr"] == SETTINGS["optimizer"]["lr"]


def test_seeds_share_text_and_budgets_and_differ_in_results(done: Path) -> None:
    one, two = results(done, "single-1"), results(done, "single-2")
    assert one["equal"] == two["equal"] and one["budgets"] == two["budgets"]
    assert [row["total"] for row in one["models"]] == [row["total"] for row in two["models"]]
    assert one["models"][0]["eval"]["eng"]["bits_per_byte"] != two["models"][0]["eval"]["eng"]["bits_per_byte"]
    assert not (done / "out" / "single-1" / "shards").exists()


def test_committed_results_are_gone_on_from_without_their_models(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "results", tmp_path / "results")
    config = load_seeds(recipe(tmp_path))
    found = run_seeds(config)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "study.md").read_text() == (done / "study.md").read_text() == article(found)
    assert len(describe_seeds(config)["finished"]) == 5
    with pytest.raises(HyperLlamaError, match=r"sweep.json is of another adapt_tokens \(1792, now 3584\)"):
        run_seeds(load_seeds(recipe(tmp_path, adapt_tokens=3584)))


def test_a_run_that_would_be_the_same_is_copied(done: Path, tmp_path: Path) -> None:
    """With the one rate as the only one tried, the tuned grid is the single one: nothing is trained twice."""
    lr = SETTINGS["optimizer"]["lr"]
    sweep = {"rates": [lr], "language": "swe", "seed": 9, "dev_bytes": 1500}
    config = load_seeds(recipe(tmp_path, seeds=[1], sweep=sweep, families=["1x"]))
    run_seeds(config)
    single, tuned = (tmp_path / "out" / f"{variant}-1" / "runs" for variant in ("single", "tuned"))
    for run in single.iterdir():
        assert (tuned / run.name / "run.json").read_bytes() == (run / "run.json").read_bytes()  # its seconds too
    one, two = results(tmp_path, "single-1"), results(tmp_path, "tuned-1")
    assert one["models"] == two["models"]
    (tmp_path / "results" / "tuned-1.json").unlink()
    run_seeds(config)  # goes on over what was copied
    assert results(tmp_path, "tuned-1")["models"] == two["models"]


def test_the_articles_figures_are_the_results(done: Path) -> None:
    text = (done / "study.md").read_text()
    arms = [Arms(results(done, f"tuned-{seed}")) for seed in (1, 2)]
    own = [
        100 * (mean(a.bits(f"{t}-2x", t) for t in a.targets) / mean(a.bits(f"{t}-1x", t) for t in a.targets) - 1)
        for a in arms
    ]
    middle, half = mean(own), 12.706 * abs(own[0] - own[1]) / 2
    shown = f"{middle:+.1f} % [{middle - half:+.1f}, {middle + half:+.1f}]".replace("-", "\N{MINUS SIGN}")
    assert f"| 2x against 1x, a model a language | {shown} |" in text
    assert f"{results(done, 'sweep')['flops']:,}" in text and "2 at one rate for all arms" in text
    assert f"**{arms[0].seed['budgets']['english']}" not in text and f"{arms[0].seed['budgets']['english']:,}" in text


def test_intervals_are_students() -> None:
    middle, half = interval([1.0, 2.0, 3.0])
    assert middle == 2 and half == pytest.approx(4.303 / 3**0.5)
    assert interval([1.0]) == (1.0, None)
    assert verdict([-1.0]) == verdict([-1.0, 1.0]) == "undecided"
    assert verdict([-1.0, -1.1, -0.9]) == "better" and verdict([1.0, 1.1, 0.9]) == "worse"


def test_the_gap_to_joint_training_is_closed_by_what_it_is_closed_by(done: Path) -> None:
    """Bits typed in: the paper's best 3.0, joint training 2.0, and a merge in between; the other seed half of it."""
    seeds = [copy.deepcopy(results(done, f"single-{seed}")) for seed in (1, 2)]
    for seed, ours in zip(seeds, (2.6, 2.8), strict=True):
        rows = {row["id"]: row for row in seed["models"]}
        typed = {"merge-linear-1x": 3.0, "joint-1x": 2.0, "merge-token_counts-1x": ours, "merge-regmean-1x": 3.5}
        for name, bits in typed.items():
            rows[name]["eval"]["swe"] = rows[name]["eval"]["swe"] | {"bits_per_byte": bits}
    counts, mean_squares, *_ = closing([Arms(seed) for seed in seeds])
    assert (counts.family, counts.method, counts.spent) == ("1x", "token_counts", 0)
    assert counts.closed == pytest.approx([40, 20]) and mean_squares.closed == pytest.approx([-50, -50])
    assert counts.difference == pytest.approx([100 * (2.6 / 3 - 1), 100 * (2.8 / 3 - 1)])
    regmean = next(row for row in seeds[0]["models"] if row["id"] == "merge-regmean-1x")
    assert mean_squares.spent == pytest.approx(100 * regmean["spent"] / regmean["inherited"]) and regmean["spent"] > 0
    text = article({"sweep": results(done, "sweep"), "seeds": {"single": seeds, "tuned": []}})
    assert "| 1x: token counts | \N{MINUS SIGN}10.0 % [" in text and "| 30 % [" in text


def test_minimal_pairs_are_told_by_family_with_intervals(done: Path) -> None:
    seeds = [copy.deepcopy(results(done, f"single-{seed}")) for seed in (1, 2)]
    for seed, right in zip(seeds, (0.5, 0.6), strict=True):
        for row in seed["models"]:
            assert all(cell["pairs"] == 6 for cell in row["eval"].values())
            row["eval"]["swe"]["accuracy"] = right + 0.1 * (row["id"] == "swe-2x")
    found = pairs([Arms(seed) for seed in seeds])
    assert found["1x", "a model a language"][0] == pytest.approx([50, 60])
    assert found["2x against 1x", "a model a language"][0] == pytest.approx([10, 10])
    text = article({"sweep": results(done, "sweep"), "seeds": {"single": seeds, "tuned": []}})
    assert f"| 1x, a model a language | 55.0 [{55 - 12.706 * 5:.1f}, {55 + 12.706 * 5:.1f}] |".replace(
        "-", "\N{MINUS SIGN}"
    ) in text.replace("1x\N{MINUS SIGN}", "1x-")
    assert "| 2x against 1x, a model a language | +10.0 [+10.0, +10.0] |" in text
    del seeds[0]["models"][0]["eval"]["swe"]["accuracy"]
    assert pairs([Arms(seed) for seed in seeds]) == {}


def test_an_article_of_one_seed_decides_nothing_and_one_of_none_says_so(done: Path) -> None:
    found = {"sweep": results(done, "sweep"), "seeds": {"single": [results(done, "single-1")], "tuned": []}}
    text = article(found)
    assert (
        "Seeds finished: 1 at one rate for all arms." in text
        and "| better |" not in text
        and "[" not in text.split("## ")[3]
    )
    assert "No seed is finished" in article({"sweep": found["sweep"], "seeds": {"single": [], "tuned": []}})


def test_groups_that_are_not_equal_are_refused(done: Path) -> None:
    wrong = copy.deepcopy(results(done, "single-1"))
    next(row for row in wrong["models"] if row["id"] == "swe-2x")["total"] += 1
    with pytest.raises(HyperLlamaError, match="swe-2x is not at the"):
        article({"sweep": results(done, "sweep"), "seeds": {"single": [wrong], "tuned": []}})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sweep": {"rates": RATES, "language": "isl"}}, "sweep.language: 'isl' is none of the targets"),
        ({"rates": {"adapt/3x": 1e-3}}, "rates: 'adapt/3x' is unknown; did you mean"),
        ({"rates": {"adapt/1x": 1e-3}}, "rates: the sweep chooses them"),
        ({"sweep": {"rates": RATES, "language": "swe"}, "dev_bytes": 10**9}, "leaves no development text of eng"),
    ],
)
def test_a_bad_recipe_is_refused_before_training(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HyperLlamaError, match=sentence):
        run_seeds(load_seeds(recipe(tmp_path, **changes)))
    assert not list(tmp_path.rglob("runs"))


def test_the_recipe_that_comes_along_has_a_plan(tmp_path: Path) -> None:
    config = load_seeds(ROOT / "recipes" / "study.yaml", [f"results={tmp_path}"])
    plan = describe_seeds(config)
    arms = grid(config, budgets(config, config.model.resolve(config.vocab, config.seq_len)))
    assert plan["training_flops"]["a seed at one set of rates"] == sum(arm.flops for arm in arms)


def test_the_committed_article_is_written_from_the_committed_results() -> None:
    """Of every seed that is there: at least the first one whole."""
    config = load_seeds(ROOT / "recipes" / "study.yaml")
    folder = ROOT / config.results
    names = [f"{variant}-{seed}.json" for seed in config.seeds for variant in VARIANTS]
    there = [name for name in names if (folder / name).is_file()]
    assert set(names[:2]) <= set(there) and {path.name for path in folder.iterdir()} == {*there, "sweep.json"}
    kept = {v: [json.loads((folder / name).read_text()) for name in there if name.startswith(v)] for v in VARIANTS}
    sweep = json.loads((folder / "sweep.json").read_text())
    assert (ROOT / config.article).read_text() == article({"sweep": sweep, "seeds": kept})
    described = config.model_copy(update={"results": str(folder)})
    assert describe_seeds(described)["finished"] == [*there, "sweep.json"]  # a study goes on from what is committed
