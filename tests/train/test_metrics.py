"""metrics.jsonl: skipped steps, spikes, and a disk that is full for a while."""

import errno
import json
import resource
from io import StringIO
from statistics import fmean, pstdev

import pytest
import torch
from rich.console import Console

from hyperllama.train.metrics import SPIKE_STEPS, Events, Metrics

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def say(tmp_path):
    return Events(tmp_path / "events.jsonl", Console(file=StringIO(), width=200), write=True)


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def add(metrics, step, loss, norm=1.0):
    metrics.add({"step": step, "windows": 8 * step, "batch": 8}, torch.tensor([loss, norm]))


def test_a_step_that_is_not_finite_is_null_and_named_by_its_windows(tmp_path, say):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, say, write=True)
    for step, (loss, norm) in enumerate([(2.0, 1.0), (NAN, 1.0), (2.0, INF), (1.0, 1.0), (NAN, NAN)], 1):
        add(metrics, step, loss, norm)
    metrics.flush(1, 1, None)
    assert (metrics.skipped, metrics.skipped_in_a_row) == (3, 1)
    assert [line.get("skipped", False) for line in lines(tmp_path / "metrics.jsonl")] == [
        False,
        True,
        True,
        False,
        True,
    ]
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [2.0, None, None, 1.0, None]
    events = lines(tmp_path / "events.jsonl")
    assert [(event["step"], event["windows"]) for event in events] == [(2, [8, 15]), (3, [16, 23]), (5, [32, 39])]
    assert "step 3: loss 2.0, gradient norm inf" in say.screen.file.getvalue()


def test_spikes_are_measured_in_standard_deviations_of_the_last_steps_also_after_a_resume(tmp_path, say):
    losses = (5 + torch.randn(200, dtype=torch.float64)).tolist()
    path = tmp_path / "metrics.jsonl"
    whole = Metrics(path, 0, say, write=True)
    for step, loss in enumerate(losses, 1):
        whole.add({"step": step, "windows": step, "batch": 1}, torch.tensor([loss, 1.0], dtype=torch.float64))
    whole.flush(1, 1, None)
    written = lines(path)
    assert "loss_z" not in written[SPIKE_STEPS // 4 - 1] and "loss_z" in written[SPIKE_STEPS // 4]
    last = losses[199 - SPIKE_STEPS : 199]
    assert written[199]["loss_z"] == pytest.approx((losses[199] - fmean(last)) / pstdev(last), rel=1e-12)
    resumed = Metrics(path, 199, say, write=True)
    resumed.add({"step": 200, "windows": 200, "batch": 1}, torch.tensor([losses[199], 1.0], dtype=torch.float64))
    resumed.flush(1, 1, None)
    assert lines(path)[199]["loss_z"] == written[199]["loss_z"]


def test_lines_that_a_failed_machine_lost_are_told_and_training_goes_on(tmp_path, say):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0, say, write=True)
    for step in range(1, 6):
        add(metrics, step, float(step))
    metrics.flush(1, 1, None)
    metrics.secure()
    whole = path.read_bytes().splitlines(keepends=True)
    for torn, kept in [([*whole[:3], whole[3][:20]], 3), ([*whole[:2], bytes(30), b"\n", *whole[3:]], 3), (whole, 4)]:
        path.write_bytes(b"".join(torn))
        resumed = Metrics(path, 4, say, write=True)
        assert [line["loss"] for line in lines(path)] == [line for line in (1, 2, 3, 4) if line in resumed.recent]
        assert len(resumed.recent) == kept
    assert say.screen.file.getvalue().count("has 3 whole lines of the 4 steps") == 2


class Full:
    """A file on a disk with `room` bytes left."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self.room = data[: self.room], self.room - len(data[: self.room])
        return self.file.write(taken)

    def close(self):
        self.file.close()


def test_a_full_disk_is_told_once_and_no_line_is_lost_or_torn(tmp_path, say):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, say, write=True)
    metrics.file = Full(metrics.file, 150)
    for step in range(1, 6):
        add(metrics, step, float(step))
        metrics.flush(1, 1, None)
    with pytest.raises(OSError, match=r"metrics.jsonl: No space"):
        metrics.secure()
    assert "No space left" in metrics.problem and say.screen.file.getvalue().count("kept in memory") == 1
    with pytest.raises(OSError, match="No space"):
        metrics.close()
    metrics.file.room = 10**6
    add(metrics, 6, 6.0)
    metrics.flush(1, 1, None)
    metrics.close()
    assert not metrics.problem and [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_an_event_that_a_full_disk_cuts_off_is_not_joined_to_the_next(say):
    say.note("first", step=1)
    size, (soft, hard) = say.path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # as a disk with room for ten bytes
    try:
        say.note("second", step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    say.note("third", step=3)
    assert [line["event"] for line in lines(say.path)] == ["first", "third"]
