"""One version of HyperLlama in a process of its own, for regress.py: answers to lines of JSON, one at a time.

    PYTHONPATH=VERSION:... python -S -P regress_worker.py VERSION WORK      VERSION: what pip installed; WORK: a folder that stays

The cases are those beside this file, whichever version they measure; `hyperllama` is VERSION's. `-S` leaves out .pth files: those
of an editable installation would put its own hyperllama first.

The process that regress.py starts has torch imported and nothing else done. At "fresh" it forks and waits, and its child answers
until "end". So every child's memory lies elsewhere, which can be worth some per cent to a case, and costs milliseconds.
"""

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

WARM = 0.02  # seconds of untimed calls
UNIT = 1e-3  # seconds that are timed together, at least
BRIEF = 0.01  # seconds: a shorter call is made once untimed before a sample, for the caches that the other process had
# what cases import
PREPARED = (
    "bench.regress_cases", "bench.cpu", "bench.ops", "bench.training", "bench.pipeline", "bench.merge",
    "hyperllama.train.loop", "hyperllama.grow.folder",
)  # fmt: skip


def make_clock() -> Callable[[], float]:
    """Seconds by the wall, less those that this thread, ready to run, waited for a CPU: what neighbours take is not a version's.

    What it waits for itself (a disk, a lock) counts. Linux tells the delay; elsewhere it is the wall's time.
    """
    try:
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)  # CPU time, delay (ns), time slices
        int(os.pread(file, 64, 0).split()[1])
    except (OSError, IndexError):
        return time.perf_counter
    return lambda: time.perf_counter() - 1e-9 * int(os.pread(file, 64, 0).split()[1])


def slowed(thunk: Callable[[], Any], share: float, now: Callable[[], float]) -> Callable[[], Any]:
    """The same work, and `share` of its time spent waiting: a regression made on purpose."""

    def thunk_and_wait() -> None:
        began = now()
        thunk()
        until = began + (1 + share) * (now() - began)
        while now() < until:
            pass

    return thunk_and_wait


class Measurer:
    """What the child answers to."""

    def __init__(self, work: Path):
        from bench.regress_cases import cases

        self.builders, self.now = cases(work), make_clock()

    def cases(self) -> list[str]:
        """Names of all cases on this machine."""
        return list(self.builders)

    def prepare(self, case: str, calls: int = 0, slow: float = 0.0) -> dict[str, Any]:
        """Build a case and warm it up; `calls` are timed together (0: as many as last UNIT). Tells calls and seconds of one."""
        import torch

        self.thunk: Any = None  # the last case's memory goes first
        gc.collect()
        thunk = self.builders[case]()
        self.thunk = slowed(thunk, slow, self.now) if slow else thunk
        self.wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
        self.calls, made, began = 1, 0, time.perf_counter()
        while made < 2 or time.perf_counter() - began < WARM:
            seconds, made = self._unit(), made + 1
        self.calls = calls or max(1, round(UNIT / seconds))
        return {"calls": self.calls, "seconds": seconds * self.calls}

    def sample(self, seconds: float) -> list[float]:
        """Seconds of units of calls, of as many as last `seconds`."""
        times: list[float] = []
        if (first := self._unit()) >= BRIEF:
            times.append(first)
        while sum(times) < seconds:
            times.append(self._unit())
        return times

    def _unit(self) -> float:
        began = self.now()
        for _ in range(self.calls):
            self.thunk()
        self.wait()
        return self.now() - began


def serve(work: Path, answer: Callable[[Any, str | None], None], threads: int, cpu: int | None) -> None:
    """Answer until "end", with so many threads; `cpu`: nowhere else than there."""
    import torch

    import hyperllama.memory

    torch.set_num_threads(threads)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    hyperllama.memory.keep_freed_blocks()  # as a training run does
    measurer = Measurer(work)
    answer(None, None)
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        if name == "end":
            return
        try:
            answer(getattr(measurer, name)(**request), None)
        except Exception as error:  # a case that one version lacks is a result
            answer(None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def main() -> None:
    """Tell who is here; fork at every "fresh"."""
    version, work = map(Path, sys.argv[1:])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like an answer

    def answer(value: Any, error: str | None) -> None:
        print(json.dumps({"value": value, "error": error}), file=answers)

    tools = ModuleType("bench")  # the folder of this file as a package, whichever version has one too
    tools.__path__ = [str(Path(__file__).parent)]
    sys.modules["bench"] = tools

    import torch  # this and what cases need: once for all children

    import hyperllama

    path = Path(hyperllama.__file__).resolve()
    if version.resolve() not in path.parents:
        answer(None, f"hyperllama came from {path.parent}, not from {version}")
        return
    for module in PREPARED:
        with suppress(Exception):  # a version that lacks something lacks the cases that import it
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or every child would go through all of it again
    commit = (version / "COMMIT").read_text(encoding="utf-8")
    answer({"path": str(path.parent), "commit": commit, "torch": torch.__version__}, None)
    for line in sys.stdin:
        request = json.loads(line)
        assert request.pop("do") == "fresh"
        child = os.fork()
        if not child:
            code = 1
            try:
                serve(work, answer, **request)
                code = 0
            except BaseException:  # whatever it is, the child must not go on as its parent
                traceback.print_exc()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code:  # nobody knows whether it had read the question that comes next
            answer(None, f"its process ended with code {code}")
            break
        answer(None, None)
    os._exit(0)  # libraries that tell at exit what they leaked have nothing to say here


if __name__ == "__main__":
    main()
