"""The paper's grid as work: what it costs, the recipes as files, the commands that run it elsewhere, and running it here.

A task is finished when its result is there: a run's record with a ledger, a model's folder (both appear whole or not at all).
What is finished is skipped, here and in the commands that are printed, so whatever was interrupted goes on.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hyperllama.config import RunConfig
from hyperllama.errors import HyperLlamaError
from hyperllama.experiment.paper import Clone, Grid, Merge, Run, Task, data_recipes, merge_values, run_values
from hyperllama.files import atomic_folder, check_free, read_json, write_json
from hyperllama.flops import shared_quantum, window_flops
from hyperllama.merge import parse_recipe
from hyperllama.merge.planner import Outline, plan_outlines
from hyperllama.settings import validated

if TYPE_CHECKING:
    from hyperllama.hub import Folder

PEAK, MFU = 989.4e12, 0.4  # of an estimate: an H200's bf16 peak, and the share of it that is taken for granted
PRINTERS = ("torchrun", "slurm")


def finished(grid: Grid, task: Task) -> bool:
    """Whether a task's result is there."""
    folder = Path(grid.folder(task.id))
    if isinstance(task, Run):
        record = folder.parent / "run.json"
        return record.is_file() and "ledger" in read_json(record)
    return folder.is_dir()


def levels(grid: Grid) -> list[list[str]]:
    """The tasks in stages: all of a stage can be done at once, after the stages before it."""
    depth: dict[str, int] = {}
    for task in grid.tasks.values():
        depth[task.id] = 1 + max((depth[name] for name in task.needs), default=-1)
    return [[name for name, at in depth.items() if at == level] for level in range(max(depth.values()) + 1)]


def gpu_hours(grid: Grid, run: Run) -> tuple[float, bool]:
    """(hours of one GPU, whether they come from a measured throughput) of a run; a grown run counts each shape for its part."""
    c, seconds, measured = grid.config, 0.0, True
    before = run.grow_at or 0
    for size, flops in ((grid.small, before), (run.size, run.flops - before)):
        windows, throughput = flops // grid.costs[size], c.sizes[size].throughput
        if throughput is not None:
            seconds += windows * c.seq_len / throughput
        elif windows:
            measured = False
            seconds += windows * window_flops(grid.shapes[size], c.seq_len, "causal") / (MFU * PEAK)
    return seconds / 3600, measured


def describe(grid: Grid) -> dict[str, Any]:
    """The plan: sizes, runs and clones by stage, merges counted, FLOPs as integers, GPU-hours. Writes nothing."""
    c = grid.config
    stages = []
    for level in levels(grid):
        rows = [_describe(grid, grid.tasks[name]) for name in level if not isinstance(grid.tasks[name], Merge)]
        merges = [grid.tasks[name] for name in level if isinstance(grid.tasks[name], Merge)]
        stages.append({"tasks": rows, "merges": len(merges)})
    hours = [gpu_hours(grid, run) for run in grid.runs]
    by: dict[str, int] = {}
    for merge in grid.merges:
        key = f"{merge.family}, {'language-aware' if merge.importance else merge.method}"
        by[key] = by.get(key, 0) + 1
    return {
        "name": c.name,
        "parameters": {size: shape.num_parameters for size, shape in grid.shapes.items()},
        "flops_per_window_dense": grid.costs,
        "stages": stages,
        "training_runs": len(grid.runs),
        "training_flops": sum(run.flops for run in grid.runs),
        "gpu_hours": round(sum(hour for hour, _ in hours), 1),
        "gpu_hours_are": "from measured throughput"
        if all(measured for _, measured in hours)
        else f"an estimate where throughput is not given: {MFU:.0%} of {PEAK / 1e12} TFLOP/s (H200, bf16)",
        "merges": {"total": len(grid.merges)} | by,
        "equal": _equal(grid),
        "finished": sum(finished(grid, task) for task in grid.tasks.values()),
        "writes": c.out,
    }


def _describe(grid: Grid, task: Task) -> dict[str, Any]:
    row: dict[str, Any] = {"id": task.id, "starts_from": task.needs[0] if task.needs else None}
    if isinstance(task, Clone):
        return row | {"noise_db": task.noise_db}
    assert isinstance(task, Run)
    hours, measured = gpu_hours(grid, task)
    windows = task.flops // grid.costs[task.size] if task.grow_at is None else None
    tokens = {} if windows is None else {"tokens": windows * grid.config.seq_len}
    return row | tokens | {
        "flops": task.flops,
        "total_flops": grid.total(task.id),
        **({"milestones": list(task.milestones)} if task.milestones else {}),
        "gpu_hours": round(hours, 1),
        "gpu_hours_are": "measured" if measured else "an estimate",
    }  # fmt: skip


