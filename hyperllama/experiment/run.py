"""Run a study: text, tokenizer, shards, every arm of the grid, merges, evaluation, results.json and the report.

    <out>/experiment.yaml   the resolved recipe; another recipe is refused here
    <out>/corpus/           the sample text, or what is used of a folder's development parts
    <out>/tokenizer.model, shards/<language>/, dev/
    <out>/runs/<arm>/       training runs (model in runs/<arm>/model)
    <out>/clones/<arm>/     grown models: one per (source, factor, noise, seed), where every cloned arm and merge base starts
    <out>/merges/<id>/      merged models, beside their recipes <id>.yaml
    <out>/eval/<id>.json    measurements
    <out>/results.json, report.html, plots and tables

Everything is a pure function of the recipe; what exists is kept, so an interrupted study goes on where it stopped.
"""

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from hyperllama.config import RunConfig
from hyperllama.data.build import build_shards
from hyperllama.data.sample import write_corpus
from hyperllama.data.text import iter_documents
from hyperllama.data.tokenizer import Tokenizer, train_tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate import evaluate_folder
from hyperllama.evaluate.pairs import read_pairs
from hyperllama.experiment.jobs import Step, carry_out
from hyperllama.experiment.merges import merge_values, reads_text
from hyperllama.experiment.recipe import Arm, Budgets, ExperimentConfig, budgets, grid
from hyperllama.experiment.report import write_report
from hyperllama.experiment.text import head, part_file, spread
from hyperllama.files import atomic_folder, read_json, write_json, write_text
from hyperllama.flops import window_flops
from hyperllama.grow.folder import grow_folder
from hyperllama.grow.operators import HyperClone
from hyperllama.hub import folder_hashes, model_config, open_folder
from hyperllama.merge.executor import run as run_merge
from hyperllama.merge.planner import plan as plan_merge
from hyperllama.merge.recipe import read_recipe
from hyperllama.progress import console, progress_bar
from hyperllama.recipes import read_yaml
from hyperllama.settings import ModelConfig, validated
from hyperllama.train.loop import train
from hyperllama.train.plan import make_plan

SAMPLE = (
    "built-in sample sentences in six languages: text to try the software on, which says nothing about real languages"
)
CURVE_POINTS = 200


def describe(config: ExperimentConfig) -> dict[str, Any]:
    """The study's plan for --dry-run: every arm with its exact FLOPs. Writes nothing.

    Raises HyperLlamaError as far as bad input shows without reading the text.
    """
    if config.corpus is not None:
        for language in config.languages:
            for part in ("train", "dev"):
                part_file(Path(config.corpus), language, part)
    model = config.model.resolve(config.vocab, config.seq_len)
    spend = budgets(config, model)
    arms = grid(config, spend)
    return {
        "name": config.name,
        "parameters": {"1x": model.num_parameters, "grown": model.grown(config.factor).num_parameters},
        "budgets": {"quantum": spend.quantum, "english": spend.english, "adapt": spend.adapt},
        "arms": [
            {
                "id": arm.id,
                "starts_from": arm.start,
                "flops": arm.flops,
                "windows": arm.flops // window_cost(config, model, arm),
            }
            for arm in arms
        ],
        "training_flops": sum(arm.flops for arm in arms),
        "merges": [f"merge-{method}-{family}" for family in config.adapted for method in config.merge_methods],
        "reads": [config.corpus or "the built-in sample text"],
        "writes": config.out,
    }


def _shape(config: ExperimentConfig, model: ModelConfig, arm: Arm) -> ModelConfig:
    return model if arm.family == "1x" else model.grown(config.factor)


def window_cost(config: ExperimentConfig, model: ModelConfig, arm: Arm) -> int:
    return window_flops(_shape(config, model, arm), config.seq_len)


def _eta(config: ExperimentConfig, model: ModelConfig, arms: list[Arm], rates: dict[int, float]) -> str:
    """How long `arms` will train, as far as shapes that have been timed tell; a shape that has not counts like the slowest."""
    if not rates:
        return ""
    seconds = sum(arm.flops * rates.get(window_cost(config, model, arm), max(rates.values())) for arm in arms)
    return f", {f'about {seconds / 60:.0f}' if seconds > 60 else 'under 1'} min left"


