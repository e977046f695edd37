"""The paper's grid from one table (recipes/paper.yaml): every training run, clone and merge, as what it starts from and its recipe.

    base ── english-1x ─┬─ <language>-1x ───────────── merges of 1x
      │                 └─ clone ── <language>-1x-cloned ── merges of 1x-cloned
      └─ clone ── english-2x ────── <language>-2x ───────── merges of 2x

A run's steps follow from its stages: a stage ends with a step, its last batch filled up, as in the paper's trainer. So a run spends
steps x global_batch windows. Under <out>: runs/<id>/, clones/<id>/, merges/<id>/, and a model's folder is named after its id.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hyperllama.config import ModelSettings, OptimizerSettings
from hyperllama.data.recipe import DataRecipe, load_data_recipe
from hyperllama.errors import HyperLlamaError, nearest
from hyperllama.flops import shared_quantum, window_flops
from hyperllama.merge.methods import METHODS
from hyperllama.recipes import override, read_yaml
from hyperllama.settings import ModelConfig, Settings, validated

BASED = {"task_arithmetic", "ties", "dare_ties"}  # methods whose published recipes name a base, and a density
CLONED = "572M-english-1x-cloned"


class StageRow(Settings):
    """Passes over the same windows, one for each seed."""

    seeds: list[int] = Field(min_length=1)
    windows: dict[str, int] = Field(min_length=1, description="source folder -> windows of a pass")


class RunRow(Settings):
    """Length and schedule of the runs on one text; in optimizer steps where nothing else is said."""

    stages: list[StageRow] = Field(min_length=1)
    warmup: int = Field(ge=0)
    decay: int = Field(ge=0)
    checkpoint: int = Field(250, gt=0)
    gpus: int = Field(gt=0, description="of the paper's run, on which the copies hang that fill up a stage's last step")
    merged: bool = Field(True, description="whether the models are parts of merges")


class BaseRow(RunRow):
    """The run that everything starts from."""

    id: str


class SizeRow(Settings):
    """What hangs on a model's size."""

    micro_batch: int = Field(gt=0)
    throughput: float | None = Field(None, gt=0, description="measured tokens a second and GPU; null: not measured")


class FamilyRow(Settings):
    """How the adapted models of a family begin."""

    size: str
    start: str


class MergeRows(Settings):
    """Every method on every set of two or more languages of every family."""

    methods: list[str]
    dtype: str
    density: float = Field(gt=0, le=1)
    seed: int = 0
    bases: Literal[True, "published"] = Field(
        True, description="true: a family's parent; published: as the recipes say"
    )


class DataRow(Settings):
    """How a source's shards are made: a data recipe of one source, and which share of its documents."""

    recipe: str
    skip: float | None = None
    fraction: float | None = None


class DataRows(Settings):
    """Sources of runs, and a folder that mixes all passes of all languages, each document as often as they read it."""

    folder: str = Field(description="of the data recipes")
    sources: dict[str, DataRow]
    mixed: str | None = None


class Extra(Settings):
    """Arms that the paper does not have."""

    matched: bool = False
    milestones: bool = False
    noise_db: float | None = None
    carried: bool = False
    language_aware: bool = False


