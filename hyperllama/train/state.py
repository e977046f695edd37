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
from hyperllama.model import Llama
from hyperllama.names import logical_tensors
from hyperllama.train.distributed import Processes
from hyperllama.train.groups import Groups, parameter_groups
from hyperllama.train.metrics import Events
from hyperllama.train.micro import Graphed, MicroStep
from hyperllama.train.parallel import Replicas, Shards, exchange, grow_slices
from hyperllama.train.plan import DTYPES, Plan


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
    groups: Groups | None
    ledger: Ledger
    updates: Tensor  # 0-dim int64 on the device: steps that AdamW's moments have seen, skipped ones left out
    step: int = 0
    windows: int = 0
    token_counts: dict[str, int] = field(default_factory=dict)
    counted: int = 0  # windows in token_counts
    earlier: float = 0.0  # seconds before this process
    began: float = field(default_factory=time.perf_counter)

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
        run = cls(plan, mine, attention, whole, arena, *_model(plan, arena, mine, attention), plan.ledger, updates)
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
        self.model, self.exchange, self.micro_step, self.groups = _model(
            self.plan, self.arena, self.mine, self.attention
        )

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
    plan: Plan, arena: Arena, mine: Processes, attention: dict[str, Any]
) -> tuple[Llama, Replicas | Shards, MicroStep, Groups | None]:
    """The model over an arena, its exchange with other processes, its micro-step, and the groups that its parameters update in."""
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
    z_loss = config.optimizer.z_loss
    if config.cuda_graphs:
        return model, between, Graphed(model, between, z_loss), groups
    return model, between, MicroStep(model, between, z_loss, compiled=config.compile), groups
