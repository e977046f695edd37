"""Compatibility keys do what the paper's trainer does: schedule offset, micro-batch means, decay, rounded RoPE tables."""

from pathlib import Path

import pytest
import torch

from hyperllama.arena import Arena
from hyperllama.config import ScheduleSettings
from hyperllama.data.loader import Loader, micro_batches
from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.rope import rope_tables
from hyperllama.model import Llama
from hyperllama.train.distributed import Processes, deterministic
from hyperllama.train.groups import parameter_groups
from hyperllama.train.loop import train
from hyperllama.train.plan import make_plan
from hyperllama.train.schedule import lr_ratio
from tests.reference import random_model, shape
from tests.study import run_config
from tests.train.test_loop import metrics

CPU = torch.device("cpu")


def test_the_schedules_offset_shifts_it_by_a_step():
    """Their Faroese run: 144 steps, 10 warm-up, decay from 114 over 30. Step n uses f(n - 1)."""
    paper, plain = (ScheduleSettings(warmup_steps=10, decay_fraction=30 / 144, offset=offset) for offset in (1, 0))
    f = [t / 10 if t <= 10 else 1.0 if t <= 114 else (30 - (t - 114)) / 30 for t in range(145)]
    assert [lr_ratio(paper, n, 144) for n in range(1, 145)] == pytest.approx(f[:144])
    assert [lr_ratio(plain, n, 144) for n in range(1, 145)] == pytest.approx(f[1:])