class Study:
    """The folders of one study and the steps that fill them."""

    def __init__(
        self, config: ExperimentConfig, data: Path | None = None, reuse: Path | None = None, quiet: bool = False
    ):
        """`data`: the folder of text, tokenizer and shards (default: out); `reuse`: a study whose equal runs are copied."""
        self.config, self.out, self.console, self.quiet = config, Path(config.out), console(), quiet
        self.data, self.reuse = data or self.out, reuse
        self.tokenizer_file = self.data / "tokenizer.model"
        self.source = Path(config.corpus) if config.corpus else self.data / "corpus"

    def folder(self, arm: str) -> Path:
        """Where the model `arm` lies."""
        for path in (self.out / "clones" / arm, self.out / "merges" / arm):
            if path.is_dir():
                return path
        return self.out / "runs" / arm / "model"

    def claim(self) -> None:
        """Take the output folder for this recipe. Raises HyperLlamaError when another recipe's study lies there."""
        claim(self.out, self.config.model_dump(mode="json"))

    def prepare(self) -> None:
        """Text, tokenizer, shards, development parts."""
        c, source = self.config, self.source
        if c.sample and not source.is_dir():
            self.say(
                f"writing {c.sample.bytes_per_language:,} bytes of sample text in each of {len(c.languages)} languages"
            )
            write_corpus(
                source,
                tuple(c.languages),
                c.sample.bytes_per_language,
                seed=c.seed,
                dev_bytes=c.sample.dev_bytes,
                pairs=c.sample.pairs,
            )
        train_files = {language: part_file(source, language, "train") for language in c.languages}
        if not self.tokenizer_file.is_file():
            self.say(f"training a tokenizer of {c.vocab:,} tokens")
            train_tokenizer(list(train_files.values()), self.tokenizer_file, c.vocab, seed=c.seed)
        tokenizer = Tokenizer.load(self.tokenizer_file)
        for language, file in train_files.items():
            if not (self.data / "shards" / language).is_dir():
                self.say(f"tokenizing {language}")
                build_shards([file], tokenizer, self.data / "shards" / language, language=language)
        if not (self.data / "dev").is_dir():
            with atomic_folder(self.data / "dev") as dev:
                for language in c.languages:
                    text, pairs = dev / f"{language}.jsonl", dev / f"{language}.pairs.jsonl"
                    measured = head(part_file(source, language, "dev"), text, c.dev_bytes)
                    texts = [text]
                    if c.learns:
                        texts.append(dev / f"{language}.learn.jsonl")
                        if not head(part_file(source, language, "dev"), texts[1], c.learn.bytes, measured):
                            raise HyperLlamaError(
                                f"dev_bytes ({c.dev_bytes}) leaves no development text of {language} for merges to learn on: "
                                "lower it"
                            )
                    for _ in iter_documents(texts):  # a bad line is found now, not after hours of training
                        pass
                    spread(source / "minimal_pairs" / f"{language}.jsonl", pairs, c.dev_pairs)
                    if pairs.is_file():
                        read_pairs(pairs)

    def further(self, language: str, out: Path, limit: int, reader: str) -> None:
        """Write development text behind what is measured or learnt on, up to `limit` bytes.

        Raises HyperLlamaError naming the `reader` when there is none.
        """
        read = [self.data / "dev" / f"{language}{kind}.jsonl" for kind in ("", ".learn")]
        count = sum(file.read_bytes().count(b"\n") for file in read if file.is_file())
        out.parent.mkdir(parents=True, exist_ok=True)
        if not head(part_file(self.source, language, "dev"), out, limit, count):
            raise HyperLlamaError(
                f"dev_bytes ({self.config.dev_bytes}) leaves no development text of {language} for {reader}: lower it"
            )

    def run_config(self, arm: Arm, cost: int) -> RunConfig:
        """The training run of an arm, as `hyperllama train` would read it."""
        c = self.config
        values: dict[str, Any] = {
            "name": arm.id,
            "out": str(self.out / "runs" / arm.id),
            "seed": c.seed,
            "tokenizer": str(self.tokenizer_file),
            "data": {
                "sources": [
                    {"path": str(self.data / "shards" / tag), "weight": share} for tag, share in arm.shares.items()
                ],
                "seq_len": c.seq_len,
            },
            "budget": {"flops": arm.flops},
            "global_batch": c.global_batch,
            "micro_batch": c.micro_batch,
            "optimizer": c.optimizer.model_dump() | {"lr": c.rates.get(arm.group, c.optimizer.lr)},
            "schedule": c.schedule.model_dump(),
            "precision": c.precision,
            "export": {"adam_v": True},  # for the merges that weigh by it
            "log_every": max(1, arm.flops // cost // c.global_batch // 20),
        }
        if arm.start is not None:
            values["init_from"] = str(self.folder(arm.start))
        else:
            shape = c.model.model_dump()
            if arm.family != "1x":  # the grown shape, from a random start
                grown = c.model.resolve(c.vocab, c.seq_len).grown(c.factor)
                shape |= {key: getattr(grown, key) for key in shape}
            values["model"] = shape
        return validated(RunConfig, values, arm.id)

    def run_arm(self, arm: Arm, cost: int, label: str) -> None:
        """Train an arm, or make a clone."""
        if arm.shares:
            config = self.run_config(arm, cost)
            if not self.copied(config):
                train(config, label=label, quiet=self.quiet)
        elif not self.folder(arm.id).is_dir():
            assert arm.start is not None  # a clone has a source
            result = grow_folder(
                self.folder(arm.start),
                self.out / "clones" / arm.id,
                [HyperClone(self.config.factor, seed=self.config.seed, noise_db=self.config.noise_db)],
                logits=True,
            )
            self.say(
                f"{label}: grown, largest logit difference {result['verified']['logits']['max_logit_difference']:.2g}"
            )

    def trial(self, arm: Arm, cost: int, text: Path) -> float:
        """Train an arm; returns its bits per byte on a text."""
        self.run_arm(arm, cost, f"sweep: {arm.id}")
        measured = evaluate_folder(self.folder(arm.id), [text], [], seq_len=self.config.seq_len)
        return float(measured["texts"][str(text)]["bits_per_byte"])

    def copied(self, config: RunConfig) -> bool:
        """Whether a run was copied from the study to reuse: the same in all that decides its result."""
        if self.reuse is None or Path(config.out).exists():
            return False
        other = self.reuse / "runs" / config.name
        record = other / "run.json"
        if not record.is_file() or read_json(record)["ledger"]["run"] != make_plan(config).ledger.run:
            return False
        with atomic_folder(config.out, sync=False) as folder:
            shutil.copytree(other, folder, dirs_exist_ok=True)
            # its own settings, or it would be another run's when the study goes on
            write_text(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        return True

    def merge(self, method: str, family: str) -> str:
        """Merge the language models of a family onto their true parent; returns the merge's id."""
        c, name = self.config, f"merge-{method}-{family}"
        if (self.out / "merges" / name).is_dir():
            return name
        recipe = merge_values(
            method,
            str(self.folder(f"{c.base_language}-{family}")),
            {tag: str(self.folder(f"{tag}-{family}")) for tag in c.targets},
            {tag: self.data / "dev" / f"{tag}.learn.jsonl" for tag in c.languages},
            density=c.density,
            steps=c.learn.steps,
            windows=c.learn.windows,
        )
        recipe |= {"dtype": "float32", "out_dtype": "float32" if c.precision == "fp32" else "bfloat16"}
        file = self.out / "merges" / f"{name}.yaml"
        write_text(file, yaml.dump(recipe, sort_keys=False, Dumper=_PlainDumper))
        run_merge(plan_merge(read_recipe(file), Path.cwd()), self.out / "merges" / name)
        return name

    def evaluate(self, model: str) -> dict[str, dict[str, Any]]:
        """Measure a model on every language; kept beside the hash of what was measured."""
        c, file = self.config, self.out / "eval" / f"{model}.json"
        hashes = folder_hashes(open_folder(self.folder(model)))
        if file.is_file() and read_json(file)["sha256"] == hashes:
            return read_json(file)["eval"]
        dev = self.data / "dev"
        texts = {tag: dev / f"{tag}.jsonl" for tag in c.languages}
        pairs = {tag: dev / f"{tag}.pairs.jsonl" for tag in c.languages if (dev / f"{tag}.pairs.jsonl").is_file()}
        measured = evaluate_folder(self.folder(model), list(texts.values()), list(pairs.values()), seq_len=c.seq_len)
        result = {
            tag: measured["texts"][str(texts[tag])] | (measured["pairs"][str(pairs[tag])] if tag in pairs else {})
            for tag in c.languages
        }
        write_json(file, {"model": model, "sha256": hashes, "eval": result})
        return result

    def say(self, sentence: str) -> None:
        """Tell the person who watches."""
        if not self.quiet:
            self.console.print(sentence)


def claim(out: Path, wanted: dict[str, Any]) -> None:
    """Take an output folder for a resolved recipe.

    Raises HyperLlamaError when another recipe's study lies there.
    """
    file = out / "experiment.yaml"
    if file.is_file():
        stored = read_yaml(file)
        differing = [key for key in wanted if stored.get(key) != wanted[key]]
        if differing:
            raise HyperLlamaError(
                f"{out} holds a study with another {differing[0]} ({stored.get(differing[0])}, now "
                f"{wanted[differing[0]]}): choose another out, or remove the folder"
            )
    write_text(file, yaml.safe_dump(wanted, sort_keys=False))


def run_experiment(
    config: ExperimentConfig, data: Path | None = None, reuse: Path | None = None, jobs: int = 1
) -> dict[str, Any]:
    """Run or resume a study, `jobs` steps at a time; returns the content of results.json. `data` and `reuse` are Study's.

    Raises HyperLlamaError for bad input, and when ledgers that must be equal are not.
    """
    began = time.perf_counter()
    study = Study(config, data, reuse)
    model = config.model.resolve(config.vocab, config.seq_len)
    spend = budgets(config, model)
    arms = grid(config, spend)
    study.claim()
    study.prepare()
    study.say(f"{len(arms)} arms, {sum(arm.flops for arm in arms):,} training FLOPs; quantum {spend.quantum:,}")
    if jobs > 1:
        _run_in_jobs(study, arms, model, jobs)
    rates: dict[int, float] = {}  # seconds a FLOP, of the last run of each shape
    for i, arm in enumerate(arms):
        eta, cost, started = _eta(config, model, arms[i:], rates), window_cost(config, model, arm), time.perf_counter()
        fresh = not (study.out / "runs" / arm.id / "run.json").is_file()
        study.run_arm(arm, cost, f"[{i + 1}/{len(arms)}{eta}] {arm.id}")
        if arm.shares and fresh:
            rates[cost] = (time.perf_counter() - started) / arm.flops
    study.say("merging")
    merges = [
        (study.merge(method, family), method, family) for family in config.adapted for method in config.merge_methods
    ]
    rows = [*(_row(study, arm) for arm in arms), *(_merge_row(study, *merge) for merge in merges)]
    with progress_bar(study.console) as bar:
        task = bar.add_task("evaluating", total=len(rows), figures="")
        for row in rows:
            bar.update(task, figures=row["id"])
            row["eval"] = study.evaluate(row["id"])
            bar.advance(task)
    results = {
        "name": config.name,
        "corpus": SAMPLE if config.sample else f"text from {Path(config.corpus or '').name}, development parts",
        "languages": config.languages,
        "base_language": config.base_language,
        "targets": config.targets,
        "seq_len": config.seq_len,
        "factor": config.factor,
        "noise_db": config.noise_db,
        "tokenizer_vocab": config.vocab,
        "budgets": {"quantum": spend.quantum, "english": spend.english, "adapt": spend.adapt},
        "models": rows,
        "equal": equal_groups(config, spend, rows),
        "curves": {arm.id: curve(study.out / "runs" / arm.id / "metrics.jsonl") for arm in arms if arm.shares},
    }
    write_json(study.out / "results.json", results)
    files = write_report(results, study.out)
    _print_ledgers(study, results)
    study.say(f"{study.out / 'results.json'}, {', '.join(str(file) for file in files if file.suffix == '.html')}")
    study.say(f"finished in {(time.perf_counter() - began) / 60:.1f} min")
    return results


def _run_in_jobs(study: Study, arms: list[Arm], model: ModelConfig, jobs: int) -> None:
    """Make and measure everything, several at a time; what is left then is to read it."""
    c = study.config
    steps, families = [], {family: [f"{tag}-{family}" for tag in c.targets] for family in c.adapted}
    for arm in arms:
        cost = window_cost(c, model, arm)
        needs = frozenset({arm.start} if arm.start else ())
        steps.append(Step(arm.id, c, "run_arm", (arm, cost, arm.id), needs, arm.flops))
        steps.append(Step(f"{arm.id}, measured", c, "evaluate", (arm.id,), frozenset({arm.id})))
    for family, languages in families.items():
        for method in c.merge_methods:
            name = f"merge-{method}-{family}"
            needs = frozenset({*languages, f"{c.base_language}-{family}"})
            steps.append(Step(name, c, "merge", (method, family), needs))
            steps.append(Step(f"{name}, measured", c, "evaluate", (name,), frozenset({name})))
    count = itertools.count(1)
    carry_out(steps, jobs, study.data, study.reuse, lambda name: study.say(f"[{next(count)}/{len(steps)}] {name}"))


def equal_groups(config: ExperimentConfig, spend: Budgets, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons the study makes, each between models whose ledgers are the same integer.

    Raises HyperLlamaError naming the first model whose ledger is not.
    """
    base, n = config.base_language, len(config.targets)
    wanted = [
        (
            "base models after the base language",
            "total",
            spend.english,
            lambda row: row["kind"] == "base" and row["id"] != f"{base}-seed",
        ),
        ("adaptations to one language", "total", spend.english + spend.adapt, lambda row: row["kind"] == "language"),
        (
            "joint training, and merges of all languages",
            "total",
            spend.english + n * spend.adapt,
            lambda row: row["kind"] == "joint" or (row["kind"] == "merge" and not reads_text(row["method"])),
        ),
        (
            "merges that read text, without what that costs",
            "inherited",
            spend.english + n * spend.adapt,
            lambda row: row["kind"] == "merge" and reads_text(row["method"]),
        ),
    ]
    groups = []
    for what, by, flops, member in wanted:
        members = [row for row in rows if member(row)]
        for row in members:
            if row[by] != flops:
                raise HyperLlamaError(f"{row['id']} ends at {row[by]} FLOPs, the arms it is compared with at {flops}")
        if members:
            groups.append({"what": what, "by": by, "flops": flops, "ids": [row["id"] for row in members]})
    return groups


def _row(study: Study, arm: Arm) -> dict[str, Any]:
    return _model_row(study, arm.id, arm.family, arm.kind) | {
        "language": arm.language,
        "method": None,
        "parents": [arm.start] if arm.start else [],
    }


def _merge_row(study: Study, name: str, method: str, family: str) -> dict[str, Any]:
    return _model_row(study, name, family, "merge") | {
        "language": None,
        "method": method,
        "parents": [f"{tag}-{family}" for tag in study.config.targets],
    }


def _model_row(study: Study, name: str, family: str, kind: str) -> dict[str, Any]:
    folder = open_folder(study.folder(name))
    (ledger,) = folder.ledgers
    return {
        "id": name,
        "family": family,
        "kind": kind,
        "parameters": model_config(folder.config, folder.path).num_parameters,
        "spent": ledger.spent,
        "inherited": ledger.inherited,
        "total": ledger.total,
        "path": str(folder.path.relative_to(study.out)),
        "token_counts": folder.card.get("token_counts", {}),
    }


def curve(metrics: Path) -> list[list[float]]:
    """Training loss against total FLOPs: means over at most 200 equal stretches of steps, every window counted once.

    A last stretch that is not whole joins the one before: a budget's last step may be one window, and its loss mere noise.
    Steps that were skipped have no loss and take no part.
    """
    lines = [line for line in map(json.loads, metrics.read_text().splitlines()) if line["loss"] is not None]
    counts = [line["batch"] for line in lines]
    stretch = -(-len(lines) // CURVE_POINTS)
    parts = [range(i, min(i + stretch, len(lines))) for i in range(0, len(lines), stretch)]
    if len(parts) > 1 and sum(counts[i] for i in parts[-1]) < sum(counts[i] for i in parts[-2]):
        parts[-2:] = [range(parts[-2].start, len(lines))]
    return [
        [
            lines[part[-1]]["total_flops"],
            round(sum(lines[i]["loss"] * counts[i] for i in part) / sum(counts[i] for i in part), 6),
        ]
        for part in parts
    ]


def _print_ledgers(study: Study, results: dict[str, Any]) -> None:
    for group in results["equal"]:
        study.say(f"{group['what']}: {group['flops']:,} FLOPs each")
        for row in results["models"]:
            if row["id"] in group["ids"]:
                study.say(f"  {row['id']:<32} {row['inherited']:>22,} inherited + {row['spent']:>20,} spent")


class _PlainDumper(yaml.SafeDumper):
    """YAML without anchors: every model of a merge recipe spells its parameters out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
