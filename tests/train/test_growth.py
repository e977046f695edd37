"""A run that grows: the grown model moves as the small one would, in place, to the last FLOP, and resumes to the same bits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperllama.arena import Arena, layout
from hyperllama.errors import HyperLlamaError
from hyperllama.flops import window_flops
from hyperllama.grow.operators import Deepen, HyperClone
from hyperllama.grow.tensors import grow_arena
from hyperllama.hub import open_folder
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.model import Llama
from hyperllama.train.groups import parameter_groups
from hyperllama.train.loop import train
from hyperllama.train.plan import make_plan
from tests.reference import logits, random_ids, random_model, shape
from tests.study import run_config
from tests.train.test_loop import metrics, same_bits

CONFIGS = {"tied": shape(), "untied": shape(tie_embeddings=False), "odd": shape(vocab_size=83, intermediate_size=13)}
ROLES = ("weights", "master", "m", "v")


def optimizer_step(model: Llama, ids: torch.Tensor, step: int, clip_norm: float | None, groups=None) -> None:
    """A step as the loop takes it, through the ops."""
    arena = model.arena
    arena.grad.zero_()
    model.loss(ids[:, :-1], ids[:, 1:], loss_weight=1 / ids[:, 1:].numel()).backward()
    norm = grad_norm(arena.grad, *((groups.of_line, groups.norm_weights) if groups else ()))
    clip = torch.clamp(clip_norm / (norm + 1e-6), max=1.0) if clip_norm else torch.ones_like(norm)
    adamw(
        arena.master, arena.grad, arena.m, arena.v, None, lr=torch.tensor(0.01, dtype=norm.dtype), beta1=0.9, beta2=0.95,
        eps=1e-6, weight_decay=0.1, step=torch.tensor(step), clip=clip,
        groups=groups.of_line if groups else None, scales=groups.scales if groups else None,
    )  # fmt: skip


def trained(config, dtype=torch.float64, steps=3) -> Llama:
    model = random_model(config, dtype, training=True)
    model.arena.master_from_weights()
    for step in range(1, steps + 1):
        optimizer_step(model, random_ids(config, 2, 14, seed=step), step, None)
    return model


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("factors", [(2, None), (3, None), (2, 3), (3, 1)])
@pytest.mark.parametrize("config", [CONFIGS["tied"], CONFIGS["untied"]], ids=["tied", "untied"])
def test_five_adamw_steps_are_the_small_models(config, factors, clip_norm):
    """Through the ops and groups of the loop, in fp64. Clipping, when on, acts in every step and decides as for the small model."""
    small, operator = trained(config), HyperClone(*factors)
    shape_after = operator.grown(config)
    large = Llama(shape_after, Arena(shape_after, torch.float64, "cpu", training=True))
    grow_arena(small.arena, large.arena, operator)
    groups = parameter_groups(large.arena, "all", (operator, config))
    ids = random_ids(config, 2, 13)
    before = logits(small, ids)
    for step in range(4, 9):
        batch = random_ids(config, 2, 14, seed=step)
        optimizer_step(small, batch, step, clip_norm)
        optimizer_step(large, batch, step, clip_norm, groups)
        norms = grad_norm(small.arena.grad), grad_norm(large.arena.grad, groups.of_line, groups.norm_weights)
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-13, atol=0)
        assert norms[0] > 0.5
        assert (logits(large, ids) - logits(small, ids)).abs().max() <= 2e-14 * logits(small, ids).abs().max()
    assert (before - logits(small, ids)).abs().max() > 1e-2 * before.abs().max()  # the steps went somewhere


@pytest.mark.parametrize("unscaled", ["lr", "eps", "norm"])
def test_each_factor_is_needed(unscaled):
    config, operator = CONFIGS["tied"], HyperClone(2)
    small = trained(config)
    shape_after = operator.grown(config)
    large = Llama(shape_after, Arena(shape_after, torch.float64, "cpu", training=True))
    grow_arena(small.arena, large.arena, operator)
    groups = parameter_groups(large.arena, "all", (operator, config))
    if unscaled == "norm":
        groups.norm_weights.fill_(1)
    else:
        groups.scales[:, {"lr": 0, "eps": 1}[unscaled]] = 1
    batch, ids = random_ids(config, 2, 14, seed=4), random_ids(config, 2, 13)
    optimizer_step(small, batch, 4, 0.5)
    optimizer_step(large, batch, 4, 0.5, groups)
    assert (logits(large, ids) - logits(small, ids)).abs().max() > 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [(2, None), (3, 1), (2, 3)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_growing_in_place_is_growing_elsewhere(config, factors, dtype):
    operator = HyperClone(*factors, noise_db=10.0)
    after = operator.grown(config)
    whole, apart = (Arena(after, dtype, "cpu", training=True) for _ in range(2))
    small = whole.tail(config)
    assert small.master.data_ptr() == whole.master[-small.size :].data_ptr() and small.size == layout(config)[1]
    for role in ROLES:
        for view in small.packed(role).values():
            view.copy_(torch.rand(view.shape))
    copies = Arena(config, dtype, "cpu", training=True)
    for role in ROLES:
        getattr(copies, role).copy_(getattr(small, role))
    grow_arena(copies, apart, operator)
    grow_arena(small, whole, operator)
    for role in ROLES:
        assert torch.equal(getattr(apart, role), getattr(whole, role))  # the padding between tensors too


def test_a_growth_that_would_meet_its_own_sources_is_refused():
    operator, config = Deepen("stack"), CONFIGS["tied"]
    whole = Arena(operator.grown(config), torch.float32, "cpu", training=True)
    with pytest.raises(HyperLlamaError, match="in place"):
        grow_arena(whole.tail(config), whole, operator)


PEAK = """
import re, sys, torch
from hyperllama.arena import Arena
from hyperllama.grow.operators import HyperClone
from hyperllama.grow.tensors import grow_arena
from hyperllama.memory import keep_freed_blocks
from hyperllama.train.distributed import Processes
from hyperllama.train.parallel import grow_slices
from tests.reference import shape

