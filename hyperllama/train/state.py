"""A run at a moment, in one object: its model over the arena, how far it is, what it cost."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperllama.arena import Arena
from hyperllama.checkpoint import Pieces, load, newest, slices
from hyperllama.flops import Ledger
from hyperllama.grow.symmetry import clone_factors, layer_asymmetry
from hyperllama.grow.tensors import grow_arena
from hyperllama.hub import stored_weights
from hyperllama.keys import key_of
from hyperllama.model import Llama
from hyperllama.names import logical_tensors
from hyperllama.train.distributed import Processes
from hyperllama.train.graphs import WARM_UP, seconds_of
from hyperllama.train.groups import parameter_groups
from hyperllama.train.metrics import Events
from hyperllama.train.micro import Graphed, MicroStep
from hyperllama.train.parallel import Replicas, Shards, exchange, grow_slices
from hyperllama.train.plan import DTYPES, Plan
from hyperllama.train.update import GraphedUpdate, Update


@dataclass
class State:
    """The state of a run.

    `whole` is the arena of the shape that the run ends with, allocated at its start; before growth `arena` is its tail.
    """

    plan: Plan
    mine: Processes
    attention: dict[str, Any]  # see train/attention.py
    whole: Arena
    arena: Arena
    model: Llama
    exchange: Replicas | Shards
    micro_step: MicroStep
    update: Update
    ledger: Ledger
    updates: Tensor  # 0-dim int64 on the device: steps that AdamW's moments have seen, skipped ones left out
    step: int = 0
    windows: int = 0
    token_counts: dict[str, int] = field(default_factory=dict)
    counted: int = 0  # windows in token_counts
    earlier: float = 0.0  # seconds before this process
    began: float = field(default_factory=time.perf_counter)
    graphs: dict[str, Any] = field(default_factory=lambda: {"recorded": False})  # see choose_graphs; for run.json

    @classmethod
    def start(cls, plan: Plan, mine: Processes, attention: dict[str, Any], say: Events) -> "State":
        """From the newest checkpoint of the run's folder, else from a model folder or at random."""
        saved = newest(Path(plan.config.out), mine, say)
        windows = saved[1]["windows"] if saved else 0
        mode, masters = plan.parallel(mine.world), plan.config.optimizer.masters == "fp32"
        rank, world = (mine.rank, mine.world) if mode != "ddp" else (0, 1)
        whole = Arena(
            plan.final_model, plan.dtype, mine.device,
            training=True, rank=rank, world=world, sharded=mode == "fsdp", masters=masters,
        )  # fmt: skip
        arena = whole if plan.growth is None or plan.grown_before(windows) else whole.tail(plan.model)
        updates = torch.zeros((), dtype=torch.int64, device=mine.device)
        run = cls(
            plan, mine, attention, whole, arena, *_model(plan, arena, mine, attention, updates), plan.ledger, updates
        )
        if saved:
            folder, state = saved
            load(folder, state, arena, slices(arena) if arena.whole else run.pieces())
            arena.weights_from_master()
            run.exchange.send()
            run.ledger = Ledger.from_json(state["card"]["ledger"], folder)
            run.step, run.windows, run.counted = state["step"], windows, windows
            run.updates.fill_(state["updates"])
            run.token_counts, run.earlier = state["card"]["token_counts"], state["seconds"]
            say.note("resumed", step=run.step, checkpoint=folder.name, processes=mine.world)
            return run
        if plan.start is not None:
            tensors = {tensor.name: tensor for tensor in logical_tensors(plan.model)}
            for name, values in stored_weights(plan.start, plan.model, {k: t.shape for k, t in tensors.items()}):
                tensor = tensors[name]
                arena.write(arena.offsets[tensor.packed] + tensor.start * (tensor.size // tensor.shape[0]), values)
            arena.master_from_weights()
        else:
            run.model.init_weights(plan.config.seed)
        run.exchange.send()
        say.note("started", processes=mine.world)
        return run

    def pieces(self) -> Pieces:
        """What this process writes of a checkpoint: its slice, or its share of what all processes have."""
        arena = self.arena
        if arena.whole:
            return slices(arena, self.mine.rank, self.mine.world)
        return {arena.span.start: {"master": arena.master, "m": arena.m, "v": arena.v}}

    def grow(self) -> None:
        """Grow into the whole arena, in place."""
        growth, settings = self.plan.growth, self.plan.config.grow
        assert growth is not None and settings is not None
        self.exchange.settle()
        if self.whole.whole:
            grow_arena(self.arena, self.whole, growth.operator)
        else:
            grow_slices(self.arena, self.whole, growth.operator, self.mine)
        if settings.optimizer == "fresh":
            self.whole.m.zero_()
            self.whole.v.zero_()
            self.updates.zero_()
        self.arena = self.whole
        self.model, self.exchange, self.micro_step, self.update = _model(
            self.plan, self.arena, self.mine, self.attention, self.updates
        )

    def choose_graphs(self, say: Events) -> None:
        """Record micro-batches and updates from here on where `cuda_graphs` says so; auto: where a micro-batch takes less time so.

        What is measured are micro-batches of the run's size without meaning: gradients are left undefined, weights as they were.
        The first process's clock decides for all. What can't be recorded is told and left as it stands.
        """
        config = self.plan.config
        if config.cuda_graphs == "auto":
            able = self.mine.device.type == "cuda" and not config.compile and config.never_replayed is None
            self.graphs = self._faster_recorded(say) if able else {"recorded": False}
        else:
            self.graphs = {"recorded": config.cuda_graphs}
        if self.graphs["recorded"]:
            self.micro_step = Graphed(self.model, self.exchange, self.micro_step.z_loss)
            u = self.update
            self.update = GraphedUpdate(u.arena, u.groups, u.settings, u.updates, u.mine, u.rounding)

    def _faster_recorded(self, say: Events) -> dict[str, Any]:
        """Whether replayed micro-batches are faster, and the milliseconds of both."""
        config, device, vocab = self.plan.config, self.mine.device, self.arena.config.vocab_size
        rows = max(1, min(config.micro_batch, config.global_batch // self.mine.world))
        ids = (torch.arange(rows * config.data.seq_len, device=device) % vocab).view(rows, -1)
        graphed = Graphed(self.model, self.exchange, self.micro_step.z_loss)
        self.exchange.settle()
        self.exchange.last = False  # nothing is sent
        ways = {"plain": lambda: self.micro_step(ids, ids, None, 1e-6), "graph": lambda: graphed(ids, ids, None, 1e-6)}
        problem = None
        try:
            for _ in range(WARM_UP + 1):
                ways["graph"]()
        except RuntimeError as error:  # an op of a library that waits for the device, or not enough memory
            problem = str(error).splitlines()[0]
        if self.mine.largest_int(int(problem is not None)):
            why = problem or "another process failed"
            say("cuda_graphs", f"a micro-batch could not be recorded as a CUDA graph and runs as it stands: {why}")
            return {"recorded": False}
        took = seconds_of(ways, lambda: torch.cuda.synchronize(device))
        recorded = bool(self.mine.largest_int(int(took["graph"] < took["plain"]) if self.mine.is_main else 0))
        plain, graph = (round(1e3 * took[name], 3) for name in ("plain", "graph"))
        say(
            "cuda_graphs",
            f"a micro-batch of {rows} windows takes {plain} ms as it stands and {graph} ms as a CUDA graph: "
            f"{'recorded' if recorded else 'not recorded'}",
        )
        return {"recorded": recorded, "plain_ms": plain, "graph_ms": graph}

    def asymmetry(self) -> Tensor | None:
        """How far the copies of a clone have come apart, in the middle layer, on the device; None for a model that is no clone."""
        growth = self._growth()
        factors = clone_factors(growth, self.plan.config.init_from or "the run") if growth else (1, 1)
        if factors[0] == 1:
            return None
        middle = self.arena.config.num_layers // 2
        self.exchange.forward_reaches(middle)
        return layer_asymmetry(self.arena, factors, middle)

    @property
    def seconds(self) -> float:
        """Of work so far, over all processes that went on with the run."""
        return round(self.earlier + time.perf_counter() - self.began, 2)

    def count_tokens(self) -> dict[str, int]:
        """Tokens seen so far, by language."""
        fresh = self.plan.mixture.tokens_by_language(self.counted, self.windows - self.counted)
        languages = sorted({*self.token_counts, *fresh})
        self.token_counts = {tag: self.token_counts.get(tag, 0) + fresh.get(tag, 0) for tag in languages}
        self.counted = self.windows
        return self.token_counts

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint records beside the arena and the step."""
        return {
            "windows": self.windows,
            "updates": int(self.updates),
            "card": self.card(),
            "seconds": self.seconds,
        }

    def card(self) -> dict[str, Any]:
        """What the exported model says of itself."""
        plan = self.plan
        made_from: list[dict[str, Any]] = [
            {"path": str(s.shards.path), "sha256": s.shards.fingerprint} for s in plan.mixture.sources
        ]
        if plan.start is not None:
            made_from.append({"path": str(plan.start.path), "sha256": plan.start_hashes})
        growth = self._growth()
        return {
            "kind": "train",
            "ledger": self.ledger.to_json(),
            "token_counts": self.count_tokens(),
            "made_from": made_from,
            **({"growth": growth} if growth else {}),
            "tokenizer": plan.tokenizer.fingerprint,
            "config": plan.config.model_dump(mode="json"),
        }

    def _growth(self) -> list[dict[str, Any]]:
        """How the model as it is now has been grown, first to last."""
        plan = self.plan
        growth = list(plan.start.card.get("growth", [])) if plan.start is not None else []
        if plan.growth is not None and self.arena.config == plan.growth.model:
            growth.append(plan.growth.operator.describe())
        return growth


def _model(
    plan: Plan, arena: Arena, mine: Processes, attention: dict[str, Any], updates: Tensor
) -> tuple[Llama, Replicas | Shards, MicroStep, Update]:
    """The model over an arena, its exchange with other processes, its micro-step and its update."""
    growth, config = plan.growth, plan.config
    exact = growth is not None and config.grow is not None and config.grow.lr_factors == "exact"
    grown_by = (growth.operator, plan.model) if growth and exact and arena.config == growth.model else None
    groups = parameter_groups(arena, config.optimizer.decay, grown_by)
    chosen = attention["grown"] if growth is not None and arena.config == growth.model else attention
    model = Llama(
        arena.config, arena, backend=chosen["backend"], functional=config.compile, tables=DTYPES[config.rope_tables],
        recompute=config.activation_checkpointing,
    )  # fmt: skip
    between = exchange(arena, mine)
    model.exchange = between if mine.world > 1 and not config.compile else None
    rounding = key_of(config.seed, "rounding", arena.span.start) if config.optimizer.masters == "bf16" else None
    update = Update(arena, groups, config.optimizer, updates, mine, rounding)
    return model, between, MicroStep(model, between, config.optimizer.z_loss, compiled=config.compile), update
