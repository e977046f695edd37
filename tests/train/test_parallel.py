"""Two and four processes give the losses of one, in every mode, from the same windows in the same order.

To rounding: sums over processes and micro-batches are in another order. Where a process has one micro-batch a step, two processes
have the same bits with zero1 and fsdp.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hyperllama.arena import ALIGNMENT, Arena, arena_bytes, sharded_bytes
from hyperllama.config import load_run
from hyperllama.errors import HyperLlamaError
from hyperllama.grow.folder import grow_folder
from hyperllama.grow.operators import HyperClone
from hyperllama.train.distributed import Processes
from hyperllama.train.loop import train
from hyperllama.train.parallel import Replicas, exchange
from hyperllama.train.plan import activation_bytes, make_plan
from tests.reference import random_ids, random_model, shape
from tests.study import run_config, settings
from tests.train.test_growth import grow
from tests.train.test_loop import ROOT, cli, metrics, same_bits, write_recipe

RUN_ALL = """
import json, sys
import torch.distributed as dist
from hyperllama.config import load_run
from hyperllama.data.loader import Loader
from hyperllama.train.loop import train
read = Loader.batch
def told(loader, first, count=None):
    batch = read(loader, first, count)
    with open(f"{out}.read-{loader.rank}", "a") as file:
        file.write(json.dumps([first, batch.window_ids.tolist()]) + chr(10))
    return batch
Loader.batch = told
dist.init_process_group("gloo")  # once: train leaves a group that it finds
for recipe in sys.argv[1:]:
    config = load_run(recipe)
    out = config.out
    train(config, quiet=True)
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


def variants(study, clone=None) -> dict[str, dict]:
    """What has to come out the same: plain fp32, bf16 with documents and masked targets, runs that grow or start from a `clone`."""
    data = {"sources": [{"path": str(study / "shards" / "eng")}], "seq_len": 32, "documents": "separate"}
    return {
        "plain": {"checkpoint": {"every_steps": 3}},
        "bf16": {"precision": "bf16", "data": data | {"mask_document_start": True}},
        "bf16 masters": {"precision": "bf16", "optimizer": {"lr": 0.01, "masters": "bf16"}},
        "several micro-batches": {
            "micro_batch": 1,
            "global_batch": 7,
            "activation_checkpointing": True,
            "evaluate": {"every": 4, "text": [str(study / "corpus" / "text" / "eng" / "dev.jsonl")]},
        },
        "cloned": {"model": None, "init_from": str(clone)},
        "grown": grow(study, noise_db=10.0) | {"precision": "bf16"},
        "grown fp32": grow(study),
    }


@pytest.fixture(scope="module")
def clone(study, tmp_path_factory):
    """A model folder that was cloned, with noise."""
    folder = tmp_path_factory.mktemp("clone")
    train(run_config(study, folder / "run", budget={"windows": 8}), quiet=True)
    grow_folder(folder / "run" / "model", folder / "clone", [HyperClone(2, seed=1, noise_db=10.0)])
    return folder / "clone"


