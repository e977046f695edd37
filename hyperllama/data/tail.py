"""The last step of a stage as nanotron's sampler fills it: for runs that repeat the paper's, copies and omissions included.

A stage has N windows and optimizer steps of B. When B does not divide N, the last step has N mod B windows of its own and is
still B long. Its windows go to P processes in groups of P M, micro-batch by micro-batch, process r taking M in a row. After the
last whole group some are left; process r walks them from the r-th on, where the r M-th would be right, in strides of P M, and
takes M in a row of those that exist. What does not exist is the stage's last window, with its full loss. So the windows of
neighbouring processes overlap, some windows are never seen, and most of the step may be copies of one.

Of N = 5120 k + 2465, P = 16, M = 8 (the paper's Faroese stages): 19 whole groups, one whose processes take 0-7, 1-8, ... 15-22 of
the 33 windows left, 20 of copies; 2560 copies in all, and 10 windows unseen.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tail:
    """A stage of `windows` windows in steps of `global_batch`, over `processes` with micro-batches of `micro_batch`."""

    windows: int
    global_batch: int
    processes: int
    micro_batch: int

    @property
    def start(self) -> int:
        """From which window on the order differs."""
        group = self.processes * self.micro_batch
        step = self.windows // self.global_batch * self.global_batch
        return step + (self.windows - step) // group * group

    @property
    def computed(self) -> int:
        """Windows that the stage computes: whole steps."""
        return -(-self.windows // self.global_batch) * self.global_batch

    def windows_at(self, index: np.ndarray) -> np.ndarray:
        """Which window of the stage stands at each place of the order; int64."""
        size, left = self.micro_batch, self.windows - self.start
        group, place = np.divmod(index - self.start, self.processes * size)
        walked = place // size + group * self.processes * size + place % size
        beyond = np.where(walked < left, self.start + walked, self.windows - 1)
        return np.where(index < self.start, index, beyond)
