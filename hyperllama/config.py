"""Every setting of a run, with its default and unit: one YAML file, `a.b=c` overrides, nothing unknown, nothing contradictory."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.raw import MIN_NOISE_DB
from hyperllama.recipes import override, read_yaml
from hyperllama.settings import VOCAB_MULTIPLE, ModelConfig, Settings, validated

FFN_MULTIPLE = 64


class ModelSettings(Settings):
    """The model of a recipe: sizes are given, heads' width and padding derived when left out."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int | None = Field(None, gt=0, description="default: 8/3 hidden, rounded up to 64")
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int | None = Field(None, gt=0, description="default: num_heads")
    head_dim: int | None = Field(None, gt=0, description="default: hidden_size / num_heads")
    vocab_size: int | None = Field(None, gt=0, description="default: the tokenizer's, padded up to 128")
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    rope_theta: float = Field(10000.0, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    tie_embeddings: bool = True
    initializer_range: float = Field(0.02, gt=0)

    def resolve(self, tokenizer_vocab: int, seq_len: int) -> ModelConfig:
        """The full shape for a tokenizer of `tokenizer_vocab` entries and windows of `seq_len` tokens."""
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise HyperLlamaError(
                f"model.hidden_size ({self.hidden_size}) is not a multiple of model.num_heads ({self.num_heads}): "
                "set model.head_dim"
            )
        rows = self.vocab_size or _round_up(tokenizer_vocab, VOCAB_MULTIPLE)
        if rows < tokenizer_vocab:
            raise HyperLlamaError(
                f"model.vocab_size is {rows}, but the tokenizer has {tokenizer_vocab} tokens: leave the key out or raise it"
            )
        values = self.model_dump()
        values.update(
            vocab_size=rows,
            unpadded_vocab_size=tokenizer_vocab if rows != tokenizer_vocab else None,
            intermediate_size=self.intermediate_size or _round_up(self.hidden_size * 8 // 3, FFN_MULTIPLE),
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            max_position_embeddings=seq_len,
        )
        return validated(ModelConfig, values, "the model section")


class SourceSettings(Settings):
    """One folder of token shards in the mixture."""

    path: str = Field(description="folder written by `hyperllama data build`")
    weight: float | None = Field(
        None, gt=0, description="share of the windows, any scale; default: the folder's tokens"
    )
    max_epochs: float | None = Field(None, gt=0, description="refuse a run that would read the folder more often")


class ReplaySettings(Settings):
    """Old text mixed into an adaptation, so that what was learnt is not forgotten."""

    path: str
    fraction: float = Field(gt=0, lt=1, description="share of all windows")


class StageSettings(Settings):
    """What is read from one step of the run to the next stage's."""

    start_step: int = Field(gt=0, description="first optimizer step, from 1")
    seed: int | None = Field(None, ge=0, lt=2**63, description="of the stage's order; default: the run's")
    sources: list[SourceSettings] = Field(min_length=1)
    replay: ReplaySettings | None = None


class MixSettings(Settings):
    """Weights of sources computed from their sizes, see data/weights.py."""

    by: Literal["size", "temperature", "unimax"] = "size"
    unit: Literal["tokens", "characters"] = "tokens"
    exponent: float = Field(0.3, ge=0, le=1, description="temperature: share ~ size ** exponent")
    budget: float | None = Field(None, gt=0, description="unimax: tokens or characters to share out")
    max_epochs: float = Field(6.0, gt=0, description="unimax: no source more often")

    @model_validator(mode="after")
    def _budgeted(self) -> "MixSettings":
        if self.by == "unimax" and self.budget is None:
            raise ValueError("by unimax needs a budget, in tokens or characters")
        return self


class TailSettings(Settings):
    """The processes and micro-batches of nanotron's that a stage's last step is filled as by: see data/tail.py."""

    processes: int = Field(gt=0, description="data-parallel, of the run that is repeated, not of this one")
    micro_batch: int = Field(gt=0, description="windows, of that run")


class DataSettings(Settings):
    """What a run reads."""

    sources: list[SourceSettings] | None = Field(None, min_length=1, description="for the whole run ...")
    stages: list[StageSettings] | None = Field(None, min_length=1, description="... or one set after another")
    replay: ReplaySettings | None = None
    mix: MixSettings | None = Field(None, description="weights of the sources by size, temperature or UniMax")
    order: Literal["shuffled", "nanotron"] = Field(
        "shuffled",
        description="nanotron: the paper's: files permuted, windows in order, sources by greedy deficit, each once",
    )
    seq_len: int = Field(gt=0, description="tokens a window predicts; windows hold one more")
    documents: Literal["across", "separate"] = Field(
        "across", description="separate: attention and RoPE positions restart at each document"
    )
    mask_document_start: bool = Field(False, description="no loss on the first token of a document inside a window")
    nanotron_tail: TailSettings | None = Field(
        None,
        description="fill the last step with copies as the paper's trainer does; default: it is shorter than the others",
    )
    verify: bool = Field(True, description="check the shards' SHA-256 before the run")

    @property
    def plan(self) -> list[StageSettings]:
        """The stages; one where there are only sources."""
        if self.stages is not None:
            return self.stages
        return [StageSettings(start_step=1, sources=self.sources or [], replay=self.replay)]

    @model_validator(mode="after")
    def _consistent(self) -> "DataSettings":
        if (self.sources is None) == (self.stages is None):
            raise ValueError("give either sources or stages, not both or none")
        if self.stages is not None and self.replay is not None:
            raise ValueError("replay belongs into each of the stages")
        starts = [stage.start_step for stage in self.plan]
        if starts[0] != 1 or any(b <= a for a, b in pairwise(starts)):
            raise ValueError(f"stages must start at step 1 and at later ones in turn; got {starts}")
        weighted = any(source.weight is not None for stage in self.plan for source in stage.sources)
        if self.mix is not None and weighted:
            raise ValueError("mix computes weights: leave the sources' own out")
        if self.order == "nanotron" and (weighted or self.mix or any(stage.replay for stage in self.plan)):
            raise ValueError("order nanotron takes each window of its sources once: leave weight, mix and replay out")
        if self.nanotron_tail is not None and self.stages is not None and self.order != "nanotron":
            raise ValueError("nanotron_tail fills the last step of every stage in order nanotron only")
        return self


class BudgetSettings(Settings):
    """How long to train: exactly one key. FLOPs are dense training FLOPs, see the ledger in flops.py."""

    flops: int | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0, description="predicted tokens")
    windows: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps of whole batches")
    match_total: str | None = Field(None, description="run folder whose inherited + spent FLOPs this run ends at")
    match_spent: str | None = Field(None, description="run folder whose spent FLOPs this run spends")

    @model_validator(mode="after")
    def _exactly_one(self) -> "BudgetSettings":
        given = [key for key, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(type(self).model_fields)}; got {', '.join(given) or 'none'}"
            )
        return self