def _equal(grid: Grid) -> list[str]:
    """What ends at the same integer of total FLOPs."""
    found: dict[tuple[str, int], list[str]] = {}
    for run in grid.runs:
        found.setdefault((run.language, grid.total(run.id)), []).append(run.id)
    return [f"{', '.join(ids)}: {flops}" for (_, flops), ids in found.items() if len(ids) > 1]


def write_recipes(grid: Grid, folder: str | Path) -> dict[str, int]:
    """Write data/<source>.yaml, runs/<id>.yaml and merges/<family>/<id>.yaml under `folder`; returns how many of each.

    Every run is validated, every merge planned by shapes. Raises HyperLlamaError when one does not fit, or the folder exists.
    """
    folder = Path(folder)
    check_free(folder)
    recipes = data_recipes(grid.config)
    texts = {
        f"data/{name}.yaml": yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False)
        for name, recipe in recipes.items()
    }
    for run in grid.runs:
        values = run_values(grid, run)
        validated(RunConfig, values, run.id)
        texts[f"runs/{run.id}.yaml"] = yaml.safe_dump(values, sort_keys=False)
    outlines = {grid.folder(name): Outline(grid.shapes[grid.size_of(name)]) for name in grid.tasks}
    for merge in grid.merges:
        texts[name := f"merges/{merge.family}/{merge.id}.yaml"] = yaml.safe_dump(
            merge_values(grid, merge), sort_keys=False
        )
        plan_outlines(parse_recipe(texts[name], name), outlines)
    with atomic_folder(folder) as temporary:
        for name, text in texts.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
    return {"data": len(recipes), "runs": len(grid.runs), "merges": len(grid.merges)}


def commands(grid: Grid, recipes: str, how: str) -> str:
    """A shell script that does what is not finished, over the recipes that write_recipes wrote into `recipes`.

    torchrun: one task after the other on this node. slurm: a job a task, each after those it needs; a family's merges are one job.
    """
    lines = ["#!/usr/bin/env bash", "set -euo pipefail"]
    slurm = how == "slurm"
    if slurm:
        lines.append("declare -A job")
    todo = {task.id for task in grid.tasks.values() if not finished(grid, task)}
    for number, level in enumerate(levels(grid)):
        tasks = [grid.tasks[name] for name in level if name in todo and not isinstance(grid.tasks[name], Merge)]
        if tasks:
            lines.append(f"# stage {number}")
        for task in tasks:
            needs = [name for name in task.needs if name in todo]
            lines.append(
                _job(grid, task.id, needs, _command(grid, task, recipes)) if slurm else _command(grid, task, recipes)
            )
    for family in dict.fromkeys(merge.family for merge in grid.merges if merge.id in todo):
        merges = [merge for merge in grid.merges if merge.family == family and merge.id in todo]
        needs = sorted({name for merge in merges for name in merge.needs} & todo)
        loop = (
            f"for f in {recipes}/merges/{family}/*.yaml; do out={grid.config.out}/merges/$(basename $f .yaml); "
            "test -d $out || hyperllama merge $f $out; done"
        )
        lines.append(f"# {len(merges)} merges of {family}")
        lines.append(_job(grid, f"merges-{family}", needs, loop, gpus=False) if slurm else loop)
    return "\n".join(lines) + "\n"


def _command(grid: Grid, task: Task, recipes: str) -> str:
    if isinstance(task, Run):
        gpus = grid.config.gpus_per_node
        return f"torchrun --standalone --nproc-per-node={gpus} train.py {recipes}/runs/{task.id}.yaml"
    assert isinstance(task, Clone)
    noise = "" if task.noise_db is None else f" --noise-db {task.noise_db} --seed {grid.config.seed}"
    out = grid.folder(task.id)
    return f"test -d {out} || hyperllama grow {grid.folder(task.source)} {out} --factor {grid.config.factor}{noise}"


def _job(grid: Grid, name: str, needs: list[str], command: str, gpus: bool = True) -> str:
    after = "".join(f":${{job[{need}]}}" for need in needs)
    options = [f"--job-name={name}", "--nodes=1", "--parsable"]
    options += [f"--gpus-per-node={grid.config.gpus_per_node}"] if gpus and command.startswith("torchrun") else []
    options += [f"--dependency=afterok{after}"] if needs else []
    return f"job[{name}]=$(sbatch {' '.join(options)} --wrap '{command}')"


