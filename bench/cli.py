"""`hyperllama bench ...`: the benchmarks of this folder by what they are about. Heavy imports happen inside the commands.

Each benchmark is a program that can also be run by itself (`python -m bench.cpu --help`); a command chooses those that fit this
machine, runs them one after another in processes of their own, and passes on what they found: 1 when a target was missed.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure this installation, judge its targets, compare versions.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Quick = Annotated[bool, typer.Option("--quick", help="Smaller problems, fewer rounds.")]
Out = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write <FOLDER>/<device>/<name>.json.")]


@dataclass(frozen=True)
class Program:
    """A module of this folder, and what it is started with."""

    module: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)


@dataclass(frozen=True)
class Part:
    """What a command measures: its programs on a CPU, and on a GPU where those are others."""

    help: str
    cpu: tuple[Program, ...]
    gpu: tuple[Program, ...] = ()


STEPS = "^step"
PARTS = {
    "kernels": Part(
        "Every op against its roof and its peers.",
        (Program("cpu", ("--only", f"^(?!{STEPS[1:]})", "--name", "kernels")),),
        (Program("gpu", ("--minutes", "9"), ("--minutes", "3")),),
    ),
    "throughput": Part(
        "Whole training steps against transformers, and what of a step is not an op.",
        (Program("cpu", ("--only", STEPS, "--name", "steps")), Program("throughput", ("--overhead",), ())),
        (Program("throughput", quick=("--rounds", "3")),),
    ),
    "grow": Part(
        "Growth of model folders from the shell.",
        (Program("merge", ("--only", "^(grow|start)", "--name", "grow")),),
    ),
    "merge": Part("Merges of model folders from the shell.", (Program("merge", ("--only", "^(?!grow|start)")),)),
    "data": Part("Tokenizing and the loader.", (Program("pipeline", ("data",)),)),
    "checkpoint": Part("Saving and restoring training state.", (Program("pipeline", ("checkpoint",)),)),
    "evaluate": Part("Minimal pairs on a model folder.", (Program("pipeline", ("evaluate",)),)),
}


def command_of(program: Program, quick: bool, out: Path | None, device: str = "") -> list[str]:
    """The command line of a program; `out` is the folder of results, `device` the name of its folder for this GPU."""
    chosen = [*program.arguments, *(program.quick if quick else ())]
    where = ["--out", str(out / device / "gpu.json" if program.module == "gpu" else out)] if out else []
    return [sys.executable, "-m", f"{__package__}.{program.module}", *chosen, *where]


def measure(names: list[str], quick: bool, as_json: bool, out: Path | None) -> int:
    """Run the programs of parts in turn; the exit code is the largest of theirs."""
    import torch

    from .environment import device_slug

    gpu, code = torch.cuda.is_available(), 0
    device = device_slug(torch.cuda.get_device_name()) if gpu else ""
    with tempfile.TemporaryDirectory(prefix="hyperllama-bench-") as temporary:
        folder = out or (Path(temporary) if as_json or gpu else None)  # bench.gpu writes in any case
        known = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} if folder else {}
        parts = [PARTS[name] for name in names]
        for program in [program for part in parts for program in ((part.gpu if gpu else ()) or part.cpu)]:
            print(f"{program.module} {' '.join(program.arguments)} ...", file=sys.stderr, flush=True)
            command = command_of(program, quick, folder, device)
            done = subprocess.run(command, stdout=sys.stderr if as_json else None, check=False)
            code = max(code, abs(done.returncode))
        if as_json and folder:
            fresh = [path for path in folder.rglob("*.json") if known.get(path) != path.stat().st_mtime_ns]
            found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(fresh)}
            print(json.dumps(found, indent=1))
    return code


def _command(names: list[str]) -> Callable[..., None]:
    def command(quick: Quick = False, as_json: Json = False, out: Out = None) -> None:
        raise typer.Exit(measure(names, quick, as_json, out))

    return command


for _name, _part in PARTS.items():
    app.command(_name, help=_part.help)(_command([_name]))
app.command("all", help="All of these, one after another.")(_command(list(PARTS)))


@app.command("regress")
def regress_command(
    base: Annotated[str, typer.Option(metavar="REF", help="Commit, branch or tag to compare the working tree with.")],
    only: Annotated[str, typer.Option(metavar="REGEX", help="Cases whose name it finds.")] = "",
    minutes: Annotated[float, typer.Option(help="Of measuring, at most.")] = 5.0,
    threads: Annotated[int, typer.Option(help="Of each version; one stays on one CPU.")] = 1,
    resources: Annotated[bool, typer.Option(help="Also judge what compilers make of the Triton kernels.")] = True,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Judge the working tree's speed against a commit's: exit code 1 when a case is slower, false alarms at most 2 %."""
    from hyperllama.files import write_json

    from .regress import judge, table

    report = judge(base, only=only, minutes=minutes, threads=threads, resources=resources)
    if out:
        write_json(out, report)
    print(json.dumps(report, indent=1) if as_json else table(report))
    raise typer.Exit(0 if report["verdict"] == "pass" else 1)


@app.command("targets")
def targets_command(
    results: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Results files; default: those of this project.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print every target with what was measured of it; exit code 1 when one that was measured is missed."""
    import torch

    from hyperllama.errors import HyperLlamaError

    from .environment import environment
    from .targets import GOALS, RESULTS, judged, read, table

    folder = results or RESULTS
    if not folder.is_dir():
        raise HyperLlamaError(f"--results {folder}: no such folder")
    device = environment("cuda" if torch.cuda.is_available() else "cpu")
    here = {device["device"], device["cpu"]}
    rows = judged(GOALS, list(read(folder)), here)
    print(json.dumps(rows, indent=1) if as_json else table(rows))
    raise typer.Exit(1 if any(row["met"] is False for row in rows) else 0)