class OptimizerSettings(Settings):
    """AdamW."""

    masters: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16: none, the weights themselves are updated, rounded stochastically; 4 bytes a parameter less",
    )
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0, description="decoupled: lr times this, also of a grown tensor")
    decay: Literal["all", "matrices"] = Field("all", description="what decays; all, norms too, as in the paper's runs")
    clip_norm: float | None = Field(1.0, gt=0, description="global L2 norm; null: no clipping")
    z_loss: float = Field(0.0, ge=0)


class ScheduleSettings(Settings):
    """Learning rate over steps. `paper`: warm-up, constant, linear decay to zero; `cosine`: warm-up, cosine."""

    kind: Literal["paper", "cosine"] = "paper"
    warmup_steps: int = Field(10, ge=0)
    decay_fraction: float = Field(0.2, ge=0, le=1, description="paper: share of the steps that decay")
    offset: int = Field(
        1, ge=0, le=1, description="paper: step n uses f(n - offset); 1 as in its runs: the first has rate 0"
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="cosine: final rate over peak rate")


class GrowSettings(Settings):
    """HyperCloning inside the run, at the end of a step: weights, masters and moments grow in place, ledger and data go on."""

    at_flops: int = Field(gt=0, description="spent FLOPs of this run at which the model grows")
    factor: int = Field(2, ge=2, description="hidden size and heads times this")
    ffn_factor: int | None = Field(None, gt=0, description="FFN width times this; default: factor")
    noise_db: float | None = Field(
        MIN_NOISE_DB,  # why: NOTES.md, bench/growth_noise.py
        description="+- noise between pairs of copies, which keeps the function; null: the paper's plain clone",
    )
    optimizer: Literal["carry", "fresh"] = Field(
        "carry", description="fresh: moments and their step count restart at 0"
    )
    lr_factors: Literal["exact", "none"] = Field(
        "exact", description="exact: every tensor's lr and eps, and the norm that clips, as if the small model went on"
    )
    warmup_steps: int = Field(0, ge=0, description="linear warm-up after growth, on top of the schedule")


