"""Checkpoints: whole or absent, checked, cut and reassembled for any number of processes, written beside the loop."""

import errno
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hyperllama import checkpoint
from hyperllama.arena import Arena
from hyperllama.checkpoint import Checkpointer, checkpoints, load, newest, slices, verify
from hyperllama.config import CheckpointSettings
from hyperllama.errors import HyperLlamaError
from tests.reference import shape

ROLES = ("master", "m", "v")


@dataclass
class Peers:
    """Processes that agree at once: what one says, all say."""

    rank: int = 0
    world: int = 1
    said: int = 0

    def largest_int(self, value: int) -> int:
        return self.said or value

    def alive(self) -> None:
        pass


def filled(seed: int = 0, **changes) -> Arena:
    arena = Arena(shape(**changes), torch.float32, "cpu", training=True)
    generator = torch.Generator().manual_seed(seed)
    for role in ROLES:
        getattr(arena, role).copy_(torch.randn(arena.size, generator=generator))
    return arena


def savers(run: Path, world: int = 1, **settings) -> list[Checkpointer]:
    told: list[tuple[str, str]] = []
    made = [
        Checkpointer(run, CheckpointSettings(**settings), Peers(rank, world, said=7), lambda *event: told.append(event))
        for rank in range(world)
    ]
    made[0].told = told
    return made


def save(run: Path, step: int, arena: Arena, world: int = 1, **state) -> bool:
    made = savers(run, world)
    for saver in made:
        saver.save(step, slices(arena, saver.rank, world), arena, state)
    return all([saver.wait() for saver in made])


def loaded(folder: Path, world: int, **changes) -> Arena:
    arena, state = Arena(shape(**changes), torch.float32, "cpu", training=True), verify(folder)
    for rank in range(world):
        load(folder, state, arena, slices(arena, rank, world))
    return arena


def equal(a: Arena, b: Arena) -> bool:
    return all(torch.equal(getattr(a, role), getattr(b, role)) for role in ROLES)


@pytest.mark.parametrize("writers, readers", [(1, 1), (1, 4), (3, 1), (3, 2), (4, 3)])
def test_any_number_of_processes_reads_what_any_other_wrote(tmp_path, writers, readers):
    arena = filled()
    assert save(tmp_path, 5, arena, writers, windows=40)
    (folder,) = checkpoints(tmp_path)
    assert equal(arena, loaded(folder, readers))
    state = verify(folder)
    assert (state["step"], state["windows"], len(state["files"])) == (5, 40, writers)


def test_pieces_may_be_cut_at_tensors_as_fully_sharded_processes_hold_them(tmp_path):
    arena = filled()
    pieces = {at: {role: arena.packed(role)[name].flatten() for role in ROLES} for name, at in arena.offsets.items()}
    (saver,) = savers(tmp_path)
    saver.save(1, pieces, arena, {})
    assert saver.wait()
    got = Arena(shape(), torch.float32, "cpu", training=True)
    folder = checkpoints(tmp_path)[0]
    targets = {at: {r: got.packed(r)[name].view(-1) for r in ROLES} for name, at in got.offsets.items()}
    load(folder, verify(folder), got, targets)
    assert all(
        torch.equal(got.packed(role)[name], arena.packed(role)[name]) for role in ROLES for name in arena.offsets
    )


def test_other_tools_read_and_check_a_checkpoint(tmp_path):
    arena = filled()
    assert save(tmp_path, 5, arena, 2)
    (folder,) = checkpoints(tmp_path)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    halves = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    at = arena.size // 2
    assert torch.equal(torch.cat([halves[0]["master@0"], halves[1][f"master@{at}"]]), arena.master)


def test_the_loop_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(tmp_path, monkeypatch):
    go, write = Event(), checkpoint.write_arrays
    monkeypatch.setattr(checkpoint, "write_arrays", lambda *a: go.wait() and write(*a))
    arena, before = filled(), filled()
    (saver,) = savers(tmp_path)
    saver.save(1, slices(arena), arena, {})  # returns although nothing can be written yet
    assert not checkpoints(tmp_path)
    arena.master.add_(1)
    second = Thread(target=saver.save, args=(2, slices(arena), arena, {}))
    second.start()
    second.join(0.1)
    assert second.is_alive(), "one copy in memory: the second save waits for the first"
    go.set()
    second.join()
    assert saver.wait() and len(checkpoints(tmp_path)) == 2
    assert equal(before, loaded(checkpoints(tmp_path)[0], 1)) and equal(arena, loaded(checkpoints(tmp_path)[1], 1))


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path, monkeypatch, culprit):
    arena, made, write = filled(), savers(tmp_path, 2), checkpoint.write_arrays

    def full(file, arrays, alive):
        if f"rank-{culprit:05}" in file.name and "0002" in str(file.parent):
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, arrays, alive)

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    outcomes = []
    for step in (1, 2, 3):
        for saver in made:
            saver.save(step, slices(arena, saver.rank, 2), arena, {})
        outcomes.append(made[0].wait())
        made[1].wait()
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert outcomes == [True, False, True]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001", "step-00000003"]
    ((event, sentence),) = made[0].told
    assert event == "not_saved" and "step-00000002" in sentence and "the newest is" in sentence
    assert ("No space left" if culprit == 0 else "rank-00001") in sentence


