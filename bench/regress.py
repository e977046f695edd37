"""The regression gate: two versions of HyperLlama measured in turns on this machine, and a verdict that can be trusted.

    hyperllama bench regress --base origin/main [--only REGEX] [--minutes 5] [--threads 1] [--json]

Run it in a checkout: the working tree, as it is, is judged against the commit REF. Both are copied to a temporary folder, installed
apart with their C++ compiled, and run in processes of their own, which tell the path they were loaded from. A sweep takes a fresh
process of each version and goes through the cases that are still open (regress_cases.py); a case's round is turns of short samples,
base head head base and the other way round, so that drift meets both alike, and gives one number. What the numbers say is decided
while they come (sequential.py): the probability of any false alarm is at most 2 %, over all cases together.

Both processes of a sweep have one thread, on one and the same CPU, another one every sweep: a neighbour there then takes from both,
and time that a thread, ready to run, waits for its CPU is not counted.
So code that lost its parallelism is not slower here; --threads N lets the system place N threads, and costs rounds.

Where Triton is installed the resource gate (resources.py) judges the working tree's kernels too, without a GPU; with one they are
cases as well. Exit codes: 0 pass, 1 a regression, 2 a mistake. What is undecided when the minutes are over passes, with a warning.
"""

import importlib.util
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperllama.errors import HyperLlamaError

from .environment import environment
from .harness import median_interval
from .sequential import ALARM, MARGIN, MISS, WORTH, Trial, round_ratio

SAMPLE = 0.004  # seconds
ROUND, TURNS = 0.12, (3, 8)  # seconds that a round samples, but at least and at most so many turns
SWEEPS = 6  # of one pair of processes: code and libraries lie at other addresses in the next
PATIENCE = 300  # seconds that a worker has for an answer
WORKER = Path(__file__).parent / "regress_worker.py"
Report = dict[str, Any]


class WorkerError(Exception):
    """What went wrong in a version's process, in one line."""


@dataclass(frozen=True)
class Installation:
    """One version, installed apart. The folders of both have names of one length: nothing else may differ."""

    name: str
    folder: Path

    @property
    def library(self) -> Path:
        """What pip installed."""
        return self.folder / "lib"

    def environment(self) -> dict[str, str]:
        """Environment variables of its processes: its own code first, then whatever this process imports from."""
        here = [path for path in sys.path if path]
        own = {"PYTHONPATH": os.pathsep.join([str(self.library), *here]), "PYTHONHASHSEED": "0"}
        own["OMP_WAIT_POLICY"] = "passive"  # threads that wait must not take a core from the other version's turn
        return {name: value for name, value in os.environ.items() if not name.startswith("HYPERLLAMA_")} | own


def git(repository: Path, *arguments: str) -> str:
    """What git prints. Raises HyperLlamaError with its last line."""
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HyperLlamaError((done.stderr.strip().splitlines() or ["git failed"])[-1])
    return done.stdout


def checkout() -> Path:
    """The root of the checkout that this process is in. Raises HyperLlamaError where there is none."""
    try:
        root = Path(git(Path.cwd(), "rev-parse", "--show-toplevel").strip())
    except HyperLlamaError:
        root = Path.cwd()
    if not (root / "hyperllama").is_dir() or not (root / "CMakeLists.txt").is_file():
        raise HyperLlamaError(f"{root} is no git checkout of HyperLlama: run `hyperllama bench regress` in one")
    return root


def commit_of(repository: Path, ref: str) -> str:
    """The commit a name stands for. Raises HyperLlamaError when git knows none."""
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}").strip()
    except HyperLlamaError:
        raise HyperLlamaError(f"--base {ref}: git knows no such commit here (in a shallow clone: fetch it)") from None


def copy_tree(repository: Path, ref: str | None, to: Path) -> str:
    """Copy a commit, or with None the working tree as it is, without what git ignores; returns what it is."""
    to.mkdir(parents=True)
    if ref is not None:
        archive = subprocess.Popen(["git", "-C", str(repository), "archive", ref], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(to)], stdin=archive.stdout, check=True)
        archive.wait()
        return ref
    files = git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, files):
        source, target = repository / name, to / name
        if not source.is_symlink() and not source.is_file():
            continue  # removed, but still in the index
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    changed = git(repository, "status", "--porcelain", "--", ".", ":!bench/results").strip()
    return git(repository, "rev-parse", "HEAD").strip() + (" and changes" if changed else "")


