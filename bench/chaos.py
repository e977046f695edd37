"""A run that is killed, damaged, filled up and stopped, against one that is not: the same weights and metrics, bit for bit.

    python -m bench.chaos [--quick] [--kills 50] [--seed 0] [--only-one] [--json] [--out bench/results]

One tiny run on a small tmpfs meets, in random order and at random moments:
    SIGKILL, half of them while a checkpoint is being written
    a random bit flipped in a random file of its newest checkpoint
    a full disk: the file system is filled up under it, then freed; with and without a SIGKILL in between
Then a run of two processes meets SIGKILL of either and a SIGSTOP, which has to end the run by rank within the time limit.

After each disturbance the run has to go on from its newest intact checkpoint, which is never older than the newest it had. The exit
code is 1 when anything differs. Processes are forked from one that has imported all that is needed, but used none of it.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hyperllama.checkpoint import checkpoints, verify
from hyperllama.config import RunConfig
from hyperllama.data.build import build_shards
from hyperllama.data.sample import write_corpus
from hyperllama.data.tokenizer import train_tokenizer
from hyperllama.errors import HyperLlamaError, Lost
from hyperllama.files import write_json
from hyperllama.settings import validated
from hyperllama.train.loop import train

from .environment import device_slug, environment, without_paths
from .harness import Result, outcome

TMPFS_BYTES = 16 << 20  # a checkpoint is 1.2 MB: two kept, one in the making and the model fit
EVERY = 5  # steps between checkpoints
TIMEOUT = 6  # seconds that a hanging process gets


def recipe(work: Path, out: Path, steps: int) -> RunConfig:
    """A model of two layers on sample text."""
    values = {
        "name": "chaos",
        "out": str(out),
        "tokenizer": str(work / "tokenizer.model"),
        "model": {"hidden_size": 48, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
        "data": {"sources": [{"path": str(work / "shards" / "eng")}], "seq_len": 32, "verify": False},
        "budget": {"steps": steps},
        "global_batch": 8,
        "micro_batch": 4,
        "precision": "bf16",
        "log_every": 1,
        "timeout_seconds": TIMEOUT,
        "checkpoint": {"every_steps": EVERY, "keep": 3},
    }
    return validated(RunConfig, values, "the chaos recipe")


def forked(work: Callable[[], object], log: Path, **environment: str) -> int:
    """Run `work` in a fork of this process; returns its id. It ends with the code of main() in cli.py, and tells `log`."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        torch.set_num_threads(1)
        work()
        code = 0
    except Lost as error:
        print(error, flush=True)
        code = error.code
    except (HyperLlamaError, OSError) as error:
        print(error, flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Attempt:
    """One start of a run on `world` processes, until it ends or is ended."""

    def __init__(self, config: RunConfig, log: Path, world: int = 1):
        self.out, self.log, self.codes = Path(config.out), log, {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.ids = [
            forked(lambda: train(config, quiet=True), log, RANK=str(rank), LOCAL_RANK=str(rank), **place)
            for rank in range(world)
        ]

    codes: dict[int, int]

    def running(self) -> bool:
        for process in self.ids:
            if process not in self.codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.codes[process] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.ids)

    def until(self, found: Callable[[], bool], seconds: float = 120.0) -> bool:
        """Wait for `found`; False when all processes have ended before, or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found():
                return True
            if not self.running():
                return False
            time.sleep(0.0005)
        return False

    def kill(self) -> None:
        for process in self.ids:
            if process not in self.codes:
                os.kill(process, signal.SIGKILL)
        while self.running():
            time.sleep(0.001)

    def steps(self) -> int:
        return step_count(self.out)


def step_count(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def beginnings(out: Path) -> list[int]:
    """The steps that the starts of a run began at."""
    file = out / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event.get("step", 0) for event in events if event["event"] in ("started", "resumed")]


def intact(folder: Path) -> bool:
    try:
        return bool(verify(folder))
    except HyperLlamaError:
        return False


@contextmanager
def small_disk(path: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """A small tmpfs at `path`; False, and said, where it can't be mounted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        say("no tmpfs can be mounted here (not root?): a limit on the size of files stands in for the full disk")
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=False)


def fill(folder: Path) -> Path:
    """Fill a file system up to its last byte."""
    file = folder / "filler"
    with file.open("ab", buffering=0) as out:
        for size in (1 << 16, 1 << 9, 1):
            try:
                while True:
                    out.write(b"\0" * size)
            except OSError:
                continue
    return file


