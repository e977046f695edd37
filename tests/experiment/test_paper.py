"""The table of the paper's runs against facts written down again; every merge planned; the grid in tiny, run and resumed."""

import json
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from hyperllama.config import RunConfig, load_run
from hyperllama.data.recipe import load_data_recipe
from hyperllama.errors import HyperLlamaError
from hyperllama.experiment.campaign import commands, describe, finished, gpu_hours, levels, run_grid, write_recipes
from hyperllama.experiment.paper import Grid, Run, load_paper, merge_values, paper_grid, run_values
from hyperllama.flops import window_flops
from hyperllama.merge import read_recipe
from hyperllama.merge.planner import Outline, plan_outlines
from hyperllama.settings import validated
from hyperllama.train.schedule import decay_steps, lr_ratio
from tests.study import SEQ_LEN

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "recipes" / "paper.yaml"
TEXT = {"english": "eng", "estonian": "swe", "swedish": "swe"}  # of the tiny grid

# steps, warm-up, decay start, decay steps, GPUs, nominal tokens, tokens of distinct windows, checkpoint, starts of stages, seeds
BASE = (15244, 30, 12194, 3050, 32, 159_844_925_440, 159_817_244_672, 2500, [1, 320, 639], [42, 42, 42])
ENGLISH = (3572, 10, 2822, 750, 32, 37_455_134_720, 37_454_448_640, 2500, [1], [42])
TEXTS = {
    "estonian": (7087, 15, 5667, 1420, 16, 74_312_581_120, 74_287_671_296, 250,
                 [1, 1592, 3183, 4774, 6365], [42, 137, 59, 888, 10]),
    "faroese": (144, 10, 114, 30, 16, 1_509_949_440, 1_477_324_800, 24, [1, 25, 49, 73, 97, 121], [42, 137, 59, 888, 10, 903]),
    "icelandic": (2514, 10, 2004, 510, 16, 26_361_200_640, 26_305_953_792, 250,
                  [1, 420, 839, 1258, 1677, 2096], [42, 137, 59, 888, 10, 903]),
    "persian": (5928, 15, 4738, 1190, 16, 62_159_585_280, 62_149_844_992, 250, [1], [42]),
    "swedish": (6279, 15, 5019, 1260, 16, 65_840_087_040, 65_834_346_496, 250, [1], [42]),
    "multilingual": (21940, 45, 17550, 4390, 32, 230_057_574_400, 230_056_028_160, 250, [1], [42]),
}  # fmt: skip
LAST_ROWS = {"estonian": [2825, 2825, 2825, 2825, 2137], "faroese": [2465] * 6, "icelandic": [624] * 6, "persian": [364],
             "swedish": [2317], "multilingual": [4365]}  # fmt: skip
FACTS: dict[str, tuple[str | None, Any]] = {
    "180M-english-1x-base": (None, BASE),
    "180M-english-1x": ("runs/180M-english-1x-base/model", ENGLISH),
    "572M-english-2x": ("clones/180M-english-1x-base-cloned", ENGLISH),
}
for language, facts in TEXTS.items():
    FACTS[f"180M-{language}-1x"] = ("runs/180M-english-1x/model", facts)
    FACTS[f"572M-{language}-1x-cloned"] = ("clones/572M-english-1x-cloned", facts)
    FACTS[f"572M-{language}-2x"] = ("runs/572M-english-2x/model", facts)


@pytest.fixture(scope="module")
def grid() -> Grid:
    return paper_grid(load_paper(TABLE))


