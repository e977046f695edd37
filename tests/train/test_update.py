"""The update decides on the device; recorded as a graph it has the bits of plain ones, in whole runs that grow too."""

from dataclasses import replace

import pytest
import torch

from bench.fake_gpu import fake_gpu
from hyperllama.arena import Arena
from hyperllama.config import OptimizerSettings
from hyperllama.kernels.backend import GPUS
from hyperllama.train import micro, state
from hyperllama.train.distributed import Processes
from hyperllama.train.graphs import WARM_UP, seconds_of
from hyperllama.train.groups import parameter_groups
from hyperllama.train.loop import train
from hyperllama.train.metrics import Events
from hyperllama.train.micro import Graphed, MicroStep
from hyperllama.train.plan import make_plan
from hyperllama.train.state import State
from hyperllama.train.update import GraphedUpdate, Update
from tests.reference import shape
from tests.study import run_config
from tests.train.test_loop import metrics, same_bits

ONE = Processes(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize(
    "dtype, masters", [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "bf16")]
)
def test_replayed_updates_have_the_bits_of_plain_ones(records, dtype, masters, decay):
    """At every step's own rate, loss and gradient; those that are not finite are skipped by both."""
    settings = OptimizerSettings(masters=masters, decay=decay, clip_norm=1.0, weight_decay=0.1)
    arenas, steps, counts = [], [], []
    for kind in (Update, GraphedUpdate):
        arena = Arena(shape(), dtype, "cpu", training=True, masters=masters == "fp32")
        counts.append(torch.zeros((), dtype=torch.int64))
        rounding = 7 if masters == "bf16" else None
        steps.append(kind(arena, parameter_groups(arena, decay), settings, counts[-1], ONE, rounding))
        arenas.append(arena)
        arena.master.copy_(torch.randn(arena.size, generator=torch.Generator().manual_seed(1)))
    for step in range(1, WARM_UP + 6):
        grad = torch.randn(arenas[0].size, generator=torch.Generator().manual_seed(step))
        loss = torch.tensor(float("nan") if step == WARM_UP + 3 else 2.0)
        norms = []
        for arena, one in zip(arenas, steps, strict=True):
            arena.grad.copy_(grad)
            norms.append(one(loss, 0.01 / step))
        assert torch.equal(*norms)
    for role in ("weights", "master", "m", "v"):
        assert torch.equal(*(getattr(arena, role) for arena in arenas))
    assert len(records) == 1 and [int(count) for count in counts] == [WARM_UP + 4] * 2


def test_slices_whose_norm_other_processes_share_are_not_recorded(records, monkeypatch):
    arena = Arena(shape(), torch.float32, "cpu", training=True, rank=0, world=2)
    monkeypatch.setattr(Processes, "sum_", lambda self, tensor: tensor)
    step = GraphedUpdate(arena, None, OptimizerSettings(), torch.zeros((), dtype=torch.int64), ONE, None)
    for _ in range(WARM_UP + 2):
        step(torch.tensor(2.0), 0.1)
    assert not records


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_update_never_waits_for_the_gpu(dtype):
    """Nothing of it reads a value of the device or copies one to the host: it would raise here. So it can be captured."""
    device = torch.device("cuda", 0)
    with fake_gpu(GPUS["sm_90"]) as trace:
        arena = Arena(shape(), dtype, device, training=True)
        groups = parameter_groups(arena, "matrices")
        count = torch.zeros((), dtype=torch.int64, device=device)
        step = Update(arena, groups, OptimizerSettings(), count, Processes(0, 1, device), None)
        step(torch.zeros((), device=device), 0.1)
    assert [launch.name for launch in trace.launches] == [
        "grad_norm._partial_kernel", "grad_norm._finish_kernel", "adamw._adamw_kernel",
    ]  # fmt: skip


def recorded_run(monkeypatch):
    """Every run records, whatever its device."""
    choose = State.choose_graphs

    def recording(self, say):
        self.plan = replace(self.plan, config=self.plan.config.model_copy(update={"cuda_graphs": True}))
        choose(self, say)

    monkeypatch.setattr(State, "choose_graphs", recording)


def test_a_run_that_is_replayed_and_grows_has_the_bits_of_a_plain_one(study, tmp_path, records, monkeypatch):
    """After growth, micro-batch and update are recorded anew: the model is another."""
    plan = make_plan(run_config(study, tmp_path / "plain", budget={"windows": 80}))
    batch = plan.config.global_batch
    grow = {"at_flops": 80 // batch // 2 * batch * plan.cost, "noise_db": 10.0}
    config = run_config(study, tmp_path / "plain", budget={"windows": 80}, grow=grow)
    train(config, quiet=True)
    recorded_run(monkeypatch)
    train(config.model_copy(update={"out": str(tmp_path / "replayed")}), quiet=True)
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "replayed")
    assert same_bits(tmp_path / "plain", tmp_path / "replayed")
    assert len(records) == 4


class Told(Events):
    def __init__(self):
        self.lines = []

    def __call__(self, event, sentence, **fields):
        self.lines.append(sentence)

    def note(self, event, **fields):
        pass


@pytest.fixture
def started(study, tmp_path, monkeypatch):
    """A run with cuda_graphs: auto at its start, on a CPU that is said to be a GPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    plan, say = make_plan(run_config(study, tmp_path / "run", cuda_graphs="auto")), Told()
    (tmp_path / "run").mkdir()
    return State.start(plan, ONE, {"backend": "reference"}, say), say


@pytest.mark.parametrize("plain, graph", [(0.02, 0.01), (0.01, 0.02)])
def test_auto_takes_what_is_faster_and_tells_both_times(started, records, monkeypatch, plain, graph):
    run, say = started
    timed = {}

    def seconds(ways, wait):
        for name, work in ways.items():
            work()
            timed[name] = True
        return {"plain": plain, "graph": graph}

    monkeypatch.setattr(state, "seconds_of", seconds)
    before = run.arena.weights.clone()
    found = run._faster_recorded(say)
    assert found == {"recorded": graph < plain, "plain_ms": 1e3 * plain, "graph_ms": 1e3 * graph}
    assert set(timed) == {"plain", "graph"} and len(records) == 1 and torch.equal(before, run.arena.weights)
    assert f"takes {1e3 * plain} ms as it stands and {1e3 * graph} ms as a CUDA graph" in say.lines[-1]
    assert say.lines[-1].endswith(": recorded" if graph < plain else ": not recorded")


def test_auto_goes_on_without_what_can_not_be_recorded(started, monkeypatch):
    def record(work):
        raise RuntimeError("not permitted when stream is capturing\nand a trace")

    run, say = started
    monkeypatch.setattr(micro, "record", record)
    assert run._faster_recorded(say) == {"recorded": False}
    told = "a micro-batch could not be recorded as a CUDA graph and runs as it stands: not permitted when stream is capturing"
    assert say.lines == [told]


def test_auto_records_nothing_on_a_cpu(started):
    run, say = started
    run.choose_graphs(say)
    assert run.graphs == {"recorded": False} and type(run.micro_step) is MicroStep and type(run.update) is Update
    assert not isinstance(run.micro_step, Graphed) and not say.lines


def test_ways_are_timed_in_turns_and_waited_for():
    done, now = [], iter(range(1000))
    ways = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}
    took = seconds_of(ways, lambda: done.append("wait"), rounds=2, calls=3, clock=lambda: float(next(now)))
    assert done == ["wait", *"aaa", "wait", "wait", *"bbb", "wait"] * 2
    assert took == {"a": 1 / 3, "b": 1 / 3}
