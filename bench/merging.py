"""Merge methods on one study's models, over several seeds: the paper's, tuned, language-aware, against joint training.

    python -m bench.merging recipes/merging.yaml --seeds 42 43 44 --out bench/results/merging.json [KEY=VALUE ...]

The study trains, merges and measures (hyperllama/experiment); added here is what no recipe asks for: the best of the paper's merges
with a tuned scale, and a merge fine-tuned by what learning spends. No text is measured that anything was learnt on or chosen by.
`spent` are the FLOPs of a merge itself (dense): choosing, learning; elementwise work is 0. `gap closed` is the share of the way
from the best of the paper's to joint training. Models and figures are kept under the recipe's `out`, a folder a seed.
"""

import argparse
import datetime
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from hyperllama.config import RunConfig
from hyperllama.data.build import build_shards
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.evaluate import evaluate_folder
from hyperllama.experiment.findings import words
from hyperllama.experiment.merges import AWARE, PAPERS, merge_values
from hyperllama.experiment.recipe import ExperimentConfig, load_experiment
from hyperllama.experiment.run import Study, run_experiment
from hyperllama.files import read_json, write_json
from hyperllama.merge import parse_recipe
from hyperllama.merge.executor import run as run_merge
from hyperllama.merge.search import search
from hyperllama.settings import validated
from hyperllama.train.loop import train

from .environment import environment, without_paths
from .harness import Result, outcome

CHOOSE = 8_000  # bytes of a language's text that the tuned baseline chooses by
TUNING = 8  # evaluations of it
FINE_TUNING = 1e-3  # learning rate of the control


def tuned(study: Study, family: str) -> tuple[Path, int]:
    """The best of the paper's methods and its best scale on text of its own: (folder, FLOPs of the search)."""
    c, out = study.config, study.out / "merges" / f"tuned-{family}"
    base, models = f"{c.base_language}-{family}", {tag: str(study.folder(f"{tag}-{family}")) for tag in c.targets}
    value = merge_values("task_arithmetic", str(study.folder(base)), models, {}, density=c.density, steps=0, windows=0)
    texts = []
    for tag in c.languages:
        texts.append(study.data / "choose" / f"{tag}.jsonl")
        study.further(tag, texts[-1], CHOOSE, "the search")
    found = search(parse_recipe(yaml.safe_dump(value), "the comparison"), texts, TUNING, shares=False)
    if not out.is_dir():
        run_merge(found.plan, out, found=found)
    return out, found.flops


def fine_tuned(study: Study, family: str) -> tuple[Path, int]:
    """The control: the windows that learning takes, on the same text, but all weights free, from the best merge by shares."""
    c, sources = study.config, []
    for tag in c.languages:
        shards = study.data / "shards-to-learn-on" / tag
        if not shards.is_dir():
            file = study.data / "dev" / f"{tag}.learn.jsonl"
            build_shards([file], Tokenizer.load(study.tokenizer_file), shards, language=tag)
        sources.append({"path": str(shards), "weight": 1.0})
    out = study.out / "runs" / f"fine-tuned-{family}"
    settings = {
        "name": out.name, "out": str(out), "seed": c.seed, "tokenizer": str(study.tokenizer_file), "precision": "fp32",
        "init_from": str(study.folder(f"merge-adam_v-{family}")), "data": {"sources": sources, "seq_len": c.seq_len},
        "global_batch": c.learn.windows, "micro_batch": c.learn.windows, "budget": {"steps": c.learn.steps},
        "optimizer": c.optimizer.model_dump() | {"lr": FINE_TUNING},
        "schedule": {"kind": "paper", "warmup_steps": 2, "decay_fraction": 0.5},
    }  # fmt: skip
    record = train(validated(RunConfig, settings, out.name), quiet=True)
    return out / "model", record["ledger"]["spent"]