def test_what_lies_elsewhere_is_on_the_disk_first(tmp_path):
    (saver,), arena, done = savers(tmp_path), filled(), []
    saver.save(1, slices(arena), arena, {}, lambda: done.append(checkpoints(tmp_path)))
    assert saver.wait() and done == [[]]

    def refuse():
        raise OSError("metrics.jsonl: No space left on device")

    saver.save(2, slices(arena), arena, {}, refuse)
    assert not saver.wait() and [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    assert "metrics.jsonl: No space left" in saver.told[0][1]


def test_a_save_does_not_wait_for_a_process_that_ended_the_run(tmp_path, monkeypatch):
    """Otherwise the interpreter, which waits for its threads, would stay for PART_SECONDS."""
    monkeypatch.setattr(checkpoint, "LAST_SECONDS", 0.1)
    arena, (first, _) = filled(), savers(tmp_path, 2)
    with pytest.raises(RuntimeError, match="gloo"), first:
        first.save(1, slices(arena, 0, 2), arena, {})
        raise RuntimeError("gloo: connection closed by peer")
    assert not first.wait() and "rank-00001-of-00002.safetensors did not come" in first.told[0][1]


def test_a_slow_write_tells_that_it_goes_on(tmp_path):
    blocks = []
    checkpoint.write_arrays(tmp_path / "part", {"m@0": np.zeros(5 << 19, np.float32)}, lambda: blocks.append(1))
    assert len(blocks) == 1 + 3  # header, 10 MiB


def test_retention_keeps_the_newest_every_nth_and_the_best(tmp_path):
    (saver,) = savers(tmp_path, keep=2, keep_every=4, keep_best="loss")
    arena = filled()
    for step, loss in enumerate([5.0, 4.0, 1.0, 4.0, 3.0, 2.0, 2.5, 3.0, 4.0], 1):
        saver.save(step, slices(arena), arena, {"loss": loss})
    saver.wait()
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [3, 4, 8, 9]


def test_leftovers_of_a_killed_save_are_no_checkpoint_and_go_at_the_next_start(tmp_path):
    assert save(tmp_path, 1, filled())
    for left in (".step-00000002.123.tmp", ".step-00000000.old"):
        (tmp_path / "checkpoints" / left).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    savers(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if how == "truncate" else content)


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["rank-00001-of-00002.safetensors", "state.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_told_and_set_aside_and_the_one_before_used(tmp_path, name, how):
    for step in (1, 2):
        assert save(tmp_path, step, filled(step), 2)
    damage(checkpoints(tmp_path)[1] / name, how)
    told = []
    folder, state = newest(tmp_path, Peers(), lambda *event: told.append(event))
    assert (folder.name, state["step"]) == ("step-00000001", 1) and equal(filled(1), loaded(folder, 1))
    ((event, sentence),) = told
    assert event == "damaged" and "step-00000002" in sentence and "the one before is used" in sentence
    assert (tmp_path / "checkpoints" / "damaged-step-00000002").is_dir()


def test_no_run_starts_again_silently_when_no_checkpoint_is_intact(tmp_path):
    assert save(tmp_path, 1, filled())
    damage(checkpoints(tmp_path)[0] / "state.json", "flip")
    for _ in range(2):  # the second time there is only the one set aside
        with pytest.raises(HyperLlamaError, match=r"no checkpoint in .* is intact"):
            newest(tmp_path, Peers(), lambda *event: None)


def test_every_single_bit_of_a_checkpoint_counts(tmp_path):
    assert save(tmp_path, 1, filled())
    (folder,) = checkpoints(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for file in folder.iterdir():
        content = file.read_bytes()
        for at in torch.randint(8 * len(content), (20,), generator=generator).tolist():
            flipped = bytearray(content)
            flipped[at // 8] ^= 1 << at % 8
            file.write_bytes(flipped)
            with pytest.raises(HyperLlamaError, match="is damaged"):
                verify(folder)
        file.write_bytes(content)
    verify(folder)


def test_the_checkpoint_of_another_model_is_refused_by_key(tmp_path):
    assert save(tmp_path, 1, filled())
    with pytest.raises(HyperLlamaError, match="step-00000001 is of a model with num_layers"):
        loaded(checkpoints(tmp_path)[0], 1, num_layers=1)