def test_the_loss_is_the_mean_of_the_micro_batches_means(study, tmp_path):
    """Of unequal numbers of unmasked targets: not the mean over all targets. Gradients follow the same weights."""
    data = {"sources": [{"path": str(study / "shards" / "eng")}], "seq_len": 32, "mask_document_start": True}
    changes = {"data": data, "micro_batch": 3, "budget": {"windows": 8}, "optimizer": {"lr": 0.01, "clip_norm": None}}
    config = run_config(study, tmp_path / "paper", loss_mean="micro_batch", **changes)
    train(config, quiet=True)
    train(run_config(study, tmp_path / "tokens", **changes), quiet=True)
    plan = make_plan(config)
    model = Llama(plan.model, Arena(plan.model, torch.float32, "cpu", training=True), functional=True)
    model.init_weights(config.seed)
    with Loader(plan.mixture, 8, mask_first_token_of_document=True) as loader:
        batch = loader.batch(0)
    parts = list(micro_batches(batch, 3))
    assert len({int((part.targets >= 0).sum()) / part.targets.numel() for part in parts}) > 1
    means = []
    for part in parts:
        logits = model.logits(model(part.ids)).flatten(0, 1)
        means.append(torch.nn.functional.cross_entropy(logits, part.targets.flatten()))
    loss = torch.stack(means).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    line = metrics(tmp_path / "paper")[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert metrics(tmp_path / "tokens")[0]["loss"] != pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("windows", [1, 5, 24])
def test_micro_batches_are_counted_as_the_loader_shares_windows(study, world, windows):
    plan = make_plan(run_config(study, Path("nowhere")))
    counts = []
    for rank in range(world):
        with Loader(plan.mixture, windows, rank, world) as loader:
            counts.append(len(list(micro_batches(loader.batch(0), 2))))
    assert Processes(0, world, CPU).micro_batches(windows, 2) == counts


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_decay_reaches_norms_too_unless_told_otherwise(decay):
    """Without a gradient a step is decay alone."""
    model = random_model(shape(), torch.float32, training=True)
    arena, before = model.arena, {name: view.clone() for name, view in model.arena.packed("weights").items()}
    groups, one = parameter_groups(arena, decay), torch.tensor(1)
    assert (groups is None) == (decay == "all")
    adamw(
        arena.master, arena.grad, arena.m, arena.v, None, lr=torch.tensor(0.5), beta1=0.9, beta2=0.95, eps=1e-8,
        weight_decay=0.1, step=one, clip=one.float(), groups=groups.of_line if groups else None,
        scales=groups.scales if groups else None,
    )  # fmt: skip
    for name, view in arena.packed("weights").items():
        decayed = decay == "all" or view.dim() == 2
        torch.testing.assert_close(view, before[name] * (0.95 if decayed else 1.0))


def test_rope_tables_are_rounded_where_asked(study, tmp_path):
    ids = torch.zeros(1, 32, dtype=torch.int64)
    config = shape(rope_theta=10000.0)
    arena = Arena(config, torch.float32, "cpu", training=False)
    exact, rounded = (Llama(config, arena, tables=t).positions(ids, None).cos for t in (torch.float32, torch.bfloat16))
    assert torch.equal(exact, rope_tables(32, config.head_dim, 10000.0)[0][:32])
    assert torch.equal(rounded, exact.bfloat16().float()) and not torch.equal(rounded, exact)
    losses = []
    for tables in ("fp32", "bf16"):
        model = {
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 2,
            "initializer_range": 0.5,
        }  # attention that is not flat
        train(run_config(study, tmp_path / tables, rope_tables=tables, model=model, budget={"windows": 8}), quiet=True)
        losses.append(metrics(tmp_path / tables)[0]["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_deterministic_asks_torch_for_it_and_gives_the_setting_back(study, tmp_path):
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    for name in ("one", "two"):
        train(run_config(study, tmp_path / name, deterministic=True, budget={"windows": 16}), quiet=True)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


def test_deterministic_holds_where_attention_is_chosen(study, tmp_path, monkeypatch):
    """Otherwise `auto` could choose a backend that a deterministic run may not have."""
    seen = []

    def chosen(plan, mine, *, quiet):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return {"backend": "sdpa"}

    monkeypatch.setattr("hyperllama.train.loop.attention_backend", chosen)
    for wanted in (True, False):
        train(run_config(study, tmp_path / str(wanted), deterministic=wanted, budget={"windows": 8}), quiet=True)
    assert seen == [True, False]


def test_a_stage_ends_as_nanotrons_does_and_its_copies_cost_flops(study, tmp_path):
    """50 windows in steps of 8 over 2 processes with micro-batches of 2: 7 whole steps, the last with windows 48, 49 and copies."""
    data = {"sources": [{"path": str(study / "shards" / "eng")}], "seq_len": 32}
    changes = {"micro_batch": 2, "loss_mean": "micro_batch"}
    tail = {"nanotron_tail": {"processes": 2, "micro_batch": 2}}
    record = train(run_config(study, tmp_path / "tail", data=data | tail, **changes), quiet=True)
    train(run_config(study, tmp_path / "plain", data=data, **changes), quiet=True)
    ended, plain = metrics(tmp_path / "tail"), metrics(tmp_path / "plain")
    assert [line["loss"] for line in ended[:6]] == [line["loss"] for line in plain[:6]]
    assert ended[6]["batch"] == 8 and ended[6]["loss"] != plain[6]["loss"]
    assert record["ledger"]["spent"] == 56 * record["plan"]["flops_per_window_dense"]
    assert record["card"]["token_counts"] == {"eng": 56 * 32}
    with Loader(make_plan(run_config(study, tmp_path / "x", data=data | tail, **changes)).mixture, 8) as loader:
        rows = loader.batch(48).ids
        first, last = (loader.batch(48).ids[i] for i in (0, 1))
    # process 0 takes the two windows that are left, process 1 the second of them and a copy; all else are copies
    assert (
        torch.equal(rows[0], first) and all(torch.equal(row, last) for row in rows[1:]) and not torch.equal(first, last)
    )


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"data": {"processes": 3, "micro_batch": 2}}, "not a multiple of its processes times its micro_batch"),
        ({"data": {"processes": 2, "micro_batch": 2}, "budget": {"steps": 3}}, "give budget.windows or budget.tokens"),
    ],
)
def test_a_tail_that_fits_no_stage_is_refused(study, tmp_path, changes, sentence):
    data = {"sources": [{"path": str(study / "shards" / "eng")}], "seq_len": 32, "nanotron_tail": changes["data"]}
    with pytest.raises(HyperLlamaError, match=sentence):
        run_config(study, tmp_path / "run", **(changes | {"data": data}))