class CheckpointSettings(Settings):
    """When the training state is saved; the final model is always exported."""

    every_steps: int | None = Field(None, gt=0)
    keep: int = Field(2, gt=0, description="newest checkpoints that stay")
    keep_every: int | None = Field(None, gt=0, description="those at multiples of this step stay too")
    keep_best: Literal["loss", "bits_per_byte"] | None = Field(
        None, description="the one with the lowest training loss, or the lowest figure of `evaluate`, stays too"
    )
    milestones: list[int] = Field(default_factory=list, description="ledger values (spent FLOPs) to export a model at")


class ExportSettings(Settings):
    """What an exported model takes along besides its weights, card, tokenizer and token counts."""

    adam_v: bool = Field(False, description="AdamW's second moment in adam_v.safetensors, for merges weighted by it")


class EvaluateSettings(Settings):
    """Text that the model is measured on while it trains; FLOPs spent on it are not in the ledger."""

    every: int = Field(gt=0, description="steps; the end is measured too")
    text: list[str] = Field(min_length=1, description="txt, jsonl, jsonl.gz: bits per byte over all of them")
    prompts: list[str] = Field(
        default_factory=list, description="continued by the likeliest tokens, into samples.jsonl"
    )
    sample_tokens: int = Field(64, gt=0, description="tokens of a continuation")
    start_token: int | None = Field(None, ge=0, description="before every document; default: EOS, as in the shards")


class LogSettings(Settings):
    """Where metrics.jsonl's figures go besides; both need `pip install hyperllama[log]`."""

    tensorboard: bool = Field(False, description="event files in <out>/tensorboard")
    wandb: str | None = Field(None, description="a project of Weights & Biases")


class ProfileSettings(Settings):
    """Steps that torch's profiler records, into <out>/profile."""

    start: int = Field(gt=0, description="first step; after the first few, which measure and warm up")
    steps: int = Field(3, gt=0)