def limited(config: RunConfig) -> None:
    """The stand-in for a full disk: no file grows beyond 100 kB."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train(config, quiet=True)


class Chaos:
    """What was done to a run, and what it did wrong."""

    def __init__(self, work: Path, seed: int, say: Callable[[str], None]):
        self.work, self.random, self.say = work, random.Random(seed), say
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self.log = work / "log.txt"

    def expect(self, true: bool, sentence: str) -> None:
        if not true:
            self.problems.append(sentence)
            self.say(f"WRONG: {sentence}")

    def finish(self, config: RunConfig, world: int = 1) -> None:
        """Run to the end."""
        attempt = Attempt(config, self.log, world)
        attempt.until(lambda: False, 600)
        ended = not attempt.running()
        attempt.kill()
        self.expect(ended and set(attempt.codes.values()) == {0}, f"{config.out} ended with {attempt.codes}")

    def saving(self, out: Path) -> bool:
        return any((out / "checkpoints").glob(".step-*.tmp")) if (out / "checkpoints").is_dir() else False

    def kill(self, config: RunConfig, world: int = 1) -> None:
        """Let a run come some steps further, kill it, and look at what is left of it."""
        out = Path(config.out)
        before = [path for path in checkpoints(out) if intact(path)]
        start = int(before[-1].name[5:]) if before else 0
        attempt = Attempt(config, self.log, world)
        target = start + self.random.randint(1, 3 * EVERY)
        already = len(beginnings(out))
        if self.random.random() < 0.85:  # the others are killed while they start
            attempt.until(lambda: len(beginnings(out)) > already)
            attempt.until(lambda: attempt.steps() >= target)
        if self.random.random() < 0.5:
            attempt.until(lambda: self.saving(out), 5)
        else:
            time.sleep(self.random.random() * 0.01)
        victim = self.random.choice(attempt.ids)
        if victim not in attempt.codes:
            os.kill(victim, signal.SIGKILL)
            self.done["kills"] += 1
        if world > 1:  # the other one has to find out
            attempt.until(lambda: not attempt.running(), 4 * TIMEOUT)
            self.expect(
                set(attempt.codes.values()) in ({-9, Lost.code}, {-9}, {0}), f"codes {attempt.codes} after a kill"
            )
        attempt.kill()
        self.done["kills_in_saves"] += self.saving(out)
        began = beginnings(out)[already:]
        self.expect(began in ([], [start]), f"the run began at steps {began}, its newest intact checkpoint is {start}")
        self.nothing_lost(out, before)

    def nothing_lost(self, out: Path, before: list[Path]) -> None:
        """The newest intact checkpoint is none older than before; metrics reach at least as far."""
        after = [
            path for path in checkpoints(out) if intact(path)
        ]  # damage other than ours shows in the count at the end
        if before:
            self.expect(
                bool(after) and after[-1].name >= before[-1].name, f"{before[-1]} has gone, and no newer one is there"
            )
        if after:
            step = int(after[-1].name[5:])
            self.expect(step_count(out) >= step, f"metrics end at {step_count(out)}, before checkpoint {step}")

    def flip(self, out: Path) -> None:
        """Flip one bit of the newest checkpoint, when there is one before it."""
        found = checkpoints(out)
        if len(found) < 2:
            return
        file = self.random.choice(sorted(found[-1].iterdir()))
        content = bytearray(file.read_bytes())
        at = self.random.randrange(8 * len(content))
        content[at // 8] ^= 1 << at % 8
        file.write_bytes(content)
        self.done["flips"] += 1

    def told_damage(self, out: Path) -> int:
        file = out / "events.jsonl"
        return file.read_text().count('"event": "damaged"') if file.is_file() else 0

    def full(self, config: RunConfig, disk: Path | None, *, kill: bool) -> None:
        """Fill the disk under a run until it says that it can't save; free it; go on, or kill the run before."""
        out = Path(config.out)
        before = [path for path in checkpoints(out) if intact(path)]
        told = lambda: self.log.read_text().count("could not be written")  # noqa: E731
        already, starts = told(), len(beginnings(out))
        attempt = Attempt(config, self.log) if disk else None
        if attempt is None:
            process = forked(lambda: limited(config), self.log)
            deadline = time.monotonic() + 60
            while told() == already and time.monotonic() < deadline:
                time.sleep(0.001)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        else:
            assert disk is not None
            attempt.until(lambda: len(beginnings(out)) > starts)
            filler = fill(disk)
            attempt.until(lambda: told() > already, 60)
            refused = set(attempt.codes.values()) == {2}  # it could not even start: an error of its own
            self.expect(told() > already or refused, "a full disk was not told")
            if kill:
                attempt.kill()
            filler.unlink()
            kept = checkpoints(out)[-1:]
            attempt.until(lambda: checkpoints(out)[-1:] != kept, 30)
            self.expect(
                kill or not attempt.running() or checkpoints(out)[-1:] != kept, "no save after the disk was freed"
            )
            attempt.kill()
        self.done["full_disks"] += 1
        self.nothing_lost(out, before)

    def stop(self, config: RunConfig) -> None:
        """Stop one of two processes for good: the other has to end the run, and name it, in time."""
        out = Path(config.out)
        attempt, starts = Attempt(config, self.log, 2), len(beginnings(out))
        attempt.until(lambda: len(beginnings(out)) > starts)
        time.sleep(self.random.random() * 0.2)
        rank = self.random.randrange(2)
        os.kill(attempt.ids[rank], signal.SIGSTOP)
        began = time.monotonic()
        attempt.until(lambda: len(attempt.codes) == 1 if attempt.running() else True, 5 * TIMEOUT)
        self.expect(time.monotonic() - began < 3 * TIMEOUT, "a stopped rank was not found in time")
        other = attempt.ids[1 - rank]
        self.expect(
            attempt.codes.get(other) == Lost.code, f"a stopped rank ended the other with {attempt.codes.get(other)}"
        )
        last = self.log.read_text().splitlines()[-1]
        blamed, _, rest = last.partition("; ")
        self.expect(f"rank {rank}" in blamed and "waited in" in rest, f"a stopped rank {rank} was told as: {last}")
        attempt.kill()
        self.done["stopped_ranks"] += 1

    def compare(self, disturbed: Path, undisturbed: Path) -> None:
        for name in ("model/model.safetensors", "model/hyperllama.json"):
            a, b = (folder / name for folder in (disturbed, undisturbed))
            same = (
                a.is_file() and b.is_file() and blank(a.read_bytes(), disturbed) == blank(b.read_bytes(), undisturbed)
            )
            self.expect(same, f"{a} differs from the undisturbed run's")
        ours, theirs = (metrics(folder / "metrics.jsonl") for folder in (disturbed, undisturbed))
        self.expect(ours == theirs, f"{disturbed}/metrics.jsonl differs from the undisturbed run's")


