"""The loop spends its budget exactly, resumes to the same bits, and trains as an independent implementation does."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hyperllama import checkpoint
from hyperllama.checkpoint import export_checkpoint
from hyperllama.companions import ADAM_V, CompanionFile
from hyperllama.data.loader import Loader
from hyperllama.errors import HyperLlamaError, Stopped
from hyperllama.flops import window_flops
from hyperllama.hub import model_config, open_folder
from hyperllama.train import loop, plan
from hyperllama.train.loop import _StopRequest, train
from hyperllama.train.plan import counted_tokens, make_plan
from hyperllama.train.schedule import lr_ratio
from tests.study import SEQ_LEN, run_config, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(study, tmp_path_factory):
    """The run that resumed and distributed ones are compared with."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(run_config(study, out, checkpoint={"every_steps": 2}), quiet=True)
    return out


def metrics(out: Path) -> list[dict]:
    """metrics.jsonl without its clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in (out / "metrics.jsonl").open()]


def same_bits(a: Path, b: Path) -> bool:
    return (a / "model" / "model.safetensors").read_bytes() == (b / "model" / "model.safetensors").read_bytes()


def cli(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment,
    )


def write_recipe(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def test_bf16_masters_are_the_weights_rounded_stochastically_and_resume_to_the_same_bits(study, tmp_path, monkeypatch):
    """Updates of a fraction of bf16's step; on average the weights go where masters in fp32 would take them."""
    changes = {"precision": "bf16", "checkpoint": {"every_steps": 2}}
    slow = {"lr": 1e-5, "masters": "bf16"}
    whole, cut = (run_config(study, tmp_path / name, optimizer=slow, **changes) for name in ("whole", "cut"))
    train(whole, quiet=True)

    def stop(self, *arguments, real=Loader.batch):
        if arguments[0] >= 32:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loader, "batch", stop)
        train(cut, quiet=True)
    train(cut, quiet=True)
    assert same_bits(tmp_path / "whole", tmp_path / "cut") and metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    masters = run_config(study, tmp_path / "masters", optimizer={"lr": 1e-5}, **changes)
    train(masters, quiet=True)
    rounded, nearest = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "masters"))
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert (rounded[gate] != nearest[gate]).float().mean() > 0.02
    assert float((rounded[gate].float() - nearest[gate].float()).mean().abs()) < 1e-5
    plans = [make_plan(config).describe()["memory_bytes"]["arena"] for config in (whole, masters)]
    weights = load_file(tmp_path / "whole" / "model" / "model.safetensors").values()
    assert plans[1] - plans[0] >= 4 * sum(tensor.numel() for tensor in weights)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"precision": "fp32"}, "optimizer.masters: bf16 is for precision: bf16"),
        ({"precision": "bf16", "grow": {"at_flops": 1}}, "grow needs optimizer.masters: fp32"),
    ],
)
def test_bf16_masters_are_refused_where_they_make_no_sense(changes, sentence, study, tmp_path):
    with pytest.raises(HyperLlamaError, match=sentence):
        run_config(study, tmp_path, optimizer={"masters": "bf16"}, **changes)


