"""A study over several seeds, at the recipe's one rate and at rates chosen by a sweep; what is finished stays as small files.

    <results>/sweep.json            every trial of the sweep: group, rate, bits per byte, FLOPs; the rates chosen
    <results>/single-<seed>.json    the whole grid at the recipe's rate
    <results>/tuned-<seed>.json     the whole grid at the chosen rates
    <article>                       what they say together, written anew after each of them

A file that is there, and of these settings, is not made again: results can be committed, and a study goes on from them anywhere.
Seeds differ in initial weights, order of data and growth noise; tokenizer, shards and development text are one for all.
The sweep has a seed of its own and measures on development documents behind those that results are measured on.
"""

import platform
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import Field

from hyperllama.errors import HyperLlamaError
from hyperllama.experiment.article import article
from hyperllama.experiment.jobs import Step, carry_out
from hyperllama.experiment.recipe import FAMILIES, SCRATCH, Arm, ExperimentConfig, budgets, grid
from hyperllama.experiment.run import Study, run_experiment, window_cost
from hyperllama.files import read_json, write_json, write_text
from hyperllama.recipes import override, read_yaml
from hyperllama.settings import Settings, validated

VARIANTS = ("single", "tuned")
PATHS = {"name", "out", "seed", "seeds", "results", "article", "corpus"}  # settings that decide no result


class SweepSettings(Settings):
    """Trials of every group of arms: the same rates for each."""

    rates: list[float] = Field(min_length=1)
    language: str = Field(description="the target language whose adaptation is tried")
    seed: int = Field(0, ge=0)
    dev_bytes: int = Field(60_000, gt=0, description="text that the sweep measures on")