def blank(content: bytes, folder: Path) -> bytes:
    """A file without the name of its run folder."""
    return content.replace(str(folder).encode(), b"")


def metrics(file: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its clock."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def chaos(kills: int, seed: int, say: Callable[[str], None], *, pairs: bool = True) -> dict[str, Any]:
    """Disturb a run `kills` times (and, with `pairs`, one of two processes); returns counts and what was wrong."""
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    made = Chaos(work, seed, say)
    try:
        prepared = forked(lambda: prepare(work), made.log)
        assert os.waitpid(prepared, 0)[1] == 0, made.log.read_text()
        with small_disk(work / "disk", say) as mounted:
            steps = kills * 3 * EVERY
            plain, config = (recipe(work, work / name / "run", steps) for name in ("plain", "disk"))
            made.finish(plain)
            for i in range(kills):
                made.kill(config)
                if i % 5 == 2:
                    made.flip(Path(config.out))
                if i % 10 in (3, 8):
                    made.full(config, work / "disk" if mounted else None, kill=i % 10 == 8)
                say(f"{i + 1} of {kills}: {dict(made.done)}, step {step_count(Path(config.out))} of {steps}")
            made.finish(config)
            flips, told = made.done["flips"], made.told_damage(Path(config.out))
            made.expect(told == flips, f"{flips} bits were flipped, {told} damaged checkpoints told")
            made.compare(Path(config.out), Path(plain.out))
        if pairs:
            two, disturbed = (recipe(work, work / name, 60) for name in ("two", "two-disturbed"))
            made.finish(two, 2)
            for _ in range(2):
                made.kill(disturbed, 2)
            made.stop(disturbed)
            made.finish(disturbed, 2)
            made.compare(Path(disturbed.out), Path(two.out))
        return {"seed": seed, "steps": steps, "tmpfs": mounted, **made.done, "problems": made.problems}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def prepare(work: Path) -> None:
    """Sample text, a tokenizer and shards."""
    write_corpus(work / "corpus", ("eng",), 60_000, seed=1, dev_bytes=5_000, pairs=20)
    text = work / "corpus" / "text" / "eng" / "train.jsonl"
    tokenizer = train_tokenizer([text], work / "tokenizer.model", 512, seed=0)
    build_shards([text], tokenizer, work / "shards" / "eng", language="eng")


def judged(result: dict[str, Any]) -> list[Result]:
    """The target: disturbed runs equal the undisturbed ones."""
    equal = float(not result["problems"])
    what = "disturbed runs equal to the undisturbed"
    return [outcome("chaos", {"kills": result["kills"]}, "share", what, 1.0, equal)]


def main() -> int:
    """Disturb, compare, tell; 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="12 kills: under five minutes")
    parser.add_argument("--kills", type=int, help="SIGKILLs of the one-process run; default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of moments, bits and victims")
    parser.add_argument("--only-one", action="store_true", help="leave out the run of two processes")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write <FOLDER>/<device>/chaos.json")
    arguments = parser.parse_args()
    began = time.monotonic()
    kills = arguments.kills or (12 if arguments.quick else 50)
    result = chaos(
        kills, arguments.seed, lambda line: print(line, file=sys.stderr, flush=True), pairs=not arguments.only_one
    )
    result["seconds"] = round(time.monotonic() - began, 1)
    if arguments.out:
        about = environment("cpu")
        command = ["bench.chaos", *map(without_paths, sys.argv[1:])]
        made = {
            "date": datetime.date.today().isoformat(), "command": command, "environment": about,
            "results": judged(result), "chaos": result,
        }  # fmt: skip
        write_json(arguments.out / device_slug(about["device"]) / "chaos.json", made)
    print(json.dumps(result, indent=1) if arguments.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