class PaperConfig(Settings):
    """The table."""

    name: str
    out: str
    tokenizer: str
    shards: str
    seed: int
    model: ModelSettings
    factor: int = Field(ge=2)
    noise_db: float | None
    seq_len: int = Field(gt=0)
    global_batch: int = Field(gt=0)
    optimizer: OptimizerSettings
    precision: str
    mask_document_start: bool
    order: Literal["nanotron", "shuffled"] = Field("nanotron", description="of windows: the paper's, or ours")
    gpus_per_node: int = Field(gt=0)
    sizes: dict[str, SizeRow]
    base: BaseRow
    english: RunRow
    families: dict[str, FamilyRow]
    languages: dict[str, RunRow] = Field(min_length=1)
    merges: MergeRows
    extra: Extra = Extra()
    data: DataRows | None = Field(None, description="recipes of the shards; null: they are there")
    dev: str | None = Field(
        None, description="folder of <language>.jsonl (and .pairs.jsonl) on which every model is measured"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "PaperConfig":
        if len(self.sizes) != 2:
            raise ValueError("sizes must name two: the small model's, then the grown one's")
        for name, family in self.families.items():
            if family.size not in self.sizes:
                raise ValueError(
                    f"families.{name}.size: {family.size!r} is unknown; {nearest(family.size, self.sizes)}"
                )
        for method in self.merges.methods:
            if method not in METHODS:
                raise ValueError(f"merges.methods: {method!r} is unknown; {nearest(method, METHODS)}")
        return self


@dataclass(frozen=True)
class Stage:
    """A pass over the windows of some sources, from step `start` (the first is 1) on, in the order of `seed`."""

    start: int
    steps: int
    seed: int
    windows: dict[str, int]


@dataclass(frozen=True)
class Run:
    """A training run; `flops` is what it spends, `start` the model it begins with (None: a fresh one)."""

    id: str
    size: str
    family: str
    language: str
    start: str | None
    row: RunRow
    stages: tuple[Stage, ...]
    flops: int
    warmup: int
    decay: float
    milestones: tuple[int, ...] = ()
    grow_at: int | None = None

    kind = "run"

    @property
    def needs(self) -> list[str]:
        """The models it reads."""
        return [self.start] if self.start else []


@dataclass(frozen=True)
class Clone:
    """A model grown from `source`."""

    id: str
    family: str
    source: str
    noise_db: float | None
    kind = "clone"
    flops = 0

    @property
    def needs(self) -> list[str]:
        """The model it is made of."""
        return [self.source]


@dataclass(frozen=True)
class Merge:
    """A merge of language models; `base` is what differences are taken from (None: the method has none)."""

    id: str
    family: str
    method: str
    models: tuple[str, ...]
    base: str | None
    importance: tuple[str, ...] = ()
    kind = "merge"
    flops = 0

    @property
    def needs(self) -> list[str]:
        """The models it reads."""
        return [*self.models, *([self.base] if self.base else [])]


Task = Run | Clone | Merge


@dataclass(frozen=True)
class Grid:
    """All tasks, every one after those it needs."""

    config: PaperConfig
    tasks: dict[str, Task] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, ModelConfig]:
        """size -> the model's shape."""
        c = self.config
        small = c.model.resolve(c.model.vocab_size or 1, c.seq_len)
        return dict(zip(c.sizes, (small, small.grown(c.factor)), strict=True))

    @cached_property
    def costs(self) -> dict[str, int]:
        """size -> dense training FLOPs of a window."""
        return {size: window_flops(shape, self.config.seq_len) for size, shape in self.shapes.items()}

    @property
    def small(self) -> str:
        """The small size's name."""
        return next(iter(self.config.sizes))

    @property
    def grown(self) -> str:
        """The grown size's name."""
        return list(self.config.sizes)[1]

    @property
    def runs(self) -> list[Run]:
        """The training runs."""
        return [task for task in self.tasks.values() if isinstance(task, Run)]

    @property
    def merges(self) -> list[Merge]:
        """The merges."""
        return [task for task in self.tasks.values() if isinstance(task, Merge)]

    def folder(self, task: str) -> str:
        """Where a model lies."""
        kind = self.tasks[task].kind
        return f"{self.config.out}/{kind}s/{task}" + ("/model" if kind == "run" else "")

    def size_of(self, task: str) -> str:
        """The size of a task's model."""
        found = self.tasks[task]
        if isinstance(found, Run):
            return found.size
        return self.grown if isinstance(found, Clone) else self.size_of(found.models[0])

    def ancestors(self, task: str) -> set[str]:
        """Everything a task needs, directly or not."""
        found: set[str] = set()
        for name in self.tasks[task].needs:
            found |= {name} | self.ancestors(name)
        return found

    def total(self, task: str) -> int:
        """FLOPs of a task and all its distinct ancestors."""
        return sum(self.tasks[name].flops for name in {task} | self.ancestors(task))