def test_the_ledger_ends_at_the_budget_and_the_last_batch_is_partial(study, undisturbed):
    record = json.loads((undisturbed / "run.json").read_text())
    folder = open_folder(undisturbed / "model")
    cost = window_flops(model_config(folder.config, folder.path), SEQ_LEN)
    lines = metrics(undisturbed)
    assert record["ledger"]["spent"] == 50 * cost == lines[-1]["spent_flops"]
    assert [line["windows"] for line in lines] == [8, 16, 24, 32, 40, 48, 50]
    assert folder.card["token_counts"] == {"eng": 50 * SEQ_LEN}
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_folder_says_what_made_it_and_how_it_went(study, undisturbed):
    told = json.loads((undisturbed / "environment.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told["code"]["commit"] == commit.stdout.strip() and told["versions"]["torch"] == torch.__version__
    manifest = open_folder(undisturbed / "model").card["made_from"]
    assert told["data"] == manifest and (undisturbed / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_recipe_gives_the_same_bits(study, undisturbed, tmp_path):
    train(run_config(study, tmp_path / "again", checkpoint={"every_steps": 2}), quiet=True)
    assert same_bits(undisturbed, tmp_path / "again") and metrics(undisturbed) == metrics(tmp_path / "again")


def test_a_killed_run_resumes_to_the_same_bits(study, undisturbed, tmp_path):
    """SIGKILL at three random moments, saves included, then run to the end."""
    out = tmp_path / "killed"
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(study, out, checkpoint={"every_steps": 2}, log_every=1))
    moments = random.Random(0)
    for after in (0, 2, 4):
        process = cli("train.py", str(recipe), "--quiet")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "metrics.jsonl").is_file() and len(metrics_if_whole(out)) > after:
                break
            time.sleep(0.005)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.communicate()
    process = cli("train.py", str(recipe), "--quiet")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert same_bits(undisturbed, out) and metrics(undisturbed) == metrics(out)
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def metrics_if_whole(out: Path) -> list[str]:
    return [line for line in (out / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("sent, code", [((signal.SIGINT,), 130), ((signal.SIGTERM, signal.SIGTERM), 143)])
def test_a_signal_saves_and_leaves_with_its_code(study, tmp_path, sent, code):
    """SIGTERM twice: from a cluster, and from torchrun."""
    out = tmp_path / "stopped"
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(study, out, budget={"windows": 4000}, log_every=1))
    process = cli("train.py", str(recipe), "--quiet")
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not metrics_if_whole(out):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    for number in sent:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "the same command goes on from there" in errors and "Traceback" not in errors
    state = json.loads(next((out / "checkpoints").glob("*/state.json")).read_text())
    assert state["step"] == len(metrics(out))


def test_a_signal_waits_for_the_model_that_is_being_written(study, undisturbed, tmp_path, monkeypatch):
    def write(*arguments, real=loop.export_model, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments, **options)

    monkeypatch.setattr(loop, "export_model", write)
    with pytest.raises(Stopped, match="its model is written") as stopped:
        train(run_config(study, tmp_path / "run"), quiet=True)
    assert stopped.value.signal == signal.SIGTERM and (tmp_path / "run" / "run.json").is_file()
    assert same_bits(undisturbed, tmp_path / "run")


def test_a_signal_that_comes_while_processes_ask_each_other_is_kept():
    request = _StopRequest()

    class Asking:
        def largest_int(self, value):
            request._note(signal.SIGINT, None)
            return value

    assert not request.agreed(Asking())
    assert request.signal == signal.SIGINT
    request._note(signal.SIGTERM, None)
    assert request.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        request._note(signal.SIGINT, None)


def test_losses_do_not_depend_on_the_micro_batch(study, undisturbed, tmp_path):
    train(run_config(study, tmp_path / "micro", micro_batch=3), quiet=True)
    for one, other in zip(metrics(undisturbed), metrics(tmp_path / "micro"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_training_follows_transformers_and_torchs_adamw(study, tmp_path):
    """The same start, windows, schedule, clipping and AdamW through independent code: the same losses."""
    config = run_config(study, tmp_path / "ours", optimizer={"lr": 0.01, "clip_norm": 0.5, "weight_decay": 0.1})
    start = tmp_path / "start"
    train(
        run_config(
            study, tmp_path / "first", budget={"windows": 8}, schedule={"warmup_steps": 0}, optimizer={"lr": 1e-9}
        ),
        quiet=True,
    )
    os.rename(tmp_path / "first" / "model", start)
    train(config.model_copy(update={"model": None, "init_from": str(start)}), quiet=True)

    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    plan = make_plan(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    with Loader(plan.mixture, 8) as loader:
        for step, line in enumerate(metrics(tmp_path / "ours"), 1):
            batch = loader.batch((step - 1) * 8, min(8, 50 - (step - 1) * 8))
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(batch.ids).logits.flatten(0, 1), batch.targets.flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.param_groups[0]["lr"] = 0.01 * lr_ratio(config.schedule, step, 7)
            optimizer.step()
            assert line["loss"] == pytest.approx(loss.item(), rel=2e-5)
            assert line["grad_norm"] == pytest.approx(norm.item(), rel=2e-4)


def test_bf16_documents_and_replay_train(study, tmp_path):
    data = {
        "sources": [{"path": str(study / "shards" / "swe")}],
        "seq_len": SEQ_LEN,
        "documents": "separate",
        "replay": {"path": str(study / "shards" / "eng"), "fraction": 0.25},
        "mask_document_start": True,
    }
    record = train(run_config(study, tmp_path / "bf16", precision="bf16", data=data), quiet=True)
    counts = record["card"]["token_counts"]
    assert set(counts) == {"eng", "swe"} and sum(counts.values()) == 50 * SEQ_LEN
    assert {t.dtype for t in load_file(tmp_path / "bf16" / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert record["loss"] < 6.5


def test_arms_match_each_others_flops(study, undisturbed, tmp_path):
    child = {"model": None, "init_from": str(undisturbed / "model")}
    spent = json.loads((undisturbed / "run.json").read_text())["ledger"]["spent"]
    record = train(run_config(study, tmp_path / "child", budget={"match_spent": str(undisturbed)}, **child), quiet=True)
    assert (record["ledger"]["spent"], sum(record["ledger"]["ancestors"].values())) == (spent, spent)
    other = train(
        run_config(study, tmp_path / "other", budget={"match_total": str(tmp_path / "child")}, **child), quiet=True
    )
    assert other["ledger"]["spent"] == spent


def test_milestones_are_models_at_exact_ledger_values(study, undisturbed, tmp_path):
    cost = json.loads((undisturbed / "run.json").read_text())["ledger"]["spent"] // 50
    train(run_config(study, tmp_path / "m", checkpoint={"milestones": [16 * cost]}), quiet=True)
    card = open_folder(tmp_path / "m" / "milestones" / str(16 * cost)).card
    assert card["ledger"]["spent"] == 16 * cost
    with pytest.raises(HyperLlamaError, match="end of a step"):
        make_plan(run_config(study, tmp_path / "x", checkpoint={"milestones": [17 * cost]}))


def test_a_dry_run_writes_nothing(study, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(study, tmp_path / "dry"))
    process = cli("train.py", str(recipe), "--dry-run", "--json")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    plan = json.loads(output)
    assert plan["windows"] == 50 and plan["windows_in_last_step"] == 2
    assert plan["budget_flops"] == 50 * plan["flops_per_window_dense"]
    assert not (tmp_path / "dry").exists()


def test_a_finished_run_is_left_alone_and_another_recipe_refused(study, undisturbed):
    before = (undisturbed / "run.json").stat().st_mtime_ns
    train(run_config(study, undisturbed, checkpoint={"every_steps": 2}), quiet=True)
    assert (undisturbed / "run.json").stat().st_mtime_ns == before
    with pytest.raises(HyperLlamaError, match="another seed"):
        train(run_config(study, undisturbed, seed=8, checkpoint={"every_steps": 2}), quiet=True)


def test_a_run_from_before_a_setting_existed_goes_on(study, undisturbed, tmp_path):
    out = tmp_path / "run"
    train(run_config(study, out, checkpoint={"every_steps": 2}), quiet=True)
    (out / "run.json").unlink()
    stored = yaml.safe_load((out / "config.yaml").read_text())
    for key in ("compile", "cuda_graphs", "log", "evaluate", "activation_checkpointing"):
        del stored[key]
    del stored["data"]["nanotron_tail"], stored["optimizer"]["masters"]
    (out / "config.yaml").write_text(yaml.safe_dump(stored))
    train(run_config(study, out, checkpoint={"every_steps": 2}), quiet=True)
    assert same_bits(undisturbed, out)


def test_a_run_without_what_came_later_has_the_name_that_it_had(study, tmp_path, monkeypatch):
    """What its id is made of names no later setting."""
    texts, real = [], plan.hashlib.sha256

    def noted(data=b""):
        texts.append(data)
        return real(data)

    monkeypatch.setattr(plan.hashlib, "sha256", noted)
    make_plan(run_config(study, tmp_path / "run"))
    (named,) = [text.decode() for text in texts if b'"global_batch"' in text]
    assert not [key for key in ("masters", "cuda_graphs", "nanotron_tail", "stages", "order") if f'"{key}"' in named]


def interrupted(study: Path, out: Path) -> Path:
    """A run with checkpoints that did not finish; returns its newest checkpoint."""
    train(run_config(study, out, checkpoint={"every_steps": 2}), quiet=True)
    (out / "run.json").unlink()
    return sorted((out / "checkpoints").iterdir())[-1]


def test_a_damaged_checkpoint_is_told_and_the_one_before_leads_to_the_same_bits(study, undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    file = next(interrupted(study, out).glob("rank-*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train(run_config(study, out, checkpoint={"every_steps": 2}), quiet=True)
    assert "step-00000006" in capsys.readouterr().err
    events = [json.loads(line) for line in (out / "events.jsonl").open()]
    assert [event["event"] for event in events] == ["started", "damaged", "resumed"]
    assert events[2]["step"] == 4
    assert same_bits(undisturbed, out) and metrics(undisturbed) == metrics(out)


def test_two_processes_go_on_from_the_checkpoint_of_one(study, undisturbed, tmp_path):
    out = tmp_path / "run"
    interrupted(study, out)
    changes = {"checkpoint": {"every_steps": 2}}
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(study, out, **changes))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py", str(recipe))
    process = cli(*launch, OMP_NUM_THREADS="1")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for one, two in zip(metrics(undisturbed), metrics(out), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert (two["windows"], two["spent_flops"]) == (one["windows"], one["spent_flops"])
    resumed = [json.loads(line) for line in (out / "events.jsonl").open()][-1]
    assert (resumed["event"], resumed["step"], resumed["processes"]) == ("resumed", 6, 2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_exported_checkpoint_has_the_bits_of_the_runs_own_export(study, tmp_path, precision):
    cost = 8 * make_plan(run_config(study, tmp_path / "x")).cost
    changes = {"precision": precision, "checkpoint": {"every_steps": 3, "milestones": [6 * cost]}}
    train(run_config(study, tmp_path / "run", export={"adam_v": True}, **changes), quiet=True)
    checkpoint, state = export_checkpoint(tmp_path / "run", tmp_path / "exported", counted_tokens)
    assert (checkpoint.name, state["step"]) == ("step-00000006", 6)
    ours, exported = (tmp_path / "run" / "milestones" / str(6 * cost), tmp_path / "exported")
    files = ["adam_v.safetensors", "config.json", "hyperllama.json", "model.safetensors", "token_counts.safetensors"]
    assert sorted(file.name for file in exported.iterdir()) == [*files, "tokenizer.model"]
    for name in (*files[1:], "tokenizer.model"):
        assert (ours / name).read_bytes() == (exported / name).read_bytes(), name
    a, b = (
        CompanionFile(folder, ADAM_V) for folder in (ours, exported)
    )  # the library writes its metadata in any order
    assert a.metadata == b.metadata and a.metadata["step"] == "6" and a.names == b.names
    a, b = (load_file(folder / ADAM_V) for folder in (ours, exported))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_export_beside_a_run_that_removes_its_checkpoint_takes_the_newest(study, tmp_path, monkeypatch):
    before, seen = interrupted(study, tmp_path / "run"), []
    after = before.with_name("step-00000008")

    def verify(folder, real=checkpoint.verify):
        seen.append(folder)
        if folder == before:
            before.rename(after)  # as retention, once there is a newer one
        return real(folder)

    monkeypatch.setattr(checkpoint, "verify", verify)
    assert export_checkpoint(tmp_path / "run", tmp_path / "exported")[0] == after and seen == [before, after]
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"tokenizer": "none.model"}, "none.model"),
        ({"budget": {"flops": 12345}}, "not a whole number of windows"),
        ({"budget": {"tokens": 100}}, "not a multiple of data.seq_len"),
        (
            {"model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 256}},
            "tokenizer has 512 tokens",
        ),
        ({"model": {"hidden_size": 33, "num_layers": 1, "num_heads": 2}}, "set model.head_dim"),
        (
            {"model": {"hidden_size": 30, "num_layers": 1, "num_heads": 3, "num_kv_heads": 2}},
            "multiple of num_kv_heads",
        ),
        ({"model": None, "init_from": "nowhere"}, "nowhere is not a folder"),
        ({"budget": {"match_total": "nowhere"}}, "run.json does not exist"),
    ],
)
def test_bad_input_is_refused_before_any_work(study, tmp_path, changes, sentence):
    with pytest.raises(HyperLlamaError) as error:
        train(run_config(study, tmp_path / "run", **changes), quiet=True)
    assert sentence in str(error.value) and not (tmp_path / "run").exists()


def test_a_source_that_is_too_small_for_its_epochs_is_refused(study, tmp_path):
    data = {"sources": [{"path": str(study / "shards" / "eng"), "max_epochs": 0.01}], "seq_len": SEQ_LEN}
    with pytest.raises(HyperLlamaError, match="max_epochs"):
        make_plan(run_config(study, tmp_path / "run", data=data))