def memory(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def grow(small, large, operator):
    if large.whole:
        grow_arena(small, large, operator)
    else:  # of two processes one, whose other says nothing
        grow_slices(small, large, operator, Processes(0, 1, torch.device("cpu")))

torch.set_num_threads(1)
slices = {"training": True, "world": int(sys.argv[1])}
tiny, clone = shape(), HyperClone(2)
arenas = [Arena(c, torch.bfloat16, "cpu", **slices) for c in (tiny, clone.grown(tiny))]
grow(*arenas, clone)  # loads what it needs
config = shape(vocab_size=20000, hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=4, head_dim=64)
operator = HyperClone(2, noise_db=10.0)
whole = Arena(operator.grown(config), torch.bfloat16, "cpu", **slices)
small = whole.tail(config)
for arena in (whole, small):
    for buffer in (arena.weights, arena.master, arena.grad, arena.m, arena.v):
        buffer.fill_(1)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
grow(small, whole, operator)
largest = max(4 * view.numel() for view in whole.packed("grad").values())
print(memory("VmHWM") - before, largest, whole.bytes())
"""


@pytest.mark.parametrize("world", [1, 2])
def test_growing_takes_at_most_the_largest_tensor_more_memory(world):
    """By the kernel's count of resident pages, in a process of its own. In slices also what was collected of it, here a half."""
    command = [sys.executable, "-c", PEAK, str(world)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    extra, largest, arena = map(int, done.stdout.split())
    assert extra <= largest * (1 + (world - 1) / 2) + 4_000_000  # what the interpreter takes
    assert largest < arena / 9


def grow(study, steps=3, **changes):
    """Settings that grow the tiny run after `steps` steps."""
    plan = make_plan(run_config(study, Path("nowhere")))
    return {"grow": {"at_flops": 8 * steps * plan.cost, "noise_db": None, **changes}}


@pytest.fixture(scope="module")
def grown(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "grown"
    train(run_config(study, out, checkpoint={"every_steps": 1, "keep": 9}, **grow(study)), quiet=True)
    return out


def test_the_ledger_counts_every_window_at_its_cost(study, grown):
    record = json.loads((grown / "run.json").read_text())
    config = make_plan(run_config(study, grown)).model
    small, large = (window_flops(c, 32) for c in (config, config.grown(2)))
    assert [line["spent_flops"] for line in metrics(grown)] == [
        min(w, 24) * small + max(0, w - 24) * large for w in (8, 16, 24, 32, 40, 48, 50)
    ]
    assert record["ledger"]["spent"] == record["plan"]["budget_flops"] == 24 * small + 26 * large
    assert record["plan"]["parameters"] == config.grown(2).num_parameters
    assert open_folder(grown / "model").card["growth"][0]["method"] == "hyperclone"


def test_a_plain_clone_follows_the_run_that_did_not_grow(study, grown, tmp_path):
    """Carried moments, exact factors, clipping on: the grown run's losses are the small one's to fp32 rounding."""
    train(run_config(study, tmp_path / "small"), quiet=True)
    small, large = metrics(tmp_path / "small"), metrics(grown)
    assert small[:3] == large[:3]
    for one, other in zip(small, large, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("last", [2, 3, 4])
def test_a_run_resumes_across_its_growth_to_the_same_bits(study, grown, tmp_path, last):
    """From a checkpoint before the growth, at it (the small model), and after it."""
    shutil.copytree(grown, tmp_path / "again")
    (tmp_path / "again" / "run.json").unlink()
    shutil.rmtree(tmp_path / "again" / "model")
    for folder in (tmp_path / "again" / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > last:
            shutil.rmtree(folder)
    config = run_config(study, tmp_path / "again", checkpoint={"every_steps": 1, "keep": 9}, **grow(study))
    train(config, quiet=True)  # in a folder that has been moved
    assert same_bits(grown, tmp_path / "again") and metrics(grown) == metrics(tmp_path / "again")


def test_fresh_moments_and_plain_rates_are_choices(study, grown, tmp_path):
    losses = {}
    for name, choice in {
        "fresh": {"optimizer": "fresh"},
        "plain": {"lr_factors": "none"},
        "warm": {"optimizer": "fresh", "warmup_steps": 4},
    }.items():
        train(run_config(study, tmp_path / name, **grow(study, **choice)), quiet=True)
        lines = metrics(tmp_path / name)
        assert lines[:3] == metrics(grown)[:3]
        assert lines[3]["loss"] == pytest.approx(metrics(grown)[3]["loss"], rel=1e-5)  # the function is kept
        assert lines[-1]["loss"] != metrics(grown)[-1]["loss"]
        losses[name] = [line["lr"] for line in lines]
    assert losses["fresh"][3:] == [
        4 * losses["warm"][3],
        2 * losses["warm"][4],
        losses["warm"][5] / 0.75,
        losses["warm"][6],
    ]


def test_milestones_and_budgets_are_exact_on_both_sides(study, tmp_path):
    plan = make_plan(run_config(study, tmp_path / "x", **grow(study)))
    small, large = plan.cost, plan.growth.cost
    at = [8 * small, 24 * small, 24 * small + 8 * large]
    settings = grow(study) | {"budget": {"flops": 24 * small + 17 * large}, "checkpoint": {"milestones": at}}
    record = train(run_config(study, tmp_path / "m", **settings), quiet=True)
    assert record["ledger"]["spent"] == 24 * small + 17 * large
    sizes = [open_folder(tmp_path / "m" / "milestones" / str(flops)).config["hidden_size"] for flops in at]
    assert sizes == [32, 32, 64]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (lambda small, large: {"grow": {"at_flops": 8 * small + 1}}, "nearest that are: {8s} and {9s}"),
        (lambda small, large: {"grow": {"at_flops": 9 * small}}, "nearest that are: {8s} and {16s}"),
        (lambda small, large: {"grow": {"at_flops": 56 * small}}, "choose at most {48s}"),
        (
            lambda small, large: {"budget": {"flops": 24 * small + 2 * large + 1}},
            "nearest that are: {24s2l} and {24s3l}",
        ),
        (lambda small, large: {"grow": {"at_flops": 24 * small, "noise_db": 1.0}}, "grow.noise_db: noise of 1.0 dB"),
        (
            lambda small, large: {"checkpoint": {"milestones": [24 * small + large]}},
            "nearest that are: {24s} and {24s8l}",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_values(study, tmp_path, changes, sentence):
    plan = make_plan(run_config(study, tmp_path / "x", **grow(study)))
    s, large = plan.cost, plan.growth.cost
    names = {"8s": 8 * s, "9s": 9 * s, "16s": 16 * s, "24s": 24 * s, "48s": 48 * s}
    names |= {"24s2l": 24 * s + 2 * large, "24s3l": 24 * s + 3 * large, "24s8l": 24 * s + 8 * large}
    for name, value in names.items():
        sentence = sentence.replace("{" + name + "}", str(value))
    with pytest.raises(HyperLlamaError) as error:
        train(run_config(study, tmp_path / "run", **grow(study) | changes(s, large)), quiet=True)
    assert sentence in str(error.value) and not (tmp_path / "run").exists()


def test_copies_that_stay_equal_are_measured_and_warned_of(study, grown, tmp_path):
    def events(out: Path) -> list[str]:
        return [json.loads(line)["event"] for line in (out / "events.jsonl").open()]

    assert [line.get("asymmetry") for line in metrics(grown)] == [None, None, None, 0.0, None, 0.0, None]
    assert "symmetric" in events(grown)
    train(run_config(study, tmp_path / "noisy", **grow(study, noise_db=10.0)), quiet=True)
    assert "symmetric" not in events(tmp_path / "noisy")
    assert (
        0.03 < metrics(tmp_path / "noisy")[3]["asymmetry"] < 0.1
    )  # rows: half the noise's share of 0.1/1.1, and one step
    child = {"model": None, "init_from": str(grown / "model"), "budget": {"windows": 8}}
    train(run_config(study, tmp_path / "child", **child), quiet=True)
    assert "symmetric" in events(tmp_path / "child")
