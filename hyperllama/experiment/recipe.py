"""The study's settings and its grid: which arms exist, what they start from, what they may spend."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from hyperllama.config import ModelSettings, OptimizerSettings, ScheduleSettings
from hyperllama.errors import HyperLlamaError, nearest
from hyperllama.experiment.merges import NAMES, reads_text
from hyperllama.flops import growth_quantum
from hyperllama.kernels.raw import MIN_NOISE_DB
from hyperllama.recipes import override, read_yaml
from hyperllama.settings import ModelConfig, Settings, validated

FAMILIES = ("1x", "1x-cloned", "2x")
SCRATCH = "2x-scratch"
GROUPS = ("base/1x", "base/2x", f"base/{SCRATCH}", *(f"adapt/{family}" for family in FAMILIES))


class SampleSettings(Settings):
    """The built-in sample text."""

    bytes_per_language: int = Field(gt=0)
    dev_bytes: int = Field(gt=0)
    pairs: int = Field(gt=0)


class LearnSettings(Settings):
    """What merges learn on: the development documents behind those that are measured."""

    bytes: int = Field(26_000, gt=0, description="of each language's text")
    steps: int = Field(24, gt=0)
    windows: int = Field(24, gt=0, description="in a step, of all languages together")


class ExperimentConfig(Settings):
    """A study: one base language, target languages, two scales, merges, controls."""

    name: str = Field(min_length=1)
    out: str
    seed: int = Field(42, ge=0, lt=2**63)
    sample: SampleSettings | None = Field(None, description="the built-in sample text ...")
    corpus: str | None = Field(
        None, description="... or a folder: text/<language>/{train,dev}.jsonl[.gz], minimal_pairs/"
    )
    base_language: str = "eng"
    targets: list[str] = Field(min_length=1)
    vocab: int = Field(gt=0, description="tokens of the tokenizer trained for the study")
    model: ModelSettings
    seq_len: int = Field(gt=0)
    global_batch: int = Field(gt=0)
    micro_batch: int = Field(gt=0)
    precision: str = Field("fp32", pattern="^(bf16|fp32)$")
    optimizer: OptimizerSettings = OptimizerSettings()
    rates: dict[str, float] = Field(
        {}, description="peak learning rates of groups of arms, base/<family> or adapt/<family>; others: optimizer.lr"
    )
    schedule: ScheduleSettings = ScheduleSettings()
    english_tokens: int = Field(gt=0, description="tokens of the base at 1x, rounded to five shared quanta of FLOPs")
    adapt_tokens: int = Field(gt=0, description="tokens of an adaptation at 1x, rounded to shared quanta of FLOPs")
    replay: float = Field(0.1, gt=0, lt=1, description="share of base-language windows in an adaptation")
    families: list[str] = Field(
        [*FAMILIES, SCRATCH],
        min_length=1,
        description="small models, their clones, models grown in training, none grown",
    )
    factor: int = Field(2, ge=2)
    noise_db: float | None = Field(MIN_NOISE_DB, description="growth noise; null: none, and a clone stays symmetric")
    merge_methods: list[str] = Field(["linear", "task_arithmetic", "ties"], min_length=1)
    density: float = Field(0.5, gt=0, le=1, description="of ties and dare_ties")
    learn: LearnSettings = LearnSettings()
    dev_bytes: int = Field(10**9, gt=0, description="development text read per language")
    dev_pairs: int = Field(10**9, ge=0, description="minimal pairs read per language")

    @model_validator(mode="after")
    def _consistent(self) -> "ExperimentConfig":
        if (self.sample is None) == (self.corpus is None):
            raise ValueError("give either sample (built-in text) or corpus (a folder), not both or none")
        if self.base_language in self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError("targets must be different languages, the base language not among them")
        for family in self.families:
            if family not in (*FAMILIES, SCRATCH):
                raise ValueError(f"families: {family!r} is unknown; {nearest(family, (*FAMILIES, SCRATCH))}")
        for group in self.rates:
            if group not in GROUPS:
                raise ValueError(f"rates: {group!r} is unknown; {nearest(group, GROUPS)}")
        for method in self.merge_methods:
            if method not in NAMES:
                raise ValueError(f"merge_methods: {method!r} is unknown; {nearest(method, NAMES)}")
        if len(set(self.merge_methods)) < len(self.merge_methods):
            raise ValueError("merge_methods must be different")
        return self

    @property
    def languages(self) -> list[str]:
        """Base language first."""
        return [self.base_language, *self.targets]

    @property
    def learns(self) -> bool:
        """Whether a merge reads text."""
        return any(map(reads_text, self.merge_methods))

    @property
    def adapted(self) -> list[str]:
        """The families that are adapted to each language and merged."""
        return [family for family in FAMILIES if family in self.families]


@dataclass(frozen=True)
class Budgets:
    """Exact FLOPs: all are multiples of the quantum that the small and the grown shape share."""

    quantum: int
    english: int
    adapt: int

    @property
    def seed(self) -> int:
        """What the base spends before the grown arm branches off: all but the last fifth."""
        return self.english // 5 * 4


@dataclass(frozen=True)
class Arm:
    """One model of the study. `shares` are the weights of the shard folders it trains on; `flops` is what it spends.

    `start` is the id it takes its weights from, None for a fresh model; an arm without shares is a clone of `start`.
    """

    id: str
    family: str
    kind: str
    language: str | None
    start: str | None
    flops: int
    shares: dict[str, float]

    @property
    def group(self) -> str:
        """The arms that share a learning rate: one for each size and family, before adaptation and in it."""
        return f"{'base' if self.kind == 'base' or self.start is None else 'adapt'}/{self.family}"


def load_experiment(recipe: str | Path, assignments: list[str] | None = None) -> ExperimentConfig:
    """Read an experiment recipe and its overrides.

    Raises HyperLlamaError naming the file and every key that is unknown, missing, of the wrong type or contradictory.
    """
    return validated(ExperimentConfig, override(read_yaml(recipe), assignments or []), str(recipe))


def budgets(config: ExperimentConfig, model: ModelConfig) -> Budgets:
    """Round the wished tokens to budgets that every arm can spend to the last FLOP.

    Raises HyperLlamaError when the shared quantum is so coarse that the rounding would exceed a quarter of the wish.
    """
    shared = growth_quantum(model, config.seq_len, config.factor)
    quantum, tokens = shared["flops"], shared["tokens"]

    def rounded(key: str, wish: int, multiple: int) -> int:
        quanta = max(1, round(wish / (tokens * multiple))) * multiple
        if abs(quanta * tokens - wish) > wish / 4:
            raise HyperLlamaError(
                f"{key} is {wish}, but budgets that all arms share are multiples of {tokens * multiple} tokens here: "
                f"ask for more, or choose other sizes (`hyperllama flops --with grow:{config.factor} --budget N` suggests)"
            )
        return quanta * quantum

    return Budgets(
        quantum, rounded("english_tokens", config.english_tokens, 5), rounded("adapt_tokens", config.adapt_tokens, 1)
    )


def grid(config: ExperimentConfig, spend: Budgets) -> list[Arm]:
    """All arms, every arm after the one it starts from."""
    base, targets, replay = config.base_language, config.targets, config.replay
    english = {base: 1.0}
    total = spend.english + len(targets) * spend.adapt
    everything = {base: (spend.english + len(targets) * spend.adapt * replay) / total} | {
        language: spend.adapt * (1 - replay) / total for language in targets
    }
    arms = [
        Arm(f"{base}-seed", "1x", "base", base, None, spend.seed, english),
        Arm(f"{base}-1x", "1x", "base", base, f"{base}-seed", spend.english - spend.seed, english),
        Arm(f"{base}-seed-cloned", "2x", "clone", base, f"{base}-seed", 0, {}),
        Arm(f"{base}-2x", "2x", "base", base, f"{base}-seed-cloned", spend.english - spend.seed, english),
        Arm(f"{base}-1x-cloned", "1x-cloned", "clone", base, f"{base}-1x", 0, {}),
    ]
    for family in config.adapted:
        for language in targets:
            shares = {language: 1 - replay, base: replay}
            arms.append(
                Arm(f"{language}-{family}", family, "language", language, f"{base}-{family}", spend.adapt, shares)
            )
    for family in config.adapted:
        shares = {language: (1 - replay) / len(targets) for language in targets} | {base: replay}
        arms.append(
            Arm(f"joint-{family}", family, "joint", None, f"{base}-{family}", len(targets) * spend.adapt, shares)
        )
    arms.append(Arm(f"{base}-{SCRATCH}", SCRATCH, "base", base, None, spend.english, english))
    arms.append(Arm(f"joint-{SCRATCH}", SCRATCH, "joint", None, None, total, everything))
    wanted = {arm.id for arm in arms if arm.family in config.families}
    for arm in reversed(arms):  # and what those start from
        if arm.id in wanted and arm.start is not None:
            wanted.add(arm.start)
    return [arm for arm in arms if arm.id in wanted]
