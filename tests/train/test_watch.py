"""What looks at a run: evaluation, samples, logs, profile, lock. None of it changes a bit of the model."""

import json
import signal
import sys
from io import StringIO
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.folder import evaluate_folder
from hyperllama.train import watch
from hyperllama.train.loop import train
from hyperllama.train.metrics import PlainProgress
from tests.study import run_config
from tests.train.test_failures import LONG, lines, recipe, start, wait_for
from tests.train.test_loop import same_bits


def texts(study):
    return [str(study / "corpus" / "text" / tag / "dev.jsonl") for tag in ("eng", "swe")]


@pytest.fixture(scope="module")
def watched(study, tmp_path_factory):
    """A run with everything that looks at it; and the same without."""
    out = tmp_path_factory.mktemp("watched")
    train(run_config(study, out / "plain", budget={"steps": 7}), quiet=True)
    changes = {
        "evaluate": {"every": 3, "text": texts(study), "prompts": ["The"], "sample_tokens": 5},
        "checkpoint": {"every_steps": 3, "keep": 1, "keep_best": "bits_per_byte"},
        "profile": {"start": 3, "steps": 2},
    }
    train(run_config(study, out / "watched", budget={"steps": 7}, **changes), quiet=True)
    return out


def test_looking_at_a_run_does_not_change_it(watched):
    assert same_bits(watched / "plain", watched / "watched")
    figures = ("bits_per_byte", "evaluated_bytes")
    seen = [
        {k: v for k, v in line.items() if k not in figures} for line in lines(watched / "watched" / "metrics.jsonl")
    ]
    assert seen == lines(watched / "plain" / "metrics.jsonl")


def test_the_figures_are_those_of_eval_on_the_exported_model(study, watched):
    written = lines(watched / "watched" / "metrics.jsonl")
    assert [line["step"] for line in written if "bits_per_byte" in line] == [3, 6, 7]
    found = evaluate_folder(watched / "watched" / "model", texts(study), [])["texts"]
    n_bytes = sum(text["bytes"] for text in found.values())
    whole = sum(text["bits_per_byte"] * text["bytes"] for text in found.values()) / n_bytes
    assert written[-1]["bits_per_byte"] == pytest.approx(whole, rel=1e-6) and written[-1]["evaluated_bytes"] == n_bytes
    assert json.loads((watched / "watched" / "run.json").read_text())["bits_per_byte"] == written[-1]["bits_per_byte"]


def test_samples_are_kept_with_their_step(watched):
    samples = lines(watched / "watched" / "samples.jsonl")
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(3, "The"), (6, "The"), (7, "The")]
    assert all(isinstance(sample["text"], str) for sample in samples)


def test_samples_of_steps_that_are_done_again_are_forgotten(tmp_path):
    evaluation = watch.Evaluation(None, None, 8, 9, tmp_path)
    evaluation.forget(3)
    written = [
        f'{{"step": {step}, "text": "ä\u2028"}}\n' for step in (3, 6, 9)
    ]  # a sample may hold what ends lines elsewhere
    evaluation.samples.write_text("".join(written) + '{"step": 7, "te', encoding="utf-8")
    evaluation.forget(6)
    assert evaluation.samples.read_text(encoding="utf-8") == "".join(written[:2])