class SeedsConfig(ExperimentConfig):
    """A study, its seeds and its sweep."""

    seeds: list[int] = Field(min_length=1)
    sweep: SweepSettings
    results: str = Field(description="folder of results that can be committed")
    article: str = Field(description="Markdown file that tells what the results say")

    def one(self, out: str, seed: int, rates: dict[str, float] | None = None) -> ExperimentConfig:
        """The study of one seed."""
        values = self.model_dump(exclude={"seeds", "sweep", "results", "article"})
        return ExperimentConfig(**values | {"out": f"{self.out}/{out}", "seed": seed, "rates": rates or {}})

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the results of a seed, paths aside."""
        return self.model_dump(exclude=PATHS, mode="json")


def load_seeds(recipe: str | Path, assignments: list[str] | None = None) -> SeedsConfig:
    """Read a recipe with `seeds` and its overrides. Raises HyperLlamaError naming the file and every key that is wrong."""
    config = validated(SeedsConfig, override(read_yaml(recipe), assignments or []), str(recipe))
    if config.sweep.language not in config.targets:
        raise HyperLlamaError(f"{recipe}: sweep.language: {config.sweep.language!r} is none of the targets")
    if config.rates:
        raise HyperLlamaError(f"{recipe}: rates: the sweep chooses them; leave the key out, or set optimizer.lr")
    return config


def describe_seeds(config: SeedsConfig) -> dict[str, Any]:
    """The plan for --dry-run: the FLOPs of a seed and of the sweep, and what is finished. Writes nothing."""
    model = config.model.resolve(config.vocab, config.seq_len)
    spend = budgets(config, model)
    arms = grid(config, spend)
    tried, needed = _trials(config, arms)
    trials = sum(arm.flops for arm in arms if arm.id in tried.values()) * len(config.sweep.rates)
    files = [*(f"{variant}-{seed}.json" for seed in config.seeds for variant in VARIANTS), "sweep.json"]
    return {
        "name": config.name,
        "parameters": {"1x": model.num_parameters, "grown": model.grown(config.factor).num_parameters},
        "budgets": {"quantum": spend.quantum, "english": spend.english, "adapt": spend.adapt},
        "arms": {arm.id: arm.flops for arm in arms},
        "training_flops": {
            "a seed at one set of rates": sum(arm.flops for arm in arms),
            "all seeds at both, at most": sum(arm.flops for arm in arms) * len(config.seeds) * len(VARIANTS),
            "the sweep": trials + sum(arm.flops for arm in arms if arm.id in needed),
        },
        "trials of each group": len(config.sweep.rates),
        "finished": [name for name in files if _finished(config, Path(config.results) / name)],
        "reads": [config.corpus or "the built-in sample text"],
        "writes": [config.out, config.results, config.article],
    }


def run_seeds(config: SeedsConfig, jobs: int = 1) -> dict[str, Any]:
    """Run or resume the sweep and every seed, `jobs` steps at a time; returns what the article is written from.

    Raises HyperLlamaError for bad input, and for results of other settings.
    """
    results, data = Path(config.results), Path(config.out) / "data"
    wanted = [results / "sweep.json", *(results / f"{v}-{seed}.json" for seed in config.seeds for v in VARIANTS)]
    if not all([_finished(config, file) for file in wanted]):  # all of them: other settings are refused before any work
        Study(config.one("data", config.seed)).prepare()
    if not _finished(config, results / "sweep.json"):
        write_json(results / "sweep.json", _sweep(config, data, jobs))
    chosen = read_json(results / "sweep.json")["chosen"]
    for variant, other, seed in _order(config.seeds):
        file = results / f"{variant}-{seed}.json"
        if not _finished(config, file):
            rates = chosen if variant == "tuned" else {}
            reuse = Path(config.out) / f"{other}-{seed}"
            found = run_experiment(config.one(f"{variant}-{seed}", seed, rates), data, reuse, jobs)
            write_json(file, _compact(config, found, variant, seed, rates))
            _write_article(config)
    return _write_article(config)


def _order(seeds: list[int]) -> list[tuple[str, str, int]]:
    """(variant, the other one, seed): the first seed whole, then the others at the chosen rates, then at the single one."""
    single, tuned = VARIANTS
    last = [(tuned, single, seed) for seed in seeds[1:]] + [(single, tuned, seed) for seed in seeds[1:]]
    return [(single, tuned, seeds[0]), (tuned, single, seeds[0]), *last]


def _finished(config: SeedsConfig, file: Path) -> bool:
    if not file.is_file():
        return False
    # a key that is younger than a result has its default there
    values = config.model_dump(include=PATHS) | read_json(file)["settings"]
    stored, wanted = validated(SeedsConfig, values, str(file)).settings, config.settings
    differing = [key for key in wanted if stored.get(key) != wanted[key]]
    if differing:
        raise HyperLlamaError(
            f"{file} is of another {differing[0]} ({stored.get(differing[0])}, now {wanted[differing[0]]}): choose another "
            "folder for results, or remove the file"
        )
    return True


def _write_article(config: SeedsConfig) -> dict[str, Any]:
    folder = Path(config.results)
    seeds = {
        variant: [read_json(file) for seed in config.seeds if (file := folder / f"{variant}-{seed}.json").is_file()]
        for variant in VARIANTS
    }
    found = {"sweep": read_json(folder / "sweep.json"), "seeds": seeds}
    write_text(Path(config.article), article(found))
    return found


def _compact(
    config: SeedsConfig, found: dict[str, Any], variant: str, seed: int, rates: dict[str, float]
) -> dict[str, Any]:
    """What is kept of a seed's results: exact ledgers, nats and bytes of every model on every language."""
    import torch

    keys = ("id", "family", "kind", "language", "method", "parents", "parameters", "spent", "inherited", "total")
    return {
        "settings": config.settings,
        "variant": variant,
        "seed": seed,
        "rates": {"all": config.optimizer.lr} | rates,
        "made": {"date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine()},
        "corpus": found["corpus"],
        "budgets": found["budgets"],
        "equal": found["equal"],
        "models": [{key: row[key] for key in keys} | {"eval": _measures(row["eval"])} for row in found["models"]],
    }


def _measures(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = ("bytes", "nll_nats", "bits_per_byte", "pairs", "accuracy")
    return {tag: {key: cell[key] for key in keys if key in cell} for tag, cell in cells.items()}


def _trials(config: SeedsConfig, arms: list[Arm]) -> tuple[dict[str, str], set[str]]:
    """(group -> the arm that is tried in it, the other arms that those start from)."""
    base, language = config.base_language, config.sweep.language
    tried = {"base/1x": f"{base}-seed", "base/2x": f"{base}-2x", f"base/{SCRATCH}": f"{base}-{SCRATCH}"}
    tried |= {f"adapt/{family}": f"{language}-{family}" for family in FAMILIES}
    by_id = {arm.id: arm for arm in arms}
    tried = {group: name for group, name in tried.items() if name in by_id}
    needed: set[str] = set()
    for name in tried.values():
        start = by_id[name].start
        while start is not None:
            needed.add(start)
            start = by_id[start].start
    return tried, needed - set(tried.values())


def _sweep(config: SeedsConfig, data: Path, jobs: int) -> dict[str, Any]:
    """Train each group's arm at every rate, from the best of what it starts from; measure on the sweep's own text."""
    study = Study(config.one("sweep", config.sweep.seed), data)
    model = config.model.resolve(config.vocab, config.seq_len)
    arms = grid(config, budgets(config, model))
    tried, needed = _trials(config, arms)
    group_of = {name: group for group, name in tried.items()}
    texts = {tag: study.out / "dev" / f"{tag}.jsonl" for tag in (config.base_language, config.sweep.language)}
    for language, file in texts.items():
        study.further(language, file, config.sweep.dev_bytes, "the sweep")
    best: dict[str, str] = {}  # arm -> the trial that stands for it
    chosen: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for arm in arms:
        if arm.id not in tried.values() and arm.id not in needed:
            continue
        cost, start = window_cost(config, model, arm), best.get(arm.start or "", arm.start)
        group = group_of.get(arm.id)
        if group is None:
            fixed = replace(arm, start=start)
            study.config = study.config.model_copy(update={"rates": chosen})
            study.run_arm(fixed, cost, f"sweep: {arm.id}")
            rows.append({"group": None, "arm": arm.id, "rate": chosen.get(arm.group), "flops": arm.flops})
            continue
        text, steps = texts[arm.language or config.base_language], []
        for rate in config.sweep.rates:
            trial = replace(arm, id=f"{arm.id}-{rate:g}", start=start)
            settings = study.config.model_copy(update={"rates": chosen | {group: rate}})
            steps.append(Step(f"sweep: {arm.id} at {rate:g}", settings, "trial", (trial, cost, text)))
        found = carry_out(steps, jobs, data, None, study.say)
        bits = {rate: found[step.name] for rate, step in zip(config.sweep.rates, steps, strict=True)}
        row = {"group": group, "arm": arm.id, "flops": arm.flops}
        rows += [row | {"rate": rate, "bits_per_byte": value} for rate, value in bits.items()]
        chosen[group] = min(bits, key=lambda rate: bits[rate])
        best[arm.id] = f"{arm.id}-{chosen[group]:g}"
    return {
        "settings": config.settings,
        "chosen": chosen,
        "flops": sum(row["flops"] for row in rows),
        "trials": rows,
    }