def run_seed(config: ExperimentConfig, data: Path) -> dict[str, Any]:
    """One seed: family -> what was done -> bits per byte and FLOPs spent; and the FLOPs of all models of a merge."""
    found = run_experiment(config, data)
    study = Study(config, data)
    families: dict[str, dict[str, Any]] = {family: {} for family in config.adapted}

    def note(family: str, name: str, bits: dict[str, float], spent: int) -> None:
        families[family][name] = {"mean": mean(bits.values()), **bits, "spent": spent}

    for row in found["models"]:
        bits = {tag: cell["bits_per_byte"] for tag, cell in row["eval"].items()}
        names = {"joint": "joint training", "merge": words(row["method"] or "")}
        if row["family"] in families and row["kind"] in names:
            note(row["family"], names[row["kind"]], bits, row["spent"] if row["kind"] == "merge" else 0)
    for family in families:
        for name, make in (("best of the paper's, scale tuned", tuned), ("Adam's v, fine-tuned", fine_tuned)):
            folder, spent = make(study, family)
            texts = {tag: str(data / "dev" / f"{tag}.jsonl") for tag in config.languages}
            measured = evaluate_folder(folder, list(texts.values()), [], seq_len=config.seq_len)["texts"]
            note(family, name, {tag: measured[file]["bits_per_byte"] for tag, file in texts.items()}, spent)
    return {
        "families": families,
        "training_flops": found["budgets"]["english"] + len(config.targets) * found["budgets"]["adapt"],
    }


def _sd(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def summary(seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """family -> what -> the mean bits per byte of every seed, their mean and standard deviation, the gap each closed."""
    result: dict[str, Any] = {}
    for family in next(iter(seeds.values()))["families"]:
        tables = [seed["families"][family] for seed in seeds.values()]
        papers = [words(method) for method in PAPERS if words(method) in tables[0]]
        result[family] = {}
        for name in tables[0]:
            closed = []
            for table in tables:
                best, joint = min(table[method]["mean"] for method in papers), table["joint training"]["mean"]
                closed.append((best - table[name]["mean"]) / (best - joint))
            means = {str(seed): table[name]["mean"] for seed, table in zip(seeds, tables, strict=True)}
            result[family][name] = {
                "seeds": means, "mean": mean(means.values()), "sd": _sd(list(means.values())), "gap_closed": closed,
                "spent": mean(table[name]["spent"] for table in tables),
            }  # fmt: skip
    return result


def judged(found: dict[str, Any]) -> list[Result]:
    """The goal, for every family: what the best merge that knows of languages closes of the gap, in the mean of the seeds."""
    results = []
    for family, rows in found.items():
        shares = {name: mean(rows[name]["gap_closed"]) for name in map(words, AWARE) if name in rows}
        best = max(shares, key=lambda name: shares[name])
        params: dict[str, int | float | str] = {"family": family, "seeds": len(rows[best]["seeds"]), "merge": best}
        results.append(outcome("merging", params, "share", "of the gap to joint training closed", 0.5, shares[best]))
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_intermixed_args()
    out = Path(load_experiment(arguments.recipe, arguments.overrides).out)
    data = out / "data"  # one tokenizer and one text for all seeds
    Study(load_experiment(arguments.recipe, [*arguments.overrides, f"out={data}"])).prepare()
    seeds: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds:
        file = out / f"merging-{seed}.json"
        if not file.is_file():
            overrides = [*arguments.overrides, f"seed={seed}", f"out={out / f's{seed}'}"]
            write_json(file, run_seed(load_experiment(arguments.recipe, overrides), data))
        seeds[seed] = read_json(file)
    found = summary(seeds)
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": ["bench.merging", *map(without_paths, sys.argv[1:])],
    }
    about |= {"environment": environment("cpu"), "recipe": Path(arguments.recipe).read_text()}
    write_json(arguments.out, {**about, "summary": found, "results": judged(found), "seeds": seeds})
    for family, table in found.items():
        print(f"\n| {family} | bits per byte | gap closed | spent, % of training |\n| --- | --- | --- | --- |")
        training = next(iter(seeds.values()))["training_flops"]
        for name, row in table.items():
            closed = row["gap_closed"]
            print(
                f"| {name} | {row['mean']:.3f} ± {row['sd'] or 0:.3f} | {100 * mean(closed):.0f} % "
                f"± {100 * (_sd(closed) or 0):.0f} | {100 * row['spent'] / training:.1f} |"
            )


if __name__ == "__main__":
    main()