def test_the_best_checkpoint_by_evaluation_stays(study, watched, tmp_path, monkeypatch):
    """The second of four is the best; of the others the newest stays."""
    told = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr(watch, "evaluate_text", lambda *_, **__: {"bits_per_byte": next(told), "bytes": 1})
    settings = {"every": 2, "text": texts(study)[:1]}
    checkpoint = {"every_steps": 2, "keep": 1, "keep_best": "bits_per_byte"}
    budget = {"steps": 9}
    train(run_config(study, tmp_path / "run", evaluate=settings, checkpoint=checkpoint, budget=budget), quiet=True)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"checkpoint": {"keep_best": "bits_per_byte"}}, "only an evaluate section"),
        (
            {
                "checkpoint": {"keep_best": "bits_per_byte", "every_steps": 3},
                "evaluate": {"every": 2, "text": ["a.txt"]},
            },
            "multiple of evaluate.every",
        ),
        (
            {"evaluate": {"every": 2, "text": ["README.md"], "start_token": 512}},
            "evaluate.start_token: 512 is no token",
        ),
        ({"evaluate": {"every": 2, "text": ["nowhere.txt"]}}, "evaluate.text: nowhere.txt does not exist"),
        ({"profile": {"start": 6, "steps": 3}}, "profile: the run has 7 steps"),
        ({"parallel": "fsdp", "evaluate": {"every": 2, "text": ["a"], "prompts": ["b"]}}, "generate from an export"),
    ],
)
def test_what_can_not_be_watched_is_refused_before_any_work(study, tmp_path, changes, sentence):
    with pytest.raises(HyperLlamaError, match=sentence):
        train(run_config(study, tmp_path / "run", **changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_profile_is_a_trace_and_a_table(watched):
    folder = watched / "watched" / "profile"
    trace = json.loads((folder / "trace.json").read_text())
    assert any("addmm" in event.get("name", "") or "mm" in event.get("name", "") for event in trace["traceEvents"])
    table = (folder / "ops.txt").read_text()
    assert table.startswith("steps 3 to 4: ") and "aten::mm" in table


class Writer:
    """Stands in for TensorBoard's, which need not be installed."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars = folder, purge_step, {}

    def add_scalar(self, name, value, step):
        self.scalars.setdefault(name, {})[step] = value

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_and_wandb_get_every_line(study, tmp_path, monkeypatch):
    tensorboard, wandb, made, told = ModuleType("torch.utils.tensorboard"), ModuleType("wandb"), [], []
    tensorboard.SummaryWriter = lambda *options, **named: made.append(Writer(*options, **named)) or made[-1]
    run = SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("finished"))
    wandb.init = lambda **options: told.append(options) or run
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(watch, "find_spec", lambda name: True)
    record = train(run_config(study, tmp_path / "run", log={"tensorboard": True, "wandb": "tiny"}), quiet=True)
    written = lines(tmp_path / "run" / "metrics.jsonl")
    (writer,) = made
    assert writer.purge_step == 1 and writer.folder == str(tmp_path / "run" / "tensorboard")
    for name in ("loss", "grad_norm", "lr", "spent_flops"):
        assert writer.scalars[name] == {line["step"]: line[name] for line in written}
    assert set(writer.scalars["time/tokens_per_second"]) == {2, 4, 6, 7}
    assert told[0]["project"] == "tiny" and told[0]["id"] == record["ledger"]["run"] and told[0]["resume"] == "allow"
    assert [step for step, _ in told[1:-1]] == [line["step"] for line in written]
    assert [values["loss"] for _, values in told[1:-1]] == [line["loss"] for line in written]
    assert told[-1] == "finished" and writer.closed


@pytest.mark.parametrize("log", [{"tensorboard": True}, {"wandb": "project"}])
def test_a_log_that_is_not_installed_is_named_with_its_remedy(study, tmp_path, monkeypatch, log):
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    with pytest.raises(HyperLlamaError, match=rf"log.{next(iter(log))}: .*pip install hyperllama\[log\]"):
        train(run_config(study, tmp_path / "run", log=log), quiet=True)


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(study, tmp_path):
    file = recipe(study, tmp_path / "run", **LONG)
    first = start("train.py", str(file), "--quiet")
    try:
        wait_for(tmp_path / "run" / "metrics.jsonl", 1, first)
        second = start("train.py", str(file), "--quiet")
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 2 and "another process is training in this folder" in errors
        first.send_signal(signal.SIGKILL)
        first.communicate()
        third = start("train.py", str(file), "--quiet")
        wait_for(tmp_path / "run" / "events.jsonl", 2, third)
        third.kill()
        third.communicate()
        assert [event["event"] for event in lines(tmp_path / "run" / "events.jsonl")] == ["started", "started"]
    finally:
        first.kill()
        first.communicate()


def test_a_file_gets_a_line_of_progress_now_and_then(monkeypatch):
    clock, screen = [0.0], Console(file=StringIO(), width=200)
    monkeypatch.setattr("hyperllama.train.metrics.time.perf_counter", lambda: clock[0])
    tell = PlainProgress(screen, "run", 100, disable=False)
    for step in (10, 20, 30, 40):
        clock[0] += 20.0
        tell(step, "loss 1.0")
    assert screen.file.getvalue().splitlines() == [
        "run: step 20 of 100  0:02:40 left  loss 1.0", "run: step 40 of 100  0:02:00 left  loss 1.0"
    ]  # fmt: skip