@pytest.fixture(scope="module")
def alone(study, clone, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    for name, changes in variants(study, clone).items():
        train(run_config(study, out / name, **changes), quiet=True)
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_every_mode_gives_the_losses_of_one_process(study, clone, alone, tmp_path, world):
    cases = {
        (mode, name): settings(study, tmp_path / f"{mode} {name}", parallel=mode, **changes)
        for mode in ("ddp", "zero1", "fsdp")
        for name, changes in variants(study, clone).items()
        if (world == 2 or name in ("plain", "grown", "several micro-batches"))
        and not (mode == "fsdp" and "grow" in changes)
    }
    run_all(tmp_path, {f"{mode} {name}": values for (mode, name), values in cases.items()}, world)
    for mode, name in cases:
        one, several = metrics(alone / name), metrics(tmp_path / f"{mode} {name}")
        tolerance = 1e-5 if "precision" not in variants(study)[name] else 2e-3
        tolerance *= 10 if name == "bf16 masters" else 1  # slices draw their own noise
        for a, b in zip(one, several, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=50 * tolerance)
            assert a.keys() == b.keys()
            for key in {"asymmetry", "bits_per_byte"} & a.keys():  # of the clone, of the run that is measured
                assert b[key] == pytest.approx(a[key], rel=1e-3)
            assert [a[key] for key in ("step", "lr", "windows", "spent_flops")] == [
                b[key] for key in ("step", "lr", "windows", "spent_flops")
            ]
        record = json.loads((tmp_path / f"{mode} {name}" / "run.json").read_text())
        assert record["processes"] == world
        assert record["ledger"] == json.loads((alone / name / "run.json").read_text())["ledger"]
        assert read_order(tmp_path / f"{mode} {name}", world) == read_order(tmp_path / f"ddp {name}", world)
        if (
            world == 2 and mode == "fsdp" and name in ("plain", "bf16", "bf16 masters")
        ):  # ddp has the gradients' bits, not its norm's
            assert several == metrics(tmp_path / f"zero1 {name}")
            assert same_bits(tmp_path / f"{mode} {name}", tmp_path / f"zero1 {name}")
    assert read_order(tmp_path / "fsdp plain", world) == list(range(50))


def read_order(out: Path, world: int) -> list[int]:
    """The windows that the processes of a run read, step by step, in the order of the ranks."""
    files = [Path(f"{out}.read-{rank}") for rank in range(world)]
    parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [window for step in zip(*parts, strict=True) for _, ids in step for window in ids]


def test_a_run_goes_on_in_another_mode_from_a_sharded_checkpoint(study, alone, tmp_path):
    """fsdp on three processes to step 6, then one process to the end."""
    values = settings(study, tmp_path / "run", parallel="fsdp", **variants(study)["plain"])
    run_all(tmp_path, {"run": values}, 3)
    (tmp_path / "run" / "run.json").unlink()
    train(run_config(study, tmp_path / "run", **variants(study)["plain"]), quiet=True)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").open()]
    assert [(event["event"], event["processes"]) for event in events] == [("started", 3), ("resumed", 1)]
    for a, b in zip(metrics(alone / "plain"), metrics(tmp_path / "run"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.parametrize("documents", ["across", "separate"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_layers_have_the_same_bits(study, tmp_path, documents, precision):
    data = {"sources": [{"path": str(study / "shards" / "eng")}], "seq_len": 32, "documents": documents}
    for name, recompute in (("kept", False), ("recomputed", True)):
        changes = {"data": data, "precision": precision, "budget": {"windows": 24}}
        train(run_config(study, tmp_path / name, activation_checkpointing=recompute, **changes), quiet=True)
    assert metrics(tmp_path / "kept") == metrics(tmp_path / "recomputed")
    assert same_bits(tmp_path / "kept", tmp_path / "recomputed")


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_keep_for_the_backward_what_the_dry_run_foretells(recompute):
    """By what autograd is asked to keep for four layers more, and the sums of rows of norms and attention, 4 bytes each."""

    def kept(layers):
        model = random_model(shape(num_layers=layers), torch.float32, training=True, recompute=recompute)
        ids, sizes = random_ids(model.config, 2, 17), {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() != model.arena.weights.untyped_storage().data_ptr():
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(ids[:, :-1], ids[:, 1:], loss_weight=1.0)
        loss.backward()
        return sum(sizes.values())

    expected = [activation_bytes(shape(num_layers=n), torch.float32, 32, recompute=recompute) for n in (2, 6)]
    rows = 0 if recompute else 4 * 32 * (2 + 4) * 4  # of four layers: two norms, four heads
    assert kept(6) - kept(2) == expected[1] - expected[0] + rows


def test_a_sharded_process_holds_its_slice_both_ends_and_two_layers():
    """Bytes of all storages, at their most while a step goes by: what the dry run foretells."""
    config = shape(num_layers=24, hidden_size=64, vocab_size=128)
    arena = Arena(config, torch.bfloat16, "cpu", training=True, rank=0, world=4, sharded=True)
    shards, held = exchange(arena, Processes(0, 1, torch.device("cpu"))), []

    def alone(unit):
        unit.take("weights")
        return []

    shards._gathered, shards._summed = alone, lambda unit: []

    def note():
        own = sum(b.numel() * b.itemsize for b in (arena.weights, arena.grad, arena.master, arena.m, arena.v))
        units = [x for unit in arena.units for x in (unit.weights, unit.grad)]
        held.append(own + sum(x.untyped_storage().nbytes() for x in units))

    note()
    for layer in range(-1, config.num_layers + 1):
        shards.forward_reaches(layer)
        note()
    for layer in reversed(range(config.num_layers + 1)):
        shards.backward_left(layer)
        note()
    shards.finish()
    note()
    assert max(held) <= sharded_bytes(config, torch.bfloat16, 4) <= 1.05 * max(held)
    assert held[0] == held[-1] and max(held) < 0.6 * arena_bytes(arena.size, torch.bfloat16, training=True, world=4)


def test_growth_inside_a_sharded_run_is_refused_with_the_way_out(study, tmp_path):
    with pytest.raises(HyperLlamaError, match=r"`hyperllama grow`"):
        run_config(study, tmp_path / "run", parallel="fsdp", **grow(study))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_slices_cover_the_arena_on_whole_lines(world):
    config = shape()
    arenas = [Arena(config, torch.bfloat16, "cpu", training=True, rank=r, world=world) for r in range(world)]
    spans = [arena.span for arena in arenas]
    assert spans[0].start == 0 and spans[-1].stop == arenas[0].size
    assert all(a.stop == b.start and a.stop % ALIGNMENT == 0 for a, b in itertools.pairwise(spans))
    assert all(len(a.master) == len(a.m) == len(a.v) == a.size // world for a in arenas)
    assert sum(a.bytes() for a in arenas) == arenas[0].size * (world * (2 + 4) + 12)


class Told(Replicas):
    """Notes which gradients are sent, and what they are at that moment."""

    def _start(self, begin: int, end: int) -> None:
        self.sent.append((begin, end, self.arena.grad[begin:end].clone()))


@pytest.mark.parametrize("tie", [True, False])
def test_a_layers_gradients_are_complete_when_its_sum_starts(tie):
    """Layer by layer from the last, the embedding at the end, each piece once and with its final values."""
    model = random_model(shape(num_layers=3, tie_embeddings=tie), torch.float32, training=True)
    told = Told(model.arena, Processes(0, 1, torch.device("cpu")))
    told.sent, told.last = [], True
    model.exchange = told
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