def run_grid(grid: Grid) -> dict[str, Any]:
    """Do here what is not finished, in order; measure every model when the table names development text; results and report.

    Raises HyperLlamaError when the output folder holds the grid of another table.
    """
    from hyperllama.experiment.report import write_report
    from hyperllama.experiment.run import claim, curve
    from hyperllama.grow.folder import grow_folder
    from hyperllama.grow.operators import HyperClone
    from hyperllama.merge import plan
    from hyperllama.merge.executor import run as run_merge
    from hyperllama.progress import console
    from hyperllama.train.loop import train

    c, out = grid.config, console()
    claim(Path(c.out), c.model_dump(mode="json", exclude={"dev", "data"}))
    for i, task in enumerate(grid.tasks.values()):
        if finished(grid, task):
            continue
        label, folder = f"[{i + 1}/{len(grid.tasks)}] {task.id}", grid.folder(task.id)
        if isinstance(task, Run):
            train(validated(RunConfig, run_values(grid, task), task.id), label=label)
        elif isinstance(task, Clone):
            out.print(label)
            grow_folder(grid.folder(task.source), folder, [HyperClone(c.factor, seed=c.seed, noise_db=task.noise_db)])
        else:
            out.print(label)
            text = yaml.safe_dump(merge_values(grid, task), sort_keys=False)
            run_merge(plan(parse_recipe(text, task.id), Path.cwd()), folder)
    languages = [language for language, row in c.languages.items() if row.merged]
    results: dict[str, Any] = {
        "name": c.name,
        "corpus": "the shards of the table" if c.dev is None else f"development text in {Path(c.dev).name}",
        "languages": ["english", *languages],
        "base_language": "english",
        "targets": languages,
        "seq_len": c.seq_len,
        "factor": c.factor,
        "noise_db": c.noise_db,
        "tokenizer_vocab": grid.shapes[grid.small].vocab_size,
        "budgets": {"quantum": shared_quantum(grid.costs.values())},
        "models": [_row(grid, task) for task in grid.tasks.values()],
        "curves": {run.id: curve(Path(c.out) / "runs" / run.id / "metrics.jsonl") for run in grid.runs},
    }
    results["equal"] = _groups(results["models"])
    write_json(Path(c.out) / "results.json", results)
    write_report(results, Path(c.out))
    return results


def _groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models that may be compared: of one kind and language, with the same integer of total FLOPs."""
    found: dict[tuple[str, str | None, int], list[str]] = {}
    for row in rows:
        if row["kind"] != "clone":
            kind = "joint training and merges" if row["kind"] in ("joint", "merge") else row["language"]
            found.setdefault((kind, row["language"], row["total"]), []).append(row["id"])
    return [
        {"what": what, "by": "total", "flops": flops, "ids": ids}
        for (what, _, flops), ids in found.items()
        if len(ids) > 1
    ]


def _row(grid: Grid, task: Task) -> dict[str, Any]:
    """A model as reports know it."""
    from hyperllama.hub import open_folder

    folder = open_folder(grid.folder(task.id))
    (ledger,) = folder.ledgers
    if ledger.total != grid.total(task.id):
        raise HyperLlamaError(f"{task.id} ends at {ledger.total} FLOPs, the plan says {grid.total(task.id)}")
    row: dict[str, Any] = {"id": task.id, "family": task.family, "method": None, "parents": task.needs}
    if isinstance(task, Run):
        kind = "base" if task.language == "english" else "language" if task.row.merged else "joint"
        row |= {"kind": kind, "language": None if kind == "joint" else task.language}
    elif isinstance(task, Clone):
        row |= {"kind": "clone", "language": "english"}
    else:
        method = "language_aware" if task.importance else task.method
        row |= {"kind": "merge", "language": None, "method": method, "parents": list(task.models)}
    return row | {
        "parameters": grid.shapes[grid.size_of(task.id)].num_parameters,
        "spent": ledger.spent,
        "inherited": ledger.inherited,
        "total": ledger.total,
        "path": str(folder.path.relative_to(grid.config.out)),
        "token_counts": folder.card.get("token_counts", {}),
        "eval": _measured(grid, task.id, folder),
    }


def _measured(grid: Grid, name: str, folder: "Folder") -> dict[str, dict[str, Any]]:
    """Language -> figures on <dev>/<language>.jsonl and .pairs.jsonl, kept beside the hash of what was measured."""
    from hyperllama.evaluate import evaluate_folder
    from hyperllama.hub import folder_hashes

    c = grid.config
    if c.dev is None:
        return {}
    file, hashes = Path(c.out) / "eval" / f"{name}.json", folder_hashes(folder)
    if not file.is_file() or read_json(file)["sha256"] != hashes:
        pairs = sorted(Path(c.dev).glob("*.pairs.jsonl"))
        texts = sorted(set(Path(c.dev).glob("*.jsonl")) - set(pairs))
        measured = evaluate_folder(folder.path, texts, pairs, seq_len=c.seq_len)
        found = {text.stem: measured["texts"][str(text)] for text in texts}
        for part in pairs:
            found.setdefault(part.stem.removesuffix(".pairs"), {}).update(measured["pairs"][str(part)])
        write_json(file, {"model": name, "sha256": hashes, "eval": found})
    return read_json(file)["eval"]
