"""Ends a run that hangs, and says which process it waited for, and in what.

Every process notes what its main thread does (`doing`); a thread of its own tells the others so through the run's key-value store,
a few times a time limit. Whoever has stood in one operation for longer than the limit looks at what the others last told:

    its beat stopped                 the process is stopped, or its machine is gone
    it is behind the others          it hangs in the operation that it noted
    all are in the same operation    the network, or the collective library

prints that as a sentence and ends its process with exit code 4. Collectives' own time limits name neither rank nor operation.
"""

import json
import os
import sys
import time
from contextlib import suppress
from threading import Event, Thread
from typing import Any

from torch.distributed import PrefixStore, Store

from hyperllama.errors import Lost


class Watchdog:
    """Watches the processes of a run as a context manager; `seconds` is the longest that an operation may take.

    It is armed by the first `doing`: what comes before (reading and checking inputs) takes as long as it takes.
    """

    def __init__(self, store: Store, rank: int, world: int, seconds: float):
        self.rank, self.world, self.seconds = rank, world, seconds
        self.tick = min(5.0, seconds / 10)
        # a connection of its own: a main thread that waits in the store must not silence the beat
        self.store = PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self.count, self.now, self.since = 0, "starting", 0.0
        self.ended = Event()
        self.thread = Thread(target=self._watch, name="watchdog", daemon=True)

    def doing(self, step: int, operation: str) -> None:
        """Note what the main thread begins; all processes note the same operations in the same order."""
        self.count, self.now, self.since = self.count + 1, f"{operation} of step {step}", time.monotonic()

    def alive(self) -> None:
        """Note that a long operation of one process goes on."""
        self.since = time.monotonic()

    def lost(self, error: Exception) -> Lost:
        """What a failed collective means: who is gone, as far as the beats tell."""
        before = self._beats()
        time.sleep(3 * self.tick)
        return Lost(f"{self._verdict(before, self._beats())} ({str(error).splitlines()[0]})")

    def _watch(self) -> None:
        beat = 0
        before: dict[int, dict[str, Any]] = {}
        while not self.ended.wait(self.tick):
            beat += 1
            age = time.monotonic() - self.since if self.count else 0.0
            with suppress(RuntimeError):  # the store's host is gone: the main thread will meet that too
                self.store.set(str(self.rank), json.dumps({"beat": beat, "count": self.count, "now": self.now}))
            if age < self.seconds / 2:
                before = {}
            elif not before:
                before = self._beats()
            elif age >= self.seconds:
                print(f"hyperllama: {self._verdict(before, self._beats())}", file=sys.stderr, flush=True)
                os._exit(Lost.code)  # the main thread stands in a collective: no exception reaches it

    def _beats(self) -> dict[int, dict[str, Any]]:
        """What each process last told; those that never did, or can't be asked, are missing."""
        found = {}
        for rank in range(self.world):
            try:
                if self.store.check([str(rank)]):
                    found[rank] = json.loads(self.store.get(str(rank)))
            except RuntimeError:
                break
        return found

    def _verdict(self, before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> str:
        waited = f"rank {self.rank} waited in {self.now}"
        told = {rank: f"rank {rank} ({beat['now']})" for rank, beat in after.items()}
        others = [rank for rank in range(self.world) if rank != self.rank]
        if not after:
            found = "the first process's machine can't be reached"
        elif silent := [r for r in others if r not in after or before.get(r, {}).get("beat") == after[r]["beat"]]:
            found = "silent, so stopped or gone: " + ", ".join(
                told.get(r, f"rank {r} (never heard of)") for r in silent
            )
        elif behind := [r for r in others if after[r]["count"] < self.count]:
            found = "hangs: " + ", ".join(told[r] for r in behind)
        elif any(after[r]["count"] > self.count for r in others):
            found = f"rank {self.rank} itself hangs"
        else:
            found = "all ranks wait there: the network or the collective library is at fault"
        return f"{found}; {waited}. The run ends; the same command goes on from its newest checkpoint"

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