def install(repository: Path, ref: str | None, name: str, folder: Path) -> Installation:
    """Copy one version and let pip build it into a folder of its own, its C++ too; torch and all else are this environment's.

    Raises HyperLlamaError when it can't be built.
    """
    made = Installation(name, folder / name)
    commit = copy_tree(repository, ref, made.folder / "source")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("scikit_build_core") else []
    command = [
        sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps", *isolation,
        "--target", str(made.library), str(made.folder / "source"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise HyperLlamaError(f"{name} ({commit[:12]}) could not be installed: {last}")
    (made.library / "COMMIT").write_text(commit, encoding="utf-8")
    return made


class Worker:
    """A version's process."""

    def __init__(self, version: Installation):
        self.version = version
        work = version.folder / "work"
        work.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-P", str(WORKER), str(version.library), str(work)],
            cwd=work, env=version.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            start_new_session=True,  # so that it and its child can be killed together
        )  # fmt: skip

    def started(self) -> None:
        """Wait until it is there; `told`: path, commit and torch of this process, as it says."""
        self.told: dict[str, str] = self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """A question's answer. Raises WorkerError."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        except BrokenPipeError:
            raise WorkerError("its process is gone") from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()
        self.process.stdout.close()

    def kill(self) -> None:
        """End it and its child at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.kill()
            raise WorkerError(f"its process gave no answer for {PATIENCE} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"its process ended with code {self.process.wait()}")
        answer = json.loads(line)
        if answer["error"]:
            raise WorkerError(answer["error"])
        return answer["value"]


@contextmanager
def workers(versions: Sequence[Installation]) -> Iterator[list[Worker]]:
    """A process of each version, all started at once."""
    started: list[Worker] = []
    try:
        started += [Worker(version) for version in versions]
        for worker in started:
            worker.started()
        yield started
    finally:
        for worker in started:
            worker.close()


def one_round(pair: Sequence[Worker], case: str, turn: int, slow: float = 0.0) -> float:
    """log(head / base) of one round; whoever is first in the first turn is second in the next.

    Raises WorkerError, its message beginning with the version's name.
    """

    def ask(i: int, do: str, **arguments: Any) -> Any:
        try:
            return pair[i].ask(do, **arguments)
        except WorkerError as error:
            raise WorkerError(f"{pair[i].version.name}: {error}") from None

    about = ask(0, "prepare", case=case)
    ask(1, "prepare", case=case, calls=about["calls"], slow=slow)
    took: tuple[list[float], list[float]] = ([], [])
    turns, spent = 0, 0.0
    while turns < TURNS[0] or (spent < ROUND and turns < TURNS[1]):
        outer = (turn + turns) % 2
        for i in (outer, 1 - outer, 1 - outer, outer):
            took[i].extend(ask(i, "sample", seconds=SAMPLE))
        turns += 1
        spent += 4 * max(SAMPLE, about["seconds"])
    return round_ratio(*took)


@dataclass
class Gate:
    """What is found out about two versions, sweep by sweep."""

    base: Installation
    head: Installation
    only: re.Pattern[str] = field(default_factory=lambda: re.compile(""))
    slow: dict[str, float] = field(default_factory=dict)  # case -> share of its time that head wastes, to try the gate
    threads: int = 1
    trials: dict[str, Trial] = field(default_factory=dict)
    stumbled: set[str] = field(default_factory=set)  # cases that failed once, which may be the machine's doing
    failures: dict[str, str] = field(default_factory=dict)  # cases that failed twice, and why
    told: dict[str, dict[str, str]] = field(default_factory=dict)  # what the versions' processes say of themselves
    sweeps: int = 0

    def run(self, seconds: float, say: Callable[[str], None] = lambda _: None) -> None:
        """Sweep until every case is decided or `seconds` are over. Raises HyperLlamaError when a version does not start."""
        until, begun = time.monotonic() + seconds, False
        while not begun or time.monotonic() < until:
            try:
                with workers((self.base, self.head)) as pair:
                    for _ in range(SWEEPS):
                        where = self._where()
                        for worker in pair:
                            worker.ask("fresh", threads=self.threads, cpu=where)
                        if not begun:
                            self._begin(pair, say)
                            begun = True
                        self._sweep(pair, until)
                        for worker in pair:
                            worker.ask("end")
                        say(self.progress())
                        if not self.open() or time.monotonic() >= until:
                            return
            except WorkerError as error:
                if not begun:
                    raise HyperLlamaError(f"a version does not start: {error}") from None
                say(str(error))  # the next pair goes on

    def _where(self) -> int | None:
        """The CPU of the next sweep; with several threads None, wherever the system puts them."""
        if self.threads > 1 or not hasattr(os, "sched_getaffinity"):
            return None
        cpus = sorted(os.sched_getaffinity(0))
        return cpus[self.sweeps % len(cpus)]

    def _begin(self, pair: Sequence[Worker], say: Callable[[str], None]) -> None:
        """Note who is measured, and what. Raises HyperLlamaError when `only` finds no case."""
        for worker in pair:
            self.told[worker.version.name] = worker.told
            say(f"{worker.version.name}: {worker.told['commit']} from {worker.told['path']}")
        known = pair[1].ask("cases")
        names = [name for name in known if self.only.search(name)]
        if not names:
            raise HyperLlamaError(f"--only {self.only.pattern} finds none of {', '.join(known)}")
        self.trials = {name: Trial(len(names)) for name in names}

    def open(self) -> list[str]:
        """Cases without a verdict."""
        return [name for name, trial in self.trials.items() if trial.verdict == "undecided"]

    def progress(self) -> str:
        """Where it stands, on one line."""
        found = [name for name, trial in self.trials.items() if trial.verdict == "slower"]
        slower = f"; slower: {', '.join(found)}" if found else ""
        return f"sweep {self.sweeps}: {len(self.trials) - len(self.open())} of {len(self.trials)} cases decided{slower}"

    def _sweep(self, pair: Sequence[Worker], until: float) -> None:
        """A round of every open case."""
        self.sweeps += 1
        for i, name in enumerate(self.open()):
            if time.monotonic() >= until:
                return
            try:
                self.trials[name].add(one_round(pair, name, self.sweeps + i, self.slow.get(name, 0.0)))
            except WorkerError as error:
                if name in self.stumbled:
                    self.failures[name] = str(error)
                    del self.trials[name]
                self.stumbled.add(name)
                if "its process" in str(error):  # there is none to go on with
                    raise

    def report(self) -> Report:
        """What was found: a verdict of each case and of the whole."""
        cases: dict[str, Any] = {}
        for name, trial in self.trials.items():
            found = median_interval([math.exp(ratio) for ratio in trial.ratios]) if trial.ratios else None
            cases[name] = {"verdict": trial.verdict, "rounds": len(trial.ratios), "head_over_base": found}
        for name, reason in self.failures.items():
            cases[name] = {"verdict": "broken" if reason.startswith("head:") else "not in base", "reason": reason}

        def of(*verdicts: str) -> list[str]:
            return [name for name, found in cases.items() if found["verdict"] in verdicts]

        return {
            "verdict": "regression" if of("slower", "broken") else "pass",
            "slower": of("slower"), "broken": of("broken"), "undecided": of("undecided"), "not_in_base": of("not in base"),
            "alarm": ALARM, "margin": MARGIN, "worth": WORTH, "miss": MISS, "threads": self.threads, "sweeps": self.sweeps,
            **self.told, "cases": cases,
        }  # fmt: skip


def resource_gate(head: Installation) -> dict[str, Any] | None:
    """The faults of head's Triton kernels by its own bench.resources; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    command = [sys.executable, "-S", "-P", "-m", "hyperllama.bench.resources"]
    done = subprocess.run(command, cwd=head.folder, env=head.environment(), capture_output=True, text=True, check=False)
    faults = [line for line in done.stderr.splitlines() if line.strip()] if done.returncode else []
    return {"exit": done.returncode, "summary": (done.stdout.strip().splitlines() or [""])[-1], "faults": faults}


def table(report: Report) -> str:
    """The report for a person."""
    lines = [f"{'case':34} {'head / base':>11}  {'95 % interval':>15}  {'rounds':>6}  verdict"]
    for name, found in report["cases"].items():
        ratio, span, rounds = found.get("head_over_base"), "-", found.get("rounds", "-")
        if ratio and ratio["low"] is not None:
            span = f"{ratio['low']:.3f} - {ratio['high']:.3f}"
        middle = f"{ratio['median']:.3f}" if ratio else "-"
        lines.append(
            f"{name:34} {middle:>11}  {span:>15}  {rounds:>6}  {found['verdict']}  {found.get('reason', '')}".rstrip()
        )
    if report["undecided"]:
        lines.append(
            f"warning: time was over before {len(report['undecided'])} cases were decided, which passes: more --minutes, a "
            "quieter machine, or --only decide them"
        )
    resources = report.get("resources")
    if resources:
        lines += [f"resource gate: {resources['summary']}", *resources["faults"]]
    elif "resources" in report:
        lines.append("resource gate: not run, Triton is not installed")
    reasons = report["slower"] + report["broken"] + (["Triton kernels"] if resources and resources["exit"] else [])
    lines.append(f"{report['verdict']}: {', '.join(reasons) or 'no case is slower'}")
    return "\n".join(lines)


def judge(ref: str, *, only: str = "", minutes: float = 5.0, threads: int = 1, resources: bool = True) -> Report:
    """Install the commit `ref` and the working tree, measure both for at most `minutes`; `only`: cases whose name it finds.

    Raises HyperLlamaError for a mistake, before any work where it can be.
    """
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise HyperLlamaError(f"--only {only}: no regular expression: {error}") from None
    if not 0 < minutes < math.inf:
        raise HyperLlamaError(f"--minutes is {minutes}; a number above 0 was expected")
    if threads < 1:
        raise HyperLlamaError(f"--threads is {threads}; at least 1 was expected")
    repository = checkout()
    commit = commit_of(repository, ref)
    with tempfile.TemporaryDirectory(prefix="hyperllama-regress-") as temporary:
        say(f"installing {commit[:12]} and the working tree")
        base, head = (install(repository, at, name, Path(temporary)) for name, at in (("base", commit), ("head", None)))
        gate = Gate(base, head, pattern, threads=threads)
        gate.run(60 * minutes, say)
        report = {**gate.report(), "environment": environment()}
        if resources:
            say("resource gate ...")
            report["resources"] = resource_gate(head)
            if report["resources"] and report["resources"]["exit"]:
                report["verdict"] = "regression"
    return report


def say(text: str) -> None:
    """Progress, apart from the report."""
    print(text, file=sys.stderr, flush=True)