@pytest.fixture(scope="module")
def written(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "recipes"
    assert write_recipes(grid, folder) == {"data": 23, "runs": 21, "merges": 390}
    return folder


def run_of(grid: Grid, name: str) -> Run:
    task = grid.tasks[name]
    assert isinstance(task, Run)
    return task


def test_there_are_21_runs(written: Path) -> None:
    assert len(FACTS) == 21 and {file.stem for file in (written / "runs").iterdir()} == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_a_run_resolves_to_the_papers_numbers(grid: Grid, written: Path, name: str) -> None:
    start, (steps, warmup, decay_start, decay, gpus, nominal, distinct, checkpoint, starts, seeds) = FACTS[name]
    recipe, run = load_run(written / "runs" / f"{name}.yaml"), run_of(grid, name)
    small = name.startswith("180M")
    assert recipe.init_from == (f"runs/paper/{start}" if start else None)
    assert recipe.budget.steps == steps and steps * recipe.global_batch * recipe.data.seq_len == nominal
    assert recipe.schedule.warmup_steps == warmup and recipe.schedule.offset == 1 and recipe.schedule.kind == "paper"
    assert decay_steps(recipe.schedule, steps) == decay and steps - decay == decay_start
    assert lr_ratio(recipe.schedule, 1, steps) == 0 and lr_ratio(recipe.schedule, steps, steps) == pytest.approx(
        1 / decay
    )
    assert lr_ratio(recipe.schedule, decay_start + 1, steps) == 1 > lr_ratio(recipe.schedule, decay_start + 2, steps)
    assert lr_ratio(recipe.schedule, warmup, steps) < 1 == lr_ratio(recipe.schedule, warmup + 1, steps)
    assert recipe.global_batch == 5120 and recipe.data.seq_len == 2048 and recipe.micro_batch == (8 if small else 4)
    accumulation = {(32, 8): 20, (32, 4): 40, (16, 8): 40, (16, 4): 80}[gpus, recipe.micro_batch]
    assert run.row.gpus == gpus and gpus * accumulation * recipe.micro_batch == 5120
    assert recipe.checkpoint.every_steps == checkpoint and recipe.seed == 42
    assert [stage.start for stage in run.stages] == starts and [stage.seed for stage in run.stages] == seeds
    assert sum(sum(stage.windows.values()) for stage in run.stages) * 2048 == distinct
    o = recipe.optimizer
    assert (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.clip_norm) == (3e-3, 0.9, 0.95, 1e-8, 0.01, 1.0)
    assert o.decay == "all" and o.z_loss == 0 and recipe.precision == "bf16" and recipe.rope_tables == "bf16"
    assert recipe.loss_mean == "micro_batch" and recipe.parallel == "ddp" and recipe.data.documents == "across"
    assert recipe.data.mask_document_start and recipe.grow is None
    assert recipe.data.stages is not None and recipe.data.order == "nanotron" and recipe.data.nanotron_tail is not None
    assert [stage.start_step for stage in recipe.data.stages] == starts
    assert [stage.seed for stage in recipe.data.stages] == seeds
    read = [[Path(source.path).name for source in stage.sources] for stage in recipe.data.stages]
    assert read == [list(stage.windows) for stage in run.stages]
    assert recipe.data.nanotron_tail.processes == gpus and recipe.data.nanotron_tail.micro_batch == recipe.micro_batch
    cost = 3_082_108_796_928 if small else 8_773_410_226_176
    assert run.flops == cost * 5120 * steps


def test_the_base_has_the_papers_small_shape(grid: Grid, written: Path) -> None:
    recipe = load_run(written / "runs" / "180M-english-1x-base.yaml")
    assert recipe.model is not None
    small = recipe.model.resolve(128256, 2048)
    large = small.grown(2)
    for shape, (width, ffn, q, kv, head) in ((small, (576, 1536, 9, 3, 1)), (large, (1152, 3072, 18, 6, 2))):
        assert (shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.num_kv_heads) == (width, ffn, q, kv)
        assert (shape.num_layers, shape.head_dim, shape.vocab_size, shape.lm_head_normalization_factor) == (
            30,
            64,
            128256,
            head,
        )
        assert (shape.activation, shape.tie_embeddings, shape.rms_norm_eps, shape.rope_theta) == (
            "gelu",
            True,
            1e-5,
            10_000,
        )
        assert shape.max_position_embeddings == 2048 and shape.initializer_range == 1 / 24
    assert (small.num_parameters, large.num_parameters) == (180_078_912, 572_494_464)
    assert list(grid.shapes.values()) == [small, large]


def test_stages_have_the_papers_windows(grid: Grid) -> None:
    base = run_of(grid, "180M-english-1x-base").stages
    assert [list(stage.windows.values()) for stage in base] == [[1628995], [1628995], [36571498, 36577281, 1628995]]
    assert base[0].windows.keys() == base[1].windows.keys()
    assert [stage.windows for stage in run_of(grid, "180M-english-1x").stages] == [{"english": 18288305}]
    windows = {
        "estonian": [(8005170, 124361, 14094)] * 4 + [(3635611, 56667, 6499)],
        "faroese": [(112137, 7287, 801)] * 6,
        "icelandic": [(2100119, 36510, 4155)] * 6,
        "persian": [(29543659, 722043, 80902)],
        "swedish": [(31334642, 729355, 81680)],
        "multilingual": [(112332045,)],
    }
    for language, passes in windows.items():
        for name in (f"180M-{language}-1x", f"572M-{language}-1x-cloned", f"572M-{language}-2x"):
            assert [tuple(stage.windows.values()) for stage in run_of(grid, name).stages] == passes
        rows = [sum(stage.windows.values()) % 5120 for stage in run_of(grid, f"180M-{language}-1x").stages]
        assert rows == LAST_ROWS[language]


def test_every_source_of_a_run_has_a_data_recipe_of_the_papers_share(grid: Grid, written: Path) -> None:
    recipes = {file.stem: load_data_recipe(file) for file in (written / "data").iterdir()}
    windows = {name: count for run in grid.runs for stage in run.stages for name, count in stage.windows.items()}
    assert recipes.keys() == windows.keys()
    assert all(recipe.out == f"shards/{name}" and recipe.tokenizer == "tokenizer" for name, recipe in recipes.items())
    for name, share in {"persian": 0.99, "estonian": 0.17, "icelandic": 0.05, "faroese": 0.01, "swedish": 1}.items():
        for kind, swedish, of in (("english", 0.01, 729355), ("code", 0.05, 81680)):
            (source,) = recipes[f"{kind}-replay-{name}"].sources
            assert source.fraction == pytest.approx(swedish * share)
            assert windows[f"{kind}-replay-{name}"] / of == pytest.approx(share, rel=0.03)
    halves = [recipes[f"english-base-{half}"].sources[0] for half in (1, 2)]
    assert [(half.skip, half.fraction, half.drop_ids) for half in halves] == [
        (None, 0.5, "ids/test_ids.txt"), (0.5, None, "ids/test_ids.txt"),
    ]  # fmt: skip
    for name in ("estonian", "english-replay-estonian", "code-replay-estonian"):
        part, whole = (recipes[f"{name}{end}"].sources[0].fraction or 1.0 for end in ("-part", ""))
        assert part / whole == pytest.approx(windows[f"{name}-part"] / windows[name], rel=0.01)
    mixed = recipes["multilingual"]
    passes = Counter(str(source.name).split(",")[0] for source in mixed.sources)
    assert passes["estonian"] == 4 and passes["faroese"] == passes["icelandic"] == 6 and passes["swedish"] == 1
    assert mixed.shuffle and sum(windows[name] * times for name, times in passes.items()) == 112_331_612


def test_all_390_merges_parse_and_plan_onto_their_true_parents(grid: Grid, written: Path) -> None:
    shapes = {"180M": grid.shapes["180M"], "572M": grid.shapes["572M"]}
    outlines = {grid.folder(name): Outline(shapes[grid.size_of(name)]) for name in grid.tasks}
    seen: dict[tuple[str, str, int], int] = {}
    languages = [language for language in TEXTS if language != "multilingual"]
    parents = {
        "1x": "runs/180M-english-1x/model",
        "1x-cloned": "clones/572M-english-1x-cloned",
        "2x": "runs/572M-english-2x/model",
    }
    found = set()
    for file in sorted(written.glob("merges/*/*.yaml")):
        recipe, family = read_recipe(file), file.parent.name
        steps = plan_outlines(recipe, outlines)
        assert len(steps) == 2 + 30 * 9 and {step.dtype for step in steps} == {"float16"}
        assert steps[0].shape == (128256, 576 if family == "1x" else 1152)
        members = tuple(model.model.split("-")[1] for model in recipe.models or [])
        assert members == tuple(language for language in languages if language in members)
        assert all(model.model.endswith(f"-{family}/model") for model in recipe.models or [])
        based = recipe.merge_method in ("task_arithmetic", "ties", "dare_ties")
        assert recipe.base_model == (f"runs/paper/{parents[family]}" if based else None)
        density = {"density": 0.5} if based else {}
        assert all(model.parameters == {"weight": 1.0} | density for model in recipe.models or [])
        assert recipe.parameters == {"normalize": True, "int8_mask": True} and recipe.dtype == "float16"
        found.add((recipe.merge_method, family, members))
        seen[recipe.merge_method, family, len(members)] = seen.get((recipe.merge_method, family, len(members)), 0) + 1
    methods = ("linear", "multislerp", "task_arithmetic", "ties", "dare_ties")
    subsets = [set_ for count in (2, 3, 4, 5) for set_ in combinations(languages, count)]
    assert len(subsets) == 26 and found == {(m, f, s) for m in methods for f in parents for s in subsets}
    for method in methods:
        for family in parents:
            assert [seen[method, family, count] for count in (2, 3, 4, 5)] == [10, 10, 5, 1]


def test_the_published_bases_are_an_option() -> None:
    """Every 2x merge names the cloned English model, but for two: ties and dare_ties of all five."""
    grid = paper_grid(load_paper(TABLE, ["merges.bases=published"]))
    based = [merge for merge in grid.merges if merge.base]
    assert len(based) == 3 * 78
    bases = {family: [merge for merge in based if merge.family == family] for family in ("1x", "1x-cloned", "2x")}
    assert {merge.base for merge in bases["1x"]} == {"180M-english-1x"}
    assert [merge.base for merge in bases["1x-cloned"]] == ["572M-english-1x-cloned"] * 78
    other = [(merge.method, len(merge.models)) for merge in bases["2x"] if merge.base != "572M-english-1x-cloned"]
    assert other == [("ties", 5), ("dare_ties", 5)]
    assert {merge.base for merge in bases["2x"]} == {"572M-english-1x-cloned", "572M-english-2x"}


def test_arms_at_equal_flops_are_the_same_integer() -> None:
    grid = paper_grid(load_paper(TABLE, ["extra.matched=true", "extra.milestones=true"]))
    quantum = 538 * 3_082_108_796_928
    assert quantum == 189 * 8_773_410_226_176
    assert len(grid.runs) == 21 + 13
    for language in ("english", *TEXTS):
        small = run_of(grid, f"180M-{language}-1x")
        steps = -(-small.flops // (5120 * 3_082_108_796_928))
        assert steps == (ENGLISH if language == "english" else TEXTS[language])[0]  # less than a step is given up
        for family in ("2x",) if language == "english" else ("1x-cloned", "2x"):
            matched, full = run_of(grid, f"572M-{language}-{family}-matched"), run_of(grid, f"572M-{language}-{family}")
            assert matched.flops == small.flops and small.flops % quantum == 0
            assert grid.total(matched.id) == grid.total(small.id) < grid.total(full.id)
            recipe = validated(RunConfig, run_values(grid, matched), matched.id)
            steps = -(-matched.flops // (5120 * 8_773_410_226_176))
            assert decay_steps(recipe.schedule, steps) / steps == pytest.approx(small.decay, abs=0.6 / steps)
            assert full.milestones == small.milestones
            for flops in full.milestones:
                assert (
                    flops % (5120 * 3_082_108_796_928) == flops % (5120 * 8_773_410_226_176) == 0 < flops <= small.flops
                )
    assert run_of(grid, "572M-estonian-2x-matched").start == "572M-english-2x-matched"
    assert run_of(grid, "572M-estonian-1x-cloned-matched").start == "572M-english-1x-cloned"
    assert run_of(grid, "180M-estonian-1x").milestones == (13 * quantum * 5120,)


def test_noise_carried_moments_and_language_aware_merges_are_arms_of_their_own(tmp_path: Path) -> None:
    changes = ["extra.noise_db=10.0", "extra.carried=true", "extra.language_aware=true", "merges.methods=[linear]"]
    grid = paper_grid(load_paper(TABLE, changes))
    assert len(grid.runs) == 21 + 7 + 1 and len(grid.merges) == 78 + 78
    write_recipes(grid, tmp_path / "recipes")
    noisy = load_run(tmp_path / "recipes/runs/572M-swedish-1x-cloned-noise.yaml")
    assert noisy.init_from == "runs/paper/clones/572M-english-1x-cloned-noise" and noisy.export.adam_v
    carried = load_run(tmp_path / "recipes/runs/572M-english-2x-carried.yaml")
    base, english = run_of(grid, "180M-english-1x-base").flops, run_of(grid, "572M-english-2x").flops
    assert carried.grow is not None and carried.grow.at_flops == base and carried.grow.optimizer == "carry"
    assert carried.budget.flops == base + english == grid.total("572M-english-2x")
    aware = read_recipe(tmp_path / "recipes/merges/2x/language_aware-572M-2x-persian-swedish.yaml")
    assert [entry.by for entry in aware.hyperllama.importance] == ["token_counts", "adam_v"]


def test_hours_are_measured_where_throughput_is_given_and_said_to_be_an_estimate_elsewhere() -> None:
    grid = paper_grid(load_paper(TABLE, ["sizes.180M.throughput=100000"]))
    hours, measured = gpu_hours(grid, run_of(grid, "180M-faroese-1x"))
    assert measured and hours == pytest.approx(1_509_949_440 / 100_000 / 3600)
    hours, measured = gpu_hours(grid, run_of(grid, "572M-faroese-2x"))
    causal = 7_904_104_022_016 * 144 * 5120
    assert not measured and hours == pytest.approx(causal / (0.4 * 989.4e12) / 3600)
    assert "estimate" in describe(grid)["gpu_hours_are"]
    both = paper_grid(load_paper(TABLE, ["sizes.180M.throughput=100000", "sizes.572M.throughput=4e4"]))
    assert describe(both)["gpu_hours_are"] == "from measured throughput"


def test_every_task_comes_after_what_it_needs_and_stages_are_independent(grid: Grid) -> None:
    done: set[str] = set()
    for level in levels(grid):
        assert all(set(grid.tasks[name].needs) <= done for name in level)
        done |= set(level)
    assert done == set(grid.tasks)
    assert [len(level) for level in levels(grid)] == [1, 2, 8, 12 + 130, 260]
    plan = describe(grid)
    assert plan["training_flops"] == sum(run.flops for run in grid.runs) and plan["merges"]["total"] == 390


@pytest.mark.parametrize("how", ["torchrun", "slurm"])
def test_the_printed_commands_are_a_script_that_names_every_recipe(grid: Grid, how: str, tmp_path: Path) -> None:
    script = commands(grid, "recipes", how)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    for name in FACTS:
        assert script.count(f"train.py recipes/runs/{name}.yaml") == 1
    assert script.count("hyperllama grow") == 2 and script.count("hyperllama merge") == 3
    if how == "slurm":  # a job gets a number, and later ones name it
        fake = 'n=0; sbatch() { echo "$@" >> jobs; wc -l < jobs; }\n' + script
        done = subprocess.run(["bash"], input=fake, text=True, capture_output=True, cwd=tmp_path, check=False)
        jobs = (tmp_path / "jobs").read_text().splitlines()
        assert done.returncode == 0 and len(jobs) == 21 + 2 + 3
        assert "--dependency=afterok:1 " in next(job for job in jobs if "--job-name=180M-english-1x " in job)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "hyperllama", "experiment", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_plans_prints_and_refuses(tmp_path: Path) -> None:
    plan = json.loads(command(TABLE, "sizes.180M.throughput=1e5", "--dry-run", "--json").stdout)
    assert plan["training_runs"] == 21 and plan["flops_per_window_dense"]["180M"] == 3_082_108_796_928
    assert command(TABLE, "--print", "slurm", "--recipes", "here").stdout.count("train.py here/runs/") == 21
    for arguments, sentence in (
        ((TABLE, "--print", "slrum"), "--print slrum: did you mean 'slurm'"),
        (
            (TABLE, "languages.swedish.stages.0.windows={svenska: 31334642}", "--write", tmp_path / "new"),
            "has no svenska",
        ),
        ((TABLE, "--write", ROOT / "recipes"), "already exists"),
        ((ROOT / "recipes" / "demo.yaml", "--write", tmp_path / "new"), "is a study, not a table of runs"),
    ):
        refused = command(*arguments)
        assert refused.returncode == 2 and sentence in refused.stderr and "Traceback" not in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ["families.2x.start=572M-english-3x"],
            "572M-faroese-2x|572M-estonian-2x starts from 572M-english-3x, which is no model",
        ),
        (["families.2x.size=600M"], "families.2x.size|is unknown"),
        (["merges.methods=[lineer]"], "did you mean 'linear'"),
        (["english.decay=4000"], "180M-english-1x has 3572 steps, fewer than its warm-up and decay"),
        (["sizes.1B.micro_batch=1"], "sizes must name two"),
        (["extra.match=true"], "unknown key extra.match; did you mean 'matched'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(changes: list[str], sentence: str) -> None:
    with pytest.raises(HyperLlamaError, match=sentence):
        paper_grid(load_paper(TABLE, changes))


@pytest.fixture(scope="module")
def tiny(study: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The table with a model and stages so small that all of it runs here."""
    folder = tmp_path_factory.mktemp("tiny")
    values = yaml.safe_load(TABLE.read_text())
    rows = {"warmup": 1, "decay": 1, "gpus": 1, "checkpoint": 100}
    values |= {
        "out": str(folder / "out"), "tokenizer": str(study / "tokenizer.model"), "shards": str(study / "shards"),
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
                  "vocab_size": 512},
        "seq_len": SEQ_LEN, "global_batch": 4, "order": "shuffled", "precision": "fp32",
        "sizes": {"180M": {"micro_batch": 4}, "572M": {"micro_batch": 2}},
        "base": rows | {"id": "180M-english-1x-base", "stages": [{"seeds": [1, 2], "windows": {"eng": 10}}]},
        "english": rows | {"stages": [{"seeds": [1], "windows": {"eng": 140}}]},
        "languages": {
            name: rows | {"stages": [{"seeds": [1], "windows": {"swe": 140, "eng": count}}]}
            for name, count in (("estonian", 4), ("swedish", 8))
        },
        "dev": str(folder / "dev"),
        "extra": {"matched": True, "noise_db": 10.0, "carried": True, "language_aware": True},
    }  # fmt: skip
    values["merges"]["dtype"] = "float32"
    (folder / "dev").mkdir()
    for name, language in TEXT.items():
        text = (study / "corpus" / "text" / language / "dev.jsonl").read_text().splitlines()[:3]
        (folder / "dev" / f"{name}.jsonl").write_text("\n".join(text) + "\n")
    file = folder / "paper.yaml"
    file.write_text(yaml.safe_dump(values))
    return [str(file)]


def test_the_grid_in_tiny_runs_resumes_and_its_ledgers_are_the_plans(tiny: list[str]) -> None:
    grid = paper_grid(load_paper(tiny[0]))
    results = run_grid(grid)
    rows = {row["id"]: row for row in results["models"]}
    assert rows.keys() == grid.tasks.keys() and all(finished(grid, task) for task in grid.tasks.values())
    for name, row in rows.items():
        assert row["total"] == grid.total(name) and row["spent"] == grid.tasks[name].flops
        assert set(row["eval"]) == set(TEXT) and all(cell["bits_per_byte"] > 0 for cell in row["eval"].values())
    assert rows["572M-swedish-2x-matched"]["total"] == rows["180M-swedish-1x"]["total"]
    assert rows["572M-english-2x-carried"]["total"] == rows["572M-english-2x"]["total"]
    groups = [set(group["ids"]) for group in results["equal"]]
    matched = {"180M-swedish-1x", "572M-swedish-1x-cloned-matched", "572M-swedish-2x-matched"}
    for equal in (matched, {"572M-english-2x", "572M-english-2x-noise", "572M-english-2x-carried"}):
        assert any(equal <= group for group in groups)
    report = (Path(grid.config.out) / "report.html").read_text()
    assert all(name in report for name in rows)
    files = {file: file.stat().st_mtime_ns for file in Path(grid.config.out).rglob("*.safetensors")}
    assert json.loads((Path(grid.config.out) / "results.json").read_text()) == results == run_grid(grid)
    assert files == {file: file.stat().st_mtime_ns for file in Path(grid.config.out).rglob("*.safetensors")}
    assert "hyperllama" not in commands(grid, "recipes", "torchrun") and "train.py" not in commands(
        grid, "recipes", "slurm"
    )
    with pytest.raises(HyperLlamaError, match="holds a study with another seed"):
        run_grid(paper_grid(load_paper(tiny[0], ["seed=1"])))


def test_a_model_of_the_tiny_grid_costs_what_the_formula_says(tiny: list[str]) -> None:
    grid = paper_grid(load_paper(tiny[0]))
    assert grid.costs == {size: window_flops(shape, SEQ_LEN) for size, shape in grid.shapes.items()}
    merge = merge_values(grid, grid.merges[0])
    assert merge["models"][0]["model"].endswith("/model")
