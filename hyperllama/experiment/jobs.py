"""Steps of a study in several processes: each as soon as what it needs is done, the dearest first.

A step is a call of a Study's method that keeps its result in a folder or file, so a study that was interrupted goes on with any
number of jobs, and its bits do not depend on it: every process computes with as many threads as this one. Two jobs on two cores are
faster with one thread each (OMP_NUM_THREADS=1).
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hyperllama.errors import HyperLlamaError, Stopped
from hyperllama.experiment.recipe import ExperimentConfig


@dataclass(frozen=True)
class Step:
    """`method(*args)` of the study of `config`, once the steps called `needs` are done; of several the one of the highest cost."""

    name: str
    config: ExperimentConfig
    method: str
    args: tuple[Any, ...]
    needs: frozenset[str] = frozenset()
    cost: int = 0


def carry_out(
    steps: Sequence[Step], jobs: int, data: Path | None, reuse: Path | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Do the steps, each after what it needs, `jobs` at a time; name -> what it returned.

    `data`, `reuse`: the Study's; `tell`: called with each name that is done.
    Raises the first error, HyperLlamaError when a process was killed; the steps that are under way are then stopped as by a
    signal and go on next time.
    """
    if jobs == 1:
        return {step.name: _do(step, data, reuse, quiet=False) for step in steps}
    import torch

    waiting, running, done = {step.name: step for step in steps}, dict[Future[Any], str](), dict[str, Any]()
    context = multiprocessing.get_context("spawn")
    previous = signal.signal(signal.SIGTERM, _stopped)
    with ProcessPoolExecutor(jobs, context, _begin, (torch.get_num_threads(),)) as pool:
        try:
            while waiting or running:
                ready = [step for step in waiting.values() if not step.needs & (waiting.keys() | {*running.values()})]
                for step in sorted(ready, key=lambda step: -step.cost)[: jobs - len(running)]:
                    running[pool.submit(_do, waiting.pop(step.name), data, reuse)] = step.name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    done[name] = future.result()
                    tell(name)
        except BrokenProcessPool:
            raise HyperLlamaError(f"one of {jobs} jobs was killed, perhaps for memory: take fewer") from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    return done


def _stopped(number: int, _: FrameType | None) -> None:
    raise Stopped(number, "stopped; the same command goes on")


def _begin(threads: int) -> None:
    """In a new process: this many threads, and an end when the parent is gone."""
    import torch

    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def _do(step: Step, data: Path | None, reuse: Path | None, quiet: bool = True) -> Any:
    from hyperllama.experiment.run import Study

    return getattr(Study(step.config, data, reuse, quiet), step.method)(*step.args)