def load_paper(recipe: str | Path, assignments: list[str] | None = None) -> PaperConfig:
    """Read the table and its overrides. Raises HyperLlamaError naming the file and every key that is wrong."""
    return validated(PaperConfig, override(read_yaml(recipe), assignments or []), str(recipe))


def stages(config: PaperConfig, row: RunRow) -> tuple[Stage, ...]:
    """The passes of a run, one after the other."""
    found: list[Stage] = []
    start = 1
    for stage in row.stages:
        steps = -(-sum(stage.windows.values()) // config.global_batch)
        for seed in stage.seeds:
            found.append(Stage(start, steps, seed, stage.windows))
            start += steps
    return tuple(found)


def paper_grid(config: PaperConfig) -> Grid:
    """The tasks of a table. Raises HyperLlamaError when a family starts from a model that there is not."""
    grid = Grid(config)
    for task in _tasks(config, grid):
        missing = [name for name in task.needs if name not in grid.tasks]
        if missing:
            raise HyperLlamaError(
                f"{task.id} starts from {missing[0]}, which is no model; {nearest(missing[0], grid.tasks)}"
            )
        grid.tasks[task.id] = task
    return grid


def _tasks(c: PaperConfig, grid: Grid) -> Iterator[Task]:
    small, grown = grid.small, grid.grown
    english = f"{small}-english-1x"

    def run(name: str, size: str, family: str, language: str, start: str | None, row: RunRow) -> Run:
        passes = stages(c, row)
        steps = sum(stage.steps for stage in passes)
        if row.warmup + row.decay > steps:
            raise HyperLlamaError(
                f"{name} has {steps} steps, fewer than its warm-up and decay, {row.warmup} + {row.decay}"
            )
        flops = steps * c.global_batch * grid.costs[size]
        return Run(name, size, family, language, start, row, passes, flops, row.warmup, row.decay / steps)

    base = run(c.base.id, small, "1x", "english", None, c.base)
    plain: list[Task] = [
        base,
        run(english, small, "1x", "english", base.id, c.english),
        Clone(f"{base.id}-cloned", "2x", base.id, c.noise_db),
        run(f"{grown}-english-2x", grown, "2x", "english", f"{base.id}-cloned", c.english),
        Clone(f"{grown}-english-1x-cloned", "1x-cloned", english, c.noise_db),
        *(
            run(f"{family.size}-{language}-{name}", family.size, name, language, family.start, row)
            for language, row in c.languages.items()
            for name, family in c.families.items()
        ),
    ]
    runs = _compared(c, grid, plain) if c.extra.matched or c.extra.milestones else plain
    yield from runs
    yield from _extra_runs(c, grid, runs)
    yield from _merges(c)


def _compared(c: PaperConfig, grid: Grid, tasks: list[Task]) -> list[Task]:
    """`tasks` with what makes two sizes comparable at the same integer: matched runs, and milestones where steps end.

    A small run gives up the windows past its last shared quantum, fewer than one step; its matched runs spend what is left.
    """
    small, grown = (grid.costs[size] for size in c.sizes)
    quantum = shared_quantum([small, grown])
    found: list[Task] = []
    for task in tasks:
        if not isinstance(task, Run) or task.start is None:
            found.append(task)
            continue
        steps = task.flops // grid.costs[task.size] // c.global_batch
        steps_small, steps_grown = quantum // small, quantum // grown  # of equal batches, that make a quantum of steps
        times = min(steps // steps_small, steps // steps_grown)
        milestones = (times * quantum * c.global_batch,) if c.extra.milestones and times else ()
        kept = steps * c.global_batch * small // quantum * quantum
        if c.extra.matched and not kept:
            raise HyperLlamaError(
                f"{task.id} is too short for a budget that both sizes share: at least {quantum} FLOPs"
            )
        if task.size == grid.small and c.extra.matched:
            task = replace(task, flops=kept)
        found.append(replace(task, milestones=milestones))
        if task.size == grid.grown and c.extra.matched:
            warmup = max(1, round(task.warmup * kept / task.flops))
            matched = _variant(replace(task, flops=kept, warmup=warmup, milestones=()), "matched")
            starts = any(other.id == f"{task.start}-matched" for other in found)
            found.append(replace(matched, start=f"{task.start}-matched") if starts else matched)
    return found


def _variant(run: Run, name: str) -> Run:
    """A run beside the paper's: a family of its own."""
    return replace(run, id=f"{run.id}-{name}", family=f"{run.family}-{name}")


def _extra_runs(c: PaperConfig, grid: Grid, tasks: list[Task]) -> Iterator[Task]:
    if c.extra.noise_db is not None:
        clones = [task for task in tasks if isinstance(task, Clone)]
        for clone in clones:
            yield replace(clone, id=f"{clone.id}-noise", family=f"{clone.family}-noise", noise_db=c.extra.noise_db)
        for task in tasks:
            if isinstance(task, Run) and task.start in {clone.id for clone in clones}:
                yield _variant(replace(task, start=f"{task.start}-noise"), "noise")
    if c.extra.carried:
        before, after = (
            task for task in tasks if isinstance(task, Run) and task.id in (c.base.id, f"{grid.grown}-english-2x")
        )
        first = before.stages[-1].start + before.stages[-1].steps - 1
        steps = first + after.stages[-1].start + after.stages[-1].steps - 1
        later = tuple(replace(stage, start=stage.start + first) for stage in after.stages)
        yield replace(
            _variant(after, "carried"), size=grid.grown, start=None, stages=before.stages + later,
            flops=before.flops + after.flops, warmup=before.warmup, decay=after.row.decay / steps,
            milestones=(), grow_at=before.flops,
        )  # fmt: skip


def _merges(c: PaperConfig) -> Iterator[Merge]:
    languages = [language for language, row in c.languages.items() if row.merged]
    arms: list[tuple[str, tuple[str, ...]]] = [(method, ()) for method in c.merges.methods]
    if c.extra.language_aware:
        arms.append(("task_arithmetic", ("token_counts", "adam_v")))
    for name, family in c.families.items():
        for count in range(2, len(languages) + 1):
            for members in combinations(languages, count):
                for method, importance in arms:
                    base = family.start if method in BASED else None
                    if base and c.merges.bases == "published":
                        base = published_base(name, method, count == len(languages), base)
                    what = "language_aware" if importance else method
                    models = tuple(f"{family.size}-{language}-{name}" for language in members)
                    yield Merge(
                        f"{what}-{family.size}-{name}-{'-'.join(members)}", name, method, models, base, importance
                    )


def published_base(family: str, method: str, all_languages: bool, parent: str) -> str:
    """The base that the published recipes name: of 2x models the cloned English one, but for ties and dare_ties of all five."""
    return CLONED if family == "2x" and not (all_languages and method in ("ties", "dare_ties")) else parent


def data_recipes(c: PaperConfig) -> dict[str, DataRecipe]:
    """source -> the recipe of its shards. Raises HyperLlamaError for a source that has no row, and for bad recipes."""
    if c.data is None:
        return {}
    rows, found = c.data.sources, dict[str, DataRecipe]()
    for name in (
        name for row in (c.base, c.english, *c.languages.values()) for stage in row.stages for name in stage.windows
    ):
        if name not in rows and name != c.data.mixed:
            raise HyperLlamaError(
                f"data.sources has no {name}, which a run reads; {nearest(name, rows)}, or data: null"
            )
    for name, row in rows.items():
        recipe = load_data_recipe(Path(c.data.folder) / f"{row.recipe}.yaml")
        (source,) = recipe.sources
        parts = source.model_copy(update=row.model_dump(include={"skip", "fraction"}, exclude_none=True))
        changes: dict[str, Any] = {"out": f"{c.shards}/{name}", "tokenizer": c.tokenizer, "sources": [parts]}
        found[name] = recipe.model_copy(update=changes)
    if c.data.mixed is not None:
        stages = [stage for row in c.languages.values() if row.merged for stage in row.stages]
        passes = [(name, seed) for stage in stages for seed in stage.seeds for name in stage.windows]
        sources = [found[name].sources[0].model_copy(update={"name": f"{name}, {seed}"}) for name, seed in passes]
        changes = {"out": f"{c.shards}/{c.data.mixed}", "sources": sources, "shuffle": True}
        found[c.data.mixed] = found[passes[0][0]].model_copy(update=changes)
    return found


def run_values(grid: Grid, run: Run) -> dict[str, Any]:
    """A training run as the values of a recipe for `hyperllama train`."""
    c = grid.config
    step = c.global_batch * grid.costs[run.size]
    values: dict[str, Any] = {
        "name": run.id,
        "out": f"{c.out}/runs/{run.id}",
        "seed": c.seed,
        "tokenizer": c.tokenizer,
    }
    if run.start is None:
        values["model"] = c.model.model_dump(exclude_none=True)
    else:
        values["init_from"] = grid.folder(run.start)
    return values | {
        "data": {
            **_read(c, run),
            "seq_len": c.seq_len,
            "documents": "across",
            "mask_document_start": c.mask_document_start,
        },
        "budget": {"flops": run.flops} if run.grow_at or run.flops % step else {"steps": run.flops // step},
        "global_batch": c.global_batch,
        "micro_batch": c.sizes[run.size].micro_batch,
        "optimizer": c.optimizer.model_dump(),
        "schedule": {"kind": "paper", "warmup_steps": run.warmup, "decay_fraction": run.decay, "offset": 1},
        "checkpoint": {"every_steps": run.row.checkpoint, "milestones": list(run.milestones)},
        "precision": c.precision,
        "rope_tables": "bf16",
        "loss_mean": "micro_batch",
        **({"parallel": "ddp", "export": {"adam_v": True}} if c.extra.language_aware else {"parallel": "ddp"}),
        **(
            {
                "grow": {
                    "at_flops": run.grow_at,
                    "factor": c.factor,
                    "noise_db": c.noise_db if c.extra.noise_db is None else c.extra.noise_db,
                }
            }
            if run.grow_at
            else {}
        ),
    }


def _read(c: PaperConfig, run: Run) -> dict[str, Any]:
    """The stages of a run: nanotron reads each window of a stage once and fills its last step up, shuffled draws by weight."""

    def source(name: str, windows: int) -> dict[str, Any]:
        return {"path": f"{c.shards}/{name}"} | ({"weight": float(windows)} if c.order == "shuffled" else {})

    passes = [
        {
            "start_step": stage.start,
            "seed": stage.seed,
            "sources": [source(name, windows) for name, windows in stage.windows.items()],
        }
        for stage in run.stages
    ]
    tail = {"processes": run.row.gpus, "micro_batch": c.sizes[run.size].micro_batch}
    return {"stages": passes, "order": c.order} | ({"nanotron_tail": tail} if c.order == "nanotron" else {})


def merge_values(grid: Grid, merge: Merge) -> dict[str, Any]:
    """A merge as the values of a mergekit recipe, as the published ones are written."""
    m = grid.config.merges
    density = {"density": m.density} if merge.method in BASED and not merge.importance else {}
    values: dict[str, Any] = {"merge_method": merge.method}
    if merge.base:
        values["base_model"] = grid.folder(merge.base)
    values["models"] = [
        {"model": grid.folder(model), "parameters": {"weight": 1.0} | density} for model in merge.models
    ]
    values["parameters"] = {"normalize": True, "int8_mask": True}
    values["dtype"] = m.dtype
    if METHODS[merge.method].random:
        values["hyperllama"] = {"seed": m.seed}
    if merge.importance:
        values["hyperllama"] = {"importance": [{"by": by} for by in merge.importance]}
    return values
