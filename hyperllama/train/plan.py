"""Everything a run needs, resolved and checked before any work: what is read and written, shape, steps, FLOPs, memory."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from hyperllama.arena import arena_bytes, layout, sharded_bytes
from hyperllama.companions import TOKEN_COUNTS, Companion, token_counts
from hyperllama.config import RunConfig, StageSettings
from hyperllama.data.mixture import Mixture, Source, Windows
from hyperllama.data.shards import Shards, check_tokenizer
from hyperllama.data.stages import Blend, Stages
from hyperllama.data.tail import Tail
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.data.weights import mix_weights
from hyperllama.errors import HyperLlamaError
from hyperllama.files import read_json
from hyperllama.flops import Ledger, growth_quantum, window_flops, windows_for
from hyperllama.grow.operators import HyperClone
from hyperllama.hub import Folder, folder_hashes, model_config, open_folder
from hyperllama.kernels import attention_libraries
from hyperllama.kernels.raw import check_noise
from hyperllama.settings import ModelConfig, validated
from hyperllama.train.schedule import lr_ratio, rewarm_ratio
from hyperllama.train.watch import check_watching

WRITTEN = (
    ".lock",
    "attention.json",
    "checkpoints/",
    "config.yaml",
    "environment.json",
    "events.jsonl",
    "loss.png",
    "metrics.jsonl",
    "model/",
    "run.json",
)
WATCHING = {
    "log",
    "log_every",
    "evaluate",
    "profile",
    "max_skipped",
    "timeout_seconds",
}  # settings that look at a run and don't change it
PLACING = {
    "out",
    "device",
    "parallel",
    "activation_checkpointing",
    "cuda_graphs",
}  # ... that say where it lies and is computed: equal, or rounding aside
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Growth:
    """The growth of a run: at the end of step `step`, after `windows` windows, by `operator` into `model`."""

    operator: HyperClone
    step: int
    windows: int
    model: ModelConfig
    cost: int


@dataclass(frozen=True)
class Plan:
    """A checked run. `windows` spend the budget exactly; the last batch may be smaller than the others.

    model and cost (dense FLOPs of a window) are those of its start; `growth` has those from its windows on.
    """

    config: RunConfig
    model: ModelConfig
    dtype: torch.dtype
    tokenizer: Tokenizer
    mixture: Windows
    start: Folder | None
    start_hashes: dict[str, str] | None
    ledger: Ledger
    cost: int
    windows: int
    milestones: dict[int, int]
    growth: Growth | None = None

    @property
    def final_model(self) -> ModelConfig:
        """The shape that the run ends with."""
        return self.growth.model if self.growth else self.model

    def grown_before(self, windows: int) -> bool:
        """Whether the model has grown when `windows` are done: it does so on the way to the next one."""
        return self.growth is not None and windows > self.growth.windows

    def grows_at(self, windows: int) -> bool:
        """Whether the model grows once `windows` are done."""
        return self.growth is not None and windows == self.growth.windows

    def spent(self, windows: int) -> int:
        """Dense training FLOPs of the first `windows` windows."""
        if self.growth is None or windows <= self.growth.windows:
            return windows * self.cost
        return self.growth.windows * self.cost + (windows - self.growth.windows) * self.growth.cost

    def parallel(self, world: int) -> Literal["ddp", "zero1", "fsdp"]:
        """What `parallel` means for `world` processes; auto: slices, which cost no more than sums and hold less."""
        wanted = self.config.parallel
        if world == 1:
            return "ddp"
        if wanted == "auto":  # moments are exported by one process, which then has them all
            return "ddp" if self.config.export.adam_v else "zero1"
        return wanted

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`, from 1."""
        ratio = lr_ratio(self.config.schedule, step, self.steps)
        if self.growth is not None and self.config.grow is not None and step > self.growth.step:
            ratio *= rewarm_ratio(self.config.grow.warmup_steps, step - self.growth.step)
        return self.config.optimizer.lr * ratio

    @property
    def steps(self) -> int:
        """Optimizer steps, the last partial one included."""
        return -(-self.windows // self.config.global_batch)

    @property
    def budget(self) -> int:
        """Dense training FLOPs that the run will spend."""
        return self.spent(self.windows)

    def describe(self) -> dict[str, Any]:
        """The plan for --dry-run and run.json; FLOPs, tokens and counts are exact integers."""
        c = self.config
        world = int(os.environ.get("WORLD_SIZE", "1"))
        mode = self.parallel(world)
        slices = world if mode == "zero1" else 1
        model, cost = self.final_model, self.growth.cost if self.growth else self.cost
        last = self.windows - (self.steps - 1) * c.global_batch
        return {
            "name": c.name,
            "model": model.model_dump(),
            "parameters": model.num_parameters,
            "windows": self.windows,
            "tokens": self.windows * c.data.seq_len,
            "steps": self.steps,
            "windows_in_last_step": last,
            "flops_per_window_dense": cost,
            "flops_per_window_causal": window_flops(model, c.data.seq_len, "causal"),
            "budget_flops": self.budget,
            "inherited_flops": self.ledger.inherited,
            "total_flops": self.ledger.inherited + self.budget,
            **({"growth": self._describe_growth(self.growth)} if self.growth else {}),
            "memory_bytes": {
                "arena": sharded_bytes(model, self.dtype, world, masters=c.optimizer.masters == "fp32")
                if mode == "fsdp"
                else arena_bytes(
                    layout(model, slices)[1],
                    self.dtype,
                    training=True,
                    world=slices,
                    masters=c.optimizer.masters == "fp32",
                ),
                "activations_estimate": activation_bytes(
                    model, self.dtype, c.micro_batch * c.data.seq_len, recompute=c.activation_checkpointing
                ),
            },
            "parallel": f"{mode} of {world}",
            "shared_with_clone": growth_quantum(model, c.data.seq_len, 2, self.budget),
            "data": self.mixture.describe(self.windows),
            "reads": [
                c.tokenizer,
                *([c.init_from] if c.init_from else []),
                *(str(source.shards.path) for source in self.mixture.sources),
            ],
            "writes": [f"{c.out}/{name}" for name in (*WRITTEN, *self._watched())]
            + [f"{c.out}/milestones/{flops}/" for flops in c.checkpoint.milestones],
        }

    def _watched(self) -> list[str]:
        c = self.config
        wanted = {
            "profile/": c.profile is not None,
            "samples.jsonl": bool(c.evaluate and c.evaluate.prompts),
            "tensorboard/": c.log.tensorboard,
            "wandb/": c.log.wandb is not None,
        }
        return [name for name, on in wanted.items() if on]

    def _describe_growth(self, growth: Growth) -> dict[str, Any]:
        return {
            **growth.operator.describe(),
            "at_flops": self.spent(growth.windows),
            "at_step": growth.step,
            "windows_before": growth.windows,
            "parameters_before": self.model.num_parameters,
            "flops_per_window_dense_before": self.cost,
        }


def activation_bytes(model: ModelConfig, dtype: torch.dtype, tokens: int, *, recompute: bool = False) -> int:
    """Bytes that the backward keeps for `tokens` tokens: what each op saves, without an attention backend's own and the logits.

    A layer's norms keep their sum and their output, attention its input and output, the MLP gate, up and their product.
    recompute: layers keep their two inputs, and one at a time the rest.
    """
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    per_layer = 4 * model.hidden_size + (heads + 2 * kv) + heads + 3 * model.intermediate_size
    layers = 2 * model.hidden_size * model.num_layers + per_layer if recompute else model.num_layers * per_layer
    return tokens * dtype.itemsize * (layers + 3 * model.hidden_size)


def make_plan(config: RunConfig) -> Plan:
    """Read the headers of all inputs and resolve the run; writes nothing.

    Raises HyperLlamaError for missing or damaged inputs, a tokenizer that is not the shards', a vocabulary that is not the
    model's, a budget that is not a whole number of windows, sources too small for their max_epochs, or an attention backend that
    is not installed.
    """
    if config.attention in attention_libraries.LIBRARIES:
        attention_libraries.load(config.attention)
    tokenizer = Tokenizer.load(config.tokenizer)
    data = config.data
    seq_len = data.seq_len
    mixture = _mixture(config, tokenizer)
    dtype = DTYPES[config.precision]
    if config.init_from is not None:
        start = open_folder(config.init_from)
        model = model_config(start.config, start.path)
        rows = model.unpadded_vocab_size or model.vocab_size
        if tokenizer.vocab_size > rows:
            raise HyperLlamaError(
                f"{config.tokenizer} has {tokenizer.vocab_size} tokens, but the model in {config.init_from} knows only {rows}"
            )
    else:
        assert config.model is not None  # RunConfig requires one of the two
        start, model = None, config.model.resolve(tokenizer.vocab_size, seq_len)
    cost = window_flops(model, seq_len)
    ledger = Ledger.child("", start.ledgers if start else [])
    growth = _growth(config, model, cost)
    windows = _windows(config, cost, ledger, growth)
    if mixture.tail is not None:
        windows = mixture.tail.computed
    if growth is not None and windows <= growth.windows:
        raise HyperLlamaError(
            f"grow.at_flops: the run's budget is over at {windows * cost} FLOPs, before the model grows: choose at most "
            f"{(windows - 1) // config.global_batch * config.global_batch * cost}"
        )
    hashes = folder_hashes(start) if start else None
    ledger.run = _run_id(config, mixture, hashes, windows)
    mixture.check(windows)
    check_watching(config, -(-windows // config.global_batch), model.vocab_size)
    milestones = {}
    for flops in config.checkpoint.milestones:
        at = _windows_for(flops, cost, growth)
        if (at % config.global_batch and at != windows) or at > windows:
            _refuse_inside_a_step("checkpoint.milestones", flops, config.global_batch, cost, growth)
        milestones[at] = flops
    return Plan(config, model, dtype, tokenizer, mixture, start, hashes, ledger, cost, windows, milestones, growth)


def _growth(config: RunConfig, model: ModelConfig, cost: int) -> Growth | None:
    """The growth of a recipe. Raises HyperLlamaError when it is not at the end of a step of the smaller model, or is too loud."""
    grow = config.grow
    if grow is None:
        return None
    try:
        check_noise(grow.noise_db)
    except HyperLlamaError as error:
        raise HyperLlamaError(f"grow.noise_db: {error}") from None
    windows = windows_for(grow.at_flops, cost)
    if windows % config.global_batch:
        _refuse_inside_a_step("grow.at_flops", grow.at_flops, config.global_batch, cost)
    operator = HyperClone(grow.factor, grow.ffn_factor, config.seed, grow.noise_db)
    large = operator.grown(model)
    return Growth(operator, windows // config.global_batch, windows, large, window_flops(large, config.data.seq_len))


def _refuse_inside_a_step(key: str, flops: int, batch: int, cost: int, growth: Growth | None = None) -> NoReturn:
    before = growth.windows * cost if growth is not None and flops > growth.windows * cost else 0
    step = batch * (growth.cost if growth is not None and before else cost)
    below = before + (flops - before) // step * step
    raise HyperLlamaError(
        f"{key}: {flops} FLOPs is not at the end of a step of this run; the nearest that are: "
        f"{' and '.join(str(value) for value in (below, below + step) if value)}"
    )


def _windows_for(flops: int, cost: int, growth: Growth | None) -> int:
    """Windows that spend exactly `flops`, at another cost after growth. Raises HyperLlamaError naming the nearest budgets."""
    before = growth.windows * cost if growth else 0
    if growth is None or flops <= before:
        return windows_for(flops, cost)
    if (flops - before) % growth.cost:
        below = before + (flops - before) // growth.cost * growth.cost
        raise HyperLlamaError(
            f"a budget of {flops} FLOPs is not a whole number of windows: {before} before growth and {growth.cost} for each "
            f"window after it; the nearest that are: {below} and {below + growth.cost}"
        )
    return growth.windows + (flops - before) // growth.cost


def _mixture(config: RunConfig, tokenizer: Tokenizer) -> Windows:
    data = config.data
    verify = data.verify and os.environ.get("LOCAL_RANK", "0") == "0"  # one process a node reads every byte
    paths = {source.path for stage in data.plan for source in stage.sources}
    paths |= {stage.replay.path for stage in data.plan if stage.replay is not None}
    shards = {path: Shards.open(path, verify=verify) for path in sorted(paths)}
    for folder in shards.values():
        check_tokenizer(folder, tokenizer)
    orders = [_order(config, stage, shards) for stage in data.plan]
    if len(orders) == 1:
        return orders[0]
    return Stages(orders, [(stage.start_step - 1) * config.global_batch for stage in data.plan])


def _order(config: RunConfig, stage: StageSettings, shards: dict[str, Shards]) -> Windows:
    """The order of one stage's windows."""
    data, seed = config.data, config.seed if stage.seed is None else stage.seed
    if len({source.weight is None for source in stage.sources}) > 1:
        raise HyperLlamaError("data.sources: give every source a weight, or none (then tokens decide)")
    opened = [shards[source.path] for source in stage.sources]
    weights = [
        source.weight if source.weight is not None else float(folder.tokens)
        for source, folder in zip(stage.sources, opened, strict=True)
    ]
    if data.mix is not None:
        weights = mix_weights(opened, data.mix)
    limits = [source.max_epochs for source in stage.sources]
    folders = list(zip(opened, weights, limits, strict=True))
    if stage.replay is not None:
        share = stage.replay.fraction / (1 - stage.replay.fraction) * sum(weights)
        folders.append((shards[stage.replay.path], share, None))
    names = [folder.path.name for folder, _, _ in folders]  # the order hangs on names: a moved corpus keeps its order
    if len(set(names)) < len(names):
        names = [str(folder.path) for folder, _, _ in folders]
    sources = [Source(name, *folder) for name, folder in zip(names, folders, strict=True)]
    if data.order == "nanotron":
        return Blend(sources, data.seq_len, seed, config.global_batch, data.nanotron_tail)
    tail, wanted = None, data.nanotron_tail
    if wanted is not None:
        windows = config.budget.windows or (config.budget.tokens or 0) // data.seq_len
        tail = Tail(windows, config.global_batch, wanted.processes, wanted.micro_batch)
    return Mixture(sources, data.seq_len, seed, tail)


def counted_tokens(state: dict[str, Any], model: ModelConfig) -> dict[str, Companion]:
    """The token counts of a checkpoint's model, read from the run's shards once more.

    Raises HyperLlamaError when the shards are gone or have changed since.
    """
    where, card = "the checkpoint's state.json", state["card"]
    config = validated(RunConfig, card["config"], where)
    config = config.model_copy(update={"data": config.data.model_copy(update={"verify": False})})
    try:
        mixture = _mixture(config, Tokenizer.load(config.tokenizer))
    except HyperLlamaError as error:
        raise HyperLlamaError(f"{error}; --no-counts exports without token counts") from None
    for source, made_from in zip(mixture.sources, card["made_from"], strict=False):
        if source.shards.fingerprint != made_from["sha256"]:
            raise HyperLlamaError(
                f"{source.shards.path} is not what the run read; --no-counts exports without token counts"
            )
    return {TOKEN_COUNTS: token_counts(mixture.token_counts(state["windows"]), model.vocab_size)}


def _windows(config: RunConfig, cost: int, ledger: Ledger, growth: Growth | None) -> int:
    budget = config.budget
    if budget.windows is not None:
        return budget.windows
    if budget.steps is not None:
        return budget.steps * config.global_batch
    if budget.tokens is not None:
        if budget.tokens % config.data.seq_len:
            raise HyperLlamaError(
                f"budget.tokens ({budget.tokens}) is not a multiple of data.seq_len ({config.data.seq_len})"
            )
        return budget.tokens // config.data.seq_len
    if budget.flops is not None:
        return _windows_for(budget.flops, cost, growth)
    other = budget.match_total or budget.match_spent
    assert other is not None  # BudgetSettings requires one key
    file = Path(other) / "run.json"
    record = read_json(file)
    if "ledger" not in record:
        raise HyperLlamaError(f"{file} has no ledger: {other} is not a run that finished")
    theirs = Ledger.from_json(record["ledger"], file)
    flops = theirs.total - ledger.inherited if budget.match_total else theirs.spent
    if flops <= 0:
        raise HyperLlamaError(
            f"budget.match_total: this run inherits {ledger.inherited} FLOPs, {other} ended at {theirs.total}"
        )
    return _windows_for(flops, cost, growth)


def _run_id(config: RunConfig, mixture: Windows, start_hashes: dict[str, str] | None, windows: int) -> str:
    """Name and a hash of all that decides the run's result, rounding aside: the same run has the same id anywhere."""
    settings = config.model_dump(  # `windows` stands for the budget, the tokens in the mixture for the tokenizer
        exclude={
            "name",
            "checkpoint",
            "export",
            "attention",
            "compile",
            "tokenizer",
            "budget",
            *WATCHING,
            *PLACING,
        }
    )
    for stage in (settings["data"], *(settings["data"]["stages"] or [])):
        for source in stage["sources"] or []:
            del source["path"]  # the mixture's fingerprint stands for what the paths hold
        if stage["replay"]:
            del stage["replay"]["path"]
    # a run that has nothing of the kind is called as before there was such a key
    since: dict[str, dict[str, Any]] = {
        "data": {"nanotron_tail": None, "stages": None, "mix": None, "order": "shuffled"},
        "optimizer": {"masters": "fp32"},
    }
    for section, keys in since.items():
        for key, unused in keys.items():
            if settings[section][key] == unused:
                del settings[section][key]
    settings["init_from"] = start_hashes
    text = json.dumps([settings, mixture.fingerprint, windows], sort_keys=True)
    return f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
