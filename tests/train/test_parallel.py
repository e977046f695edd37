"""Two and four processes give the losses of one, in every mode, from the same windows in the same order."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hyperllama.arena import ALIGNMENT, Arena
from hyperllama.config import load_run
from hyperllama.train.distributed import Processes
from hyperllama.train.loop import train
from hyperllama.train.parallel import GradientSum
from hyperllama.train.plan import make_plan
from tests.reference import random_ids, random_model, shape
from tests.study import run_config, settings
from tests.train.test_growth import grow
from tests.train.test_loop import ROOT, cli, metrics, write_recipe

RUN_ALL = """
import sys
import torch.distributed as dist
from hyperllama.config import load_run
from hyperllama.train.loop import train
dist.init_process_group("gloo")  # once: train leaves a group that it finds
for recipe in sys.argv[1:]:
    train(load_run(recipe), quiet=True)
dist.destroy_process_group()
"""


def run_all(folder: Path, recipes: dict[str, dict], processes: int) -> None:
    """Train every recipe in turn on `processes` processes; runs are in `folder`/name."""
    (folder / "all.py").write_text(RUN_ALL)
    files = [str(write_recipe(folder / f"{name}.yaml", values)) for name, values in recipes.items()]
    options = ["--standalone", f"--nproc-per-node={processes}"]
    process = cli("-m", "torch.distributed.run", *options, str(folder / "all.py"), *files, OMP_NUM_THREADS="1")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def variants(study) -> dict[str, dict]:
    """What has to come out the same: plain fp32, bf16 with documents and masked targets, and a run that grows."""
    data = {"sources": [{"path": str(study / "shards" / "eng")}], "seq_len": 32, "documents": "separate"}
    return {
        "plain": {"checkpoint": {"every_steps": 3}},
        "bf16": {"precision": "bf16", "data": data | {"mask_document_start": True}},
        "grown": grow(study, noise_db=10.0) | {"precision": "bf16"},
        "grown fp32": grow(study),
    }


@pytest.fixture(scope="module")
def alone(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    for name, changes in variants(study).items():
        train(run_config(study, out / name, **changes), quiet=True)
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_every_mode_gives_the_losses_of_one_process(study, alone, tmp_path, world):
    cases = {
        (mode, name): settings(study, tmp_path / f"{mode} {name}", parallel=mode, **changes)
        for mode in ("ddp", "zero1")
        for name, changes in variants(study).items()
        if world == 2 or name in ("plain", "grown")
    }
    run_all(tmp_path, {f"{mode} {name}": values for (mode, name), values in cases.items()}, world)
    for mode, name in cases:
        one, several = metrics(alone / name), metrics(tmp_path / f"{mode} {name}")
        tolerance = 1e-5 if "precision" not in variants(study)[name] else 2e-3
        for a, b in zip(one, several, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=50 * tolerance)
            assert [a[key] for key in ("step", "lr", "windows", "spent_flops")] == [
                b[key] for key in ("step", "lr", "windows", "spent_flops")
            ]
        record = json.loads((tmp_path / f"{mode} {name}" / "run.json").read_text())
        assert record["processes"] == world
        assert record["ledger"] == json.loads((alone / name / "run.json").read_text())["ledger"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_slices_cover_the_arena_on_whole_lines(world):
    config = shape()
    arenas = [Arena(config, torch.bfloat16, "cpu", training=True, rank=r, world=world) for r in range(world)]
    spans = [arena.span for arena in arenas]
    assert spans[0].start == 0 and spans[-1].stop == arenas[0].size
    assert all(a.stop == b.start and a.stop % ALIGNMENT == 0 for a, b in itertools.pairwise(spans))
    assert all(len(a.master) == len(a.m) == len(a.v) == a.size // world for a in arenas)
    assert sum(a.bytes() for a in arenas) == arenas[0].size * (world * (2 + 4) + 12)


class Told(GradientSum):
    """Notes which gradients are sent, and what they are at that moment."""

    def _start(self, begin: int) -> None:
        self.sent.append((begin, self.end, self.arena.grad[begin : self.end].clone()))
        self.end = begin


@pytest.mark.parametrize("tie", [True, False])
def test_a_layers_gradients_are_complete_when_its_sum_starts(tie):
    """Layer by layer from the last, the embedding at the end, each piece once and with its final values."""
    model = random_model(shape(num_layers=3, tie_embeddings=tie), torch.float32, training=True)
    told = Told(model.arena, Processes(0, 1, torch.device("cpu")))
    told.sent = []
    model.backward_left = told.layer_done
    ids = random_ids(model.config, 2, 14)
    model.loss(ids[:, :-1], ids[:, 1:], loss_weight=1.0).backward()
    assert len(told.sent) == 3
    told.finish()
    assert [begin for begin, _, _ in told.sent] == [
        *(model.arena.offsets[f"layers.{layer}.attn_norm"] for layer in (2, 1, 0)), 0
    ]  # fmt: skip
    assert told.sent[0][1] == model.arena.size
    assert all(torch.equal(sent, model.arena.grad[begin:end]) for begin, end, sent in told.sent)
    assert not dist.is_initialized()


@pytest.mark.parametrize("name, parameters", [("1.7B", 1.71e9), ("8B", 8.03e9)])
def test_the_large_recipes_fit_eight_gpus(study, monkeypatch, name, parameters):
    """By the dry run's estimate: state and activations under nine tenths of 80 GB."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = load_run(
        ROOT / "recipes" / f"{name}.yaml",
        [
            f"tokenizer={study / 'tokenizer.model'}",
            f"data.sources=[{{path: {study / 'shards' / 'eng'}}}]",
            f"model.vocab_size={49152 if name == '1.7B' else 128256}",
            "budget.steps=1",
        ],
    )
    plan = make_plan(config).describe()
    assert plan["parameters"] == pytest.approx(parameters, rel=0.01)
    assert sum(plan["memory_bytes"].values()) < 0.9 * 80e9
