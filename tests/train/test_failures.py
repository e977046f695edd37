"""What a cluster does to a run: processes die, stop and are restarted; losses turn into NaN; disks fill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from hyperllama import cli
from hyperllama.data.loader import Loader
from hyperllama.errors import Diverged
from hyperllama.kernels.backend import wrong_index_flag
from hyperllama.train import update
from hyperllama.train.loop import train
from hyperllama.train.update import clip_or_skip
from hyperllama.train.watchdog import Watchdog
from tests.study import run_config, settings

ROOT = Path(__file__).parents[2]
NAN = float("nan")


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=os.environ | one_thread | environment, **pipes)


def recipe(study: Path, out: Path, **changes) -> Path:
    out.with_suffix(".yaml").write_text(yaml.safe_dump(settings(study, out, **changes)))
    return out.with_suffix(".yaml")


def wait_for(path: Path, lines: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)


def lines(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in path.open()]


def test_a_clip_of_zero_stands_for_what_is_not_finite():
    for loss, norm, limit, expected in [
        (2.0, 4.0, 1.0, 1 / (4 + 1e-6)),
        (2.0, 0.5, 1.0, 1.0),
        (2.0, 4.0, None, 1.0),
        (NAN, 4.0, 1.0, 0.0),
        (2.0, NAN, None, 0.0),
        (2.0, float("inf"), 1.0, 0.0),
    ]:
        assert clip_or_skip(torch.tensor(loss), torch.tensor(norm), limit).item() == pytest.approx(expected)


def flag_on_device(monkeypatch):
    """As a GPU's kernel tells: into the device's flag, read when the host next waits."""

    def norm(grad, *groups, real=update.grad_norm):
        wrong_index_flag(grad).fill_(2)
        return real(grad, *groups)

    monkeypatch.setattr(update, "grad_norm", norm)


def ids_in_batch(monkeypatch):
    """As C++ tells: at once."""

    def batch(loader, *arguments, real=Loader.batch):
        found = real(loader, *arguments)
        found.ids[0, 0] = found.targets[0, 0] = 1 << 20
        return found

    monkeypatch.setattr(Loader, "batch", batch)


@pytest.mark.parametrize("tell", [flag_on_device, ids_in_batch])
def test_an_id_outside_the_vocabulary_is_a_sentence_and_exit_code_2(tell, study, tmp_path, monkeypatch, capsys):
    tell(monkeypatch)
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["hyperllama", "train", str(recipe(study, out, checkpoint={"every_steps": 1}))])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if "vocabulary" in line]
    assert stopped.value.code == 2
    for part in (
        "ids 0 to 511",
        f"positions 0 to {32 - 1}",
        "tokenizer.model",
        "eng",
        "hyperllama data inspect",
        "starts again",
    ):
        assert part in sentence
    assert not (out / "model").exists() and not (out / "run.json").exists()
    assert wrong_index_flag(torch.empty(0)).item() == 0


@pytest.fixture
def poison(monkeypatch):
    """Put NaN into the gradients of some steps, counted from here."""
    real = update.grad_norm

    def choose(steps):
        done = []

        def norm(grad):
            done.append(1)
            if len(done) in steps:
                grad[:7] = NAN
            return real(grad)

        monkeypatch.setattr(update, "grad_norm", norm)

    return choose


def test_a_step_that_is_not_finite_is_skipped_and_training_goes_on(study, tmp_path, poison):
    poison({1, 4, 5})
    record = train(run_config(study, tmp_path / "run", max_skipped=3, checkpoint={"every_steps": 4}), quiet=True)
    written = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in written if line.get("skipped")] == [1, 4, 5] and record["skipped_steps"] == 3
    assert written[-1]["loss"] < written[1]["loss"] < 10
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert (state["step"], state["updates"]) == (4, 2), "AdamW counts the steps that it took"


def test_steps_skipped_in_a_row_end_the_run_with_the_weights_before_them(study, tmp_path, poison):
    poison({1, 2, 3, 4, 5, 6, 7})
    changes = {"checkpoint": {"every_steps": 2}, "log_every": 1, "max_skipped": 3}
    with pytest.raises(Diverged, match=r"last 3 updates up to step 3 were skipped.*goes on from .*step-00000002"):
        train(run_config(study, tmp_path / "run", **changes), quiet=True)
    poison(set())
    events = [line["event"] for line in lines(tmp_path / "run" / "events.jsonl")]
    assert events == ["started", "skipped", "skipped", "skipped"]
    train(run_config(study, tmp_path / "run", **changes), quiet=True)
    written = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("skipped", False) for line in written] == [True, True, False, False, False, False, False]


def test_a_run_that_diverges_leaves_with_3(study, tmp_path):
    """A learning rate beyond all reason: the first update makes everything infinite."""
    changes = {"optimizer": {"lr": 1e30}, "schedule": {"warmup_steps": 0}, "log_every": 1, "max_skipped": 2}
    process = start("train.py", str(recipe(study, tmp_path / "run", **changes)), "--quiet")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3 and "Traceback" not in errors
    assert "updates up to step 3 were skipped" in errors.splitlines()[-1]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def pair(study: Path, out: Path, **changes) -> list[subprocess.Popen]:
    """Two processes of one run, without torchrun."""
    file = recipe(study, out, **changes)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start("train.py", str(file), "--quiet", RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]


def test_who_says_that_it_works_is_waited_for_and_who_stops_saying_so_is_named(monkeypatch, capfd):
    codes, told = set(), ""
    monkeypatch.setattr(os, "_exit", codes.add)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with Watchdog(store, 0, 2, 3.0) as saves, Watchdog(store, 1, 2, 3.0) as waits:
        saves.doing(1, "saving")
        waits.doing(1, "saving")
        waits.doing(2, "forward")
        for _ in range(70):
            saves.alive()
            time.sleep(0.1)
        assert not codes
        expected = (
            "hangs: rank 0 (saving of step 1); rank 1 waited in forward of step 2",
            "rank 0 itself hangs; rank 0 waited in saving of step 1",
        )
        deadline = time.monotonic() + 60
        while not all(sentence in told for sentence in expected) and time.monotonic() < deadline:
            told += capfd.readouterr().err
            time.sleep(0.1)
    assert codes == {4} and all(sentence in told for sentence in expected)


LONG = {"budget": {"windows": 400_000}, "log_every": 1, "timeout_seconds": 5}


@pytest.mark.parametrize("how, found", [(signal.SIGSTOP, "silent"), (signal.SIGKILL, "silent")])
def test_a_stopped_or_dead_process_ends_the_run_by_name_and_in_time(study, tmp_path, how, found):
    processes = pair(study, tmp_path / "run", **LONG)
    try:
        wait_for(tmp_path / "run" / "metrics.jsonl", 2, processes[0])
        processes[1].send_signal(how)
        began = time.monotonic()
        _, errors = processes[0].communicate(timeout=60)
        assert time.monotonic() - began < 4 * LONG["timeout_seconds"]
        assert processes[0].returncode == 4 and "Traceback" not in errors
        sentence = errors.splitlines()[-1]
        assert found in sentence and "rank 1 (" in sentence and "of step" in sentence, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


RESTARTED = {
    "checkpoint": {"every_steps": 5}, "budget": {"windows": 240}, "log_every": 1, "timeout_seconds": 15,
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(study, tmp_path_factory):
    """The run of two processes that restarted ones are compared with."""
    out = tmp_path_factory.mktemp("plain") / "run"
    for process in pair(study, out, **RESTARTED):
        assert process.communicate(timeout=300) and process.returncode == 0
    return out


@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_restarts_a_killed_process_and_the_run_ends_in_the_same_bits(study, undisturbed, tmp_path, machines):
    """Two processes of one agent; or one each of two agents, of which only the first one's process tells and writes."""
    file, port = str(recipe(study, tmp_path / "run", **RESTARTED)), free_port()
    where = [
        ("--standalone", "--nproc-per-node=2")
        if machines == 1
        else ("--nnodes=2", f"--node-rank={rank}", f"--master-port={port}", "--master-addr=127.0.0.1")
        for rank in range(machines)
    ]
    agents = [start("-m", "torch.distributed.run", *place, "--max-restarts=2", "train.py", file) for place in where]
    wait_for(tmp_path / "run" / "metrics.jsonl", 7, agents[-1])
    last = agents[-1].pid
    os.kill(int(Path(f"/proc/{last}/task/{last}/children").read_text().split()[-1]), signal.SIGKILL)
    told = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * machines, told
    assert [output.count("loss:") for output, _ in told] == [1, 0][:machines]
    events = lines(tmp_path / "run" / "events.jsonl")
    assert [event["event"] for event in events] == ["started", "resumed"] and events[1]["step"] >= 5
    for name in ("model/model.safetensors", "metrics.jsonl"):
        a, b = (run / name for run in (tmp_path / "run", undisturbed))
        assert a.read_bytes() == b.read_bytes() if name.startswith("model") else lines(a) == lines(b)