class RunConfig(Settings):
    """One training run."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$", description="letters, digits, . _ + -")
    out: str = Field(description="run folder")
    seed: int = Field(42, ge=0, lt=2**63)
    tokenizer: str = Field(description="tokenizer.model, tokenizer.json, or a folder with one")
    model: ModelSettings | None = Field(None, description="a fresh model ...")
    init_from: str | None = Field(None, description="... or the weights of this Hugging Face folder, optimizer fresh")
    data: DataSettings
    budget: BudgetSettings
    global_batch: int = Field(gt=0, description="windows per optimizer step, over all processes")
    micro_batch: int = Field(gt=0, description="windows per forward and backward of one process")
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()
    grow: GrowSettings | None = Field(None, description="grow the model inside the run")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="weights and activations; moments are fp32, masters as optimizer.masters says"
    )
    attention: Literal[
        "auto", "csrc", "sdpa", "reference", "triton", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient",
        "flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers", "torch_varlen",
    ] = Field("auto", description="auto: on a GPU the fastest of those installed, measured at the start")  # fmt: skip
    deterministic: bool = Field(False, description="the same bits every time on a GPU too, slower; a CPU always does")
    rope_tables: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: cos and sin rounded, as in the paper's runs"
    )
    loss_mean: Literal["tokens", "micro_batch"] = Field(
        "tokens",
        description="over all targets of a batch; micro_batch: the mean of micro-batches' means, as in the paper's runs",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["auto", "ddp", "zero1", "fsdp"] = Field(
        "auto",
        description="of several processes; zero1: masters and moments in slices; fsdp: weights and gradients too; auto: zero1",
    )
    activation_checkpointing: bool = Field(
        False,
        description="layers keep their inputs only and run again in the backward: the same bits, a third more work",
    )
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    compile: bool = Field(
        False, description="torch.compile the model: other roundings, gradients of a micro-batch in the weights' dtype"
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        False,
        description="record the kernels of a micro-batch, and of the optimizer, and launch them as one: the same bits; auto: "
        "where that is faster, measured at the start; not yet run on a GPU",
    )
    log: LogSettings = LogSettings()
    evaluate: EvaluateSettings | None = None
    profile: ProfileSettings | None = None
    max_skipped: int = Field(5, gt=0, description="steps in a row with a loss or gradient not finite that end the run")
    timeout_seconds: int = Field(600, ge=5, description="a process that hangs for longer ends the run, by name")

    @model_validator(mode="after")
    def _moments_to_export(self) -> "RunConfig":
        if self.export.adam_v and self.parallel in ("zero1", "fsdp"):
            raise ValueError(
                f"export.adam_v needs all moments in one process: set parallel to ddp or auto, not {self.parallel}"
            )
        return self

    @model_validator(mode="after")
    def _tensors_to_grow(self) -> "RunConfig":
        if self.grow is not None and self.parallel == "fsdp":
            raise ValueError(
                "grow needs whole tensors, and with parallel fsdp no process has them: set parallel to zero1, or grow the "
                "finished model with `hyperllama grow`"
            )
        return self

    @model_validator(mode="after")
    def _stage_with_a_tail(self) -> "RunConfig":
        tail = self.data.nanotron_tail
        if tail is not None:
            if self.global_batch % (tail.processes * tail.micro_batch):
                raise ValueError(
                    f"data.nanotron_tail: global_batch ({self.global_batch}) is not a multiple of its processes times its "
                    f"micro_batch ({tail.processes * tail.micro_batch})"
                )
            counted = self.data.order == "nanotron"  # a stage ends where its sources do
            if not counted and self.budget.windows is None and self.budget.tokens is None:
                raise ValueError(
                    "data.nanotron_tail: give budget.windows or budget.tokens, the stage without its copies"
                )
        return self

    @property
    def never_replayed(self) -> str | None:
        """The setting with which no micro-batch is like the one before, so that its CUDA graph could not be replayed."""
        settings = {
            "parallel: fsdp": self.parallel == "fsdp",
            "data.documents: separate": self.data.documents == "separate",
            "data.mask_document_start": self.data.mask_document_start,  # the number of targets varies
        }
        return next((name for name, on in settings.items() if on), None)

    @model_validator(mode="after")
    def _compilable(self) -> "RunConfig":
        others = {
            "parallel: fsdp": self.parallel == "fsdp",
            "activation_checkpointing": self.activation_checkpointing,
            "cuda_graphs": self.cuda_graphs is True,
        }
        for name, on in others.items():
            if self.compile and on:
                raise ValueError(f"compile and {name} do not go together: leave one of them out")
        if self.cuda_graphs is True and (problem := self.never_replayed):
            raise ValueError(f"cuda_graphs replays nothing with {problem}: leave one of them out")
        return self

    @model_validator(mode="after")
    def _figures_to_keep_by(self) -> "RunConfig":
        if self.checkpoint.keep_best == "bits_per_byte":
            if self.evaluate is None:
                raise ValueError("checkpoint.keep_best is bits_per_byte, which only an evaluate section measures")
            if self.checkpoint.every_steps is not None and self.checkpoint.every_steps % self.evaluate.every:
                raise ValueError(
                    f"checkpoint.every_steps ({self.checkpoint.every_steps}) must be a multiple of evaluate.every "
                    f"({self.evaluate.every}): keep_best compares checkpoints that were measured"
                )
        if self.evaluate is not None and self.evaluate.prompts and self.parallel == "fsdp":
            raise ValueError("evaluate.prompts: with parallel fsdp no process can write alone; generate from an export")
        return self

    @model_validator(mode="after")
    def _masters_to_round(self) -> "RunConfig":
        if self.optimizer.masters == "bf16" and self.precision != "bf16":
            raise ValueError("optimizer.masters: bf16 is for precision: bf16; weights in fp32 are their own masters")
        if self.optimizer.masters == "bf16" and self.grow is not None:
            raise ValueError(
                "grow needs optimizer.masters: fp32: the sums that keep the function are exact in the masters"
            )
        return self

    @model_validator(mode="after")
    def _one_start(self) -> "RunConfig":
        if (self.model is None) == (self.init_from is None):
            raise ValueError(
                "give either model (a fresh start) or init_from (the weights of a folder), not both or none"
            )
        return self

    @field_validator("micro_batch")
    @classmethod
    def _fits(cls, value: int, info: Any) -> int:
        if "global_batch" in info.data and value > info.data["global_batch"]:
            raise ValueError(f"micro_batch ({value}) is larger than global_batch ({info.data['global_batch']})")
        return value


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def load_run(recipe: str | Path, assignments: list[str] | None = None) -> RunConfig:
    """Read a training recipe and its overrides.

    Raises HyperLlamaError naming the file and every key that is unknown, missing, of the wrong type or contradictory.
    """
    values = override(read_yaml(recipe), assignments or [])
    return validated(RunConfig, values, str(recipe))
