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

# rank -> {beat, count: operations begun, now: the last of them, alive: how often a long one was said to go on}
Beats = dict[int, dict[str, Any]]


class Watchdog:
    """Watches the processes of a run as a context manager; `seconds` is the longest that an operation may take.

    It is armed by the first `doing`, and bears with others that beat and have not come to theirs, since reading and checking a
    recipe's inputs takes as long as it takes; and with those that say that a long operation of theirs goes on.
    """

    def __init__(self, store: Store, rank: int, world: int, seconds: float):
        self.rank, self.world, self.seconds = rank, world, seconds
        self.tick = min(5.0, seconds / 10)
        # a connection of its own: a main thread that waits in the store must not silence the beat
        self.store = PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self.agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else rank 0 keeps the store
        self.count, self.now, self.since, self.alives = 0, "starting", time.monotonic(), 0
        self.told: Beats = {}  # what each process last told, as of `heard`
        self.heard = self.since
        self.suspicious, self.ended = False, Event()
        # a store that does not answer blocks the thread that asks it: another one watches
        self.threads = [Thread(target=work, name="watchdog", daemon=True) for work in (self._talk, self._watch)]

    def doing(self, step: int, operation: str) -> None:
        """Note what the main thread begins; all processes note the same operations in the same order."""
        self.count, self.now, self.since = self.count + 1, f"{operation} of step {step}", time.monotonic()

    def alive(self) -> None:
        """Note that a long operation of one process goes on: the others, which may wait for it, hear of it."""
        self.alives, self.since = self.alives + 1, time.monotonic()

    def lost(self, error: Exception) -> Lost:
        """What a failed collective means: who is gone, as far as the beats tell."""
        self.suspicious = True
        self.since = time.monotonic()  # the collective has ended: nothing hangs here
        time.sleep(2 * self.tick)
        before = dict(self.told)
        time.sleep(3 * self.tick)
        return Lost(f"{self._verdict(before)} ({str(error).splitlines()[0]})")

    def _talk(self) -> None:
        """Tell what this process does; hear what the others do: of the first always, of all when something seems wrong."""
        beat = 0
        while not self.ended.wait(self.tick):
            beat += 1
            with suppress(RuntimeError):  # a store whose host is gone stays silent
                told = {"beat": beat, "count": self.count, "now": self.now, "alive": self.alives}
                self.store.set(str(self.rank), json.dumps(told))
                for rank in range(self.world if self.suspicious else 1):
                    if self.store.check([str(rank)]):
                        self.told[rank] = json.loads(self.store.get(str(rank)))
                self.heard = time.monotonic()

    def _watch(self) -> None:
        before: Beats | None = None
        while not self.ended.wait(self.tick):
            age = time.monotonic() - self.since if self.count else 0.0
            self.suspicious |= age > self.seconds / 4
            if age < self.seconds / 2:
                before = None
            elif before is None:
                before = dict(self.told)
            elif age >= self.seconds and self._others_work(before):
                self.since = time.monotonic()
            elif age >= self.seconds:
                print(f"hyperllama: {self._verdict(before)}", file=sys.stderr, flush=True)
                os._exit(Lost.code)  # the main thread stands in a collective: no exception reaches it

    def _others_work(self, before: Beats) -> bool:
        """Whether some process has not come to its first operation, or none is silent and some goes on with a long one."""
        pairs = [(before.get(rank, {}), now) for rank, now in self.told.items() if rank != self.rank]
        beating = [(was, now) for was, now in pairs if now["beat"] != was.get("beat")]
        if any(now["count"] == 0 for _, now in beating):
            return True
        return len(beating) == self.world - 1 and any(now["alive"] != was.get("alive") for was, now in beating)

    def _verdict(self, before: Beats) -> str:
        """Who is to blame, from what all told before and now."""
        after = dict(self.told)
        told = {rank: f"rank {rank} ({beat['now']})" for rank, beat in after.items()}
        others = [rank for rank in range(self.world) if rank != self.rank]
        if time.monotonic() - self.heard > 3 * self.tick:
            host = "torchrun on the first machine" if self.agent else told.get(0, "rank 0")
            found = f"silent, so stopped or gone: {host}, which keeps the run's store"
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
        waited = f"rank {self.rank} waited in {self.now}"
        return f"{found}; {waited}. The run ends; the same command goes on from its newest checkpoint"

    def __enter__(self) -> "Watchdog":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(2 * self.tick)  # one that waits for the store ends with the process
