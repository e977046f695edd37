"""Which method and weights merge these models best? `search` tries them on development text, within a budget of evaluations.

    1. the recipe as given, then the candidates below, in this order, as far as models and budget allow
    2. for the two best with a scale: lambda times 1.25 or 0.8, in the direction that helps, as long as it does
    3. with texts to learn on: coefficients by row (learned.py), from the best that can learn; half of the budget is kept for it

An evaluation is one forward pass over all of the development text; learning counts by its FLOPs. A candidate's score is the mean of
the texts' bits per byte, a text for each language. The text that chooses is spent by choosing: take figures on other text.
The FLOPs of everything tried (dense) are the search's, and are counted as spent by the merge that comes of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, log
from pathlib import Path
from typing import Any

import torch
import yaml

from hyperllama.arena import Arena
from hyperllama.companions import ADAM_V, TOKEN_COUNTS
from hyperllama.data.text import iter_documents
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.folder import folder_start
from hyperllama.evaluate.score import score, windows_of
from hyperllama.flops import window_flops
from hyperllama.hub import model_config
from hyperllama.merge.learned import Learned, learn
from hyperllama.merge.planner import Plan, plan
from hyperllama.merge.recipe import Recipe, parse_recipe
from hyperllama.merge.tensors import Prepared, merged_tensors
from hyperllama.model import Llama

STEP = 1.25  # of a scale
PAPERS = ("linear", "task_arithmetic", "multislerp", "ties", "dare_ties")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Candidate:
    """A merge to try: every model's weight is 1, so lambda is the one scale. `importance`: (by, power) in turn."""

    method: str
    lam: float = 1.0
    importance: tuple[tuple[str, float], ...] = ()
    learn: tuple[tuple[str, Any], ...] = ()  # settings of `hyperllama: learn:`

    @property
    def has_scale(self) -> bool:
        """Whether lambda is one of its parameters."""
        return self.method not in ("linear", "multislerp")

    def describe(self) -> str:
        """ties, lambda 1.25; task_arithmetic by token_counts, adam_v^0.5, learnt by row."""
        shares = ", ".join(by if power == 1 else f"{by}^{power:g}" for by, power in self.importance)
        scale = f", lambda {self.lam:g}" if self.has_scale and self.lam != 1 else ""
        return self.method + scale + (f" by {shares}" if shares else "") + (", learnt by row" if self.learn else "")

    def recipe(self, given: Recipe) -> Recipe:
        """The candidate as a recipe for the models of `given`."""
        trims = {"density": 0.5} if self.method in ("ties", "dare_ties") else {}
        value: dict[str, Any] = {"merge_method": self.method}
        if self.method not in ("linear", "multislerp"):
            value["base_model"] = given.base_model
        value["models"] = [
            {"model": model.model, "parameters": {"weight": 1.0, **trims}}
            for model in given.models or []
            if model.model != given.base_model
        ]
        value["parameters"] = ({"lambda": self.lam} if self.has_scale else {}) | (
            {"normalize": True} if self.method != "multislerp" else {}
        )
        value |= {key: getattr(given, key) for key in ("dtype", "out_dtype") if getattr(given, key)}
        extensions: dict[str, Any] = {"seed": given.hyperllama.seed} if given.hyperllama.seed else {}
        if self.importance:
            extensions["importance"] = [{"by": by, "power": power} for by, power in self.importance]
        if self.learn:
            extensions["learn"] = {key: list(value) if isinstance(value, tuple) else value for key, value in self.learn}
        if extensions:
            value["hyperllama"] = extensions
        return parse_recipe(yaml.safe_dump(value, sort_keys=False), f"the candidate {self.describe()}")


@dataclass(frozen=True)
class Found:
    """The best of a search: its plan, what it learnt, one row for everything tried (best first), all FLOPs, evaluations used."""

    plan: Plan
    learned: Learned | None
    rows: list[dict[str, Any]]
    flops: int
    evaluations: int


class Development:
    """Development texts, tokenised once, and a model that merges are placed in. `flops`: of one evaluation, dense."""

    def __init__(self, texts: Sequence[str | Path], planned: Plan, seq_len: int | None = None):
        folder = next(iter(planned.folders.values())).path
        if planned.tokenizer_from is None:
            raise HyperLlamaError(f"{folder} has no tokenizer, which the development text is read with")
        tokenizer = Tokenizer.load(planned.tokenizer_from)
        self.start = folder_start(folder, tokenizer)
        self.sequences, self.bytes = {}, {}
        for text in map(str, texts):
            documents = list(iter_documents([text]))
            self.sequences[text] = tokenizer.encode_batch([document.text for document in documents])
            self.bytes[text] = sum(document.num_bytes for document in documents)
        # files hold the final norm divided by the head's factor
        config = model_config(planned.config, folder).model_copy(update={"lm_head_normalization_factor": 1.0})
        self.seq_len = min(seq_len or config.max_position_embeddings, config.max_position_embeddings)
        self.shape = planned.config
        self.arena = Arena(config, torch.float32, "cpu", training=False)
        self.model = Llama(config, self.arena)
        lengths = [len(ids) for sequences in self.sequences.values() for ids in sequences]
        windows = [window for n in lengths for window in windows_of(0, n, self.seq_len)]
        self.flops = sum(window_flops(config, window.end - window.begin) // 3 for window in windows)

    def measure(self, planned: Plan, prepared: Prepared | None = None) -> dict[str, float]:
        """Bits per byte of each text under a merge. Raises HyperLlamaError when weights or losses are not finite."""
        if planned.config["tie_word_embeddings"] != self.shape["tie_word_embeddings"]:
            raise HyperLlamaError("a candidate is tied where the recipe is not, or the other way round")
        views = self.arena.logical("weights")
        for name, tensor in merged_tensors(planned.steps, planned.folders, prepared):
            views[name].copy_(tensor)
        return {
            text: sum(score(self.model, sequences, start=self.start, seq_len=self.seq_len).nll)
            / log(2)
            / self.bytes[text]
            for text, sequences in self.sequences.items()
        }


def candidates(given: Recipe, planned: Plan, methods: Sequence[str] = PAPERS, shares: bool = True) -> list[Candidate]:
    """The first round: `methods` at the paper's settings, and task arithmetic with the `shares` that the models' files allow.

    Without a base only linear and multislerp; with one, task_arithmetic stands for linear, which it equals at weights 1.
    """
    base = given.base_model
    if not base:
        return [Candidate(method) for method in methods if method in ("linear", "multislerp")]
    found = [Candidate(method) for method in methods if method != "linear"]
    paths = [folder.path for label, folder in planned.folders.items() if label != base]
    counts, moments = (all((path / name).is_file() for path in paths) for name in (TOKEN_COUNTS, ADAM_V))
    by: list[tuple[tuple[str, float], ...]] = []
    if counts:
        by.append((("token_counts", 1.0),))
    if moments:
        by.append((("adam_v", 1.0),))
    if counts and moments:
        by += [(("token_counts", 1.0), ("adam_v", power)) for power in (1.0, 0.5)]
    return found + [Candidate("task_arithmetic", importance=each) for each in (by if shares else [])]


class _Search:
    """Tries recipes, each once, and remembers."""

    def __init__(self, development: Development, cwd: Path, budget: int, progress: Progress | None):
        self.development, self.cwd, self.budget, self.progress = development, cwd, budget, progress
        self.used, self.flops = 0, 0
        self.tried: list[tuple[float, str, Plan, Learned | None, dict[str, float]]] = []
        self.means: dict[Candidate, float] = {}

    def spend(self, flops: int) -> None:
        self.flops += flops
        self.used += -(-flops // self.development.flops)
        if self.progress is not None:
            self.progress(min(self.used, self.budget), self.budget)

    def measure(self, name: str, planned: Plan) -> float:
        """The mean of the texts' bits per byte; infinite for a merge whose weights or losses are not finite."""
        learned = None
        if planned.recipe.hyperllama.learn:
            learned = learn(planned)
            self.spend(learned.flops)
        self.spend(self.development.flops)
        try:
            bits = self.development.measure(planned, learned)
        except HyperLlamaError:
            bits = {text: float("inf") for text in self.development.bytes}
        mean = sum(bits.values()) / len(bits)
        self.tried.append((mean, name, planned, learned, bits))
        return mean

    def candidate(self, candidate: Candidate, given: Recipe) -> float:
        """A candidate's score; one that was tried costs nothing."""
        if candidate not in self.means:
            planned = plan(candidate.recipe(given), self.cwd)
            self.means[candidate] = self.measure(candidate.describe(), planned)
        return self.means[candidate]

    def climb(self, candidate: Candidate, given: Recipe, until: int) -> Candidate:
        """The best lambda in steps of STEP from a candidate's, each way as long as it helps."""
        best = candidate
        for factor in (STEP, 1 / STEP):
            while self.used < until:
                following = replace(best, lam=best.lam * factor)
                if not self.candidate(following, given) < self.means[best]:
                    break
                best = following
            if best is not candidate:
                break
        return best


def search(
    given: Recipe,
    texts: Sequence[str | Path],
    evaluations: int,
    *,
    learn_texts: Sequence[str | Path] = (),
    methods: Sequence[str] = PAPERS,
    shares: bool = True,
    seq_len: int | None = None,
    cwd: str | Path = ".",
    progress: Progress | None = None,
) -> Found:
    """Search by the mean bits per byte of `texts`, one a language, in at most `evaluations`, from the models of `given`.

    learn_texts: other text, one a language, to learn coefficients on; none: nothing is learnt. `methods`, `shares`: see candidates.
    Raises HyperLlamaError for recipes with slices, for what `plan` refuses of `given`, and for bad texts.
    """
    cwd = Path(cwd)
    if given.slices:
        raise HyperLlamaError("a search needs a recipe with 'models', not 'slices'")
    if evaluations < 1:
        raise HyperLlamaError(f"evaluations is {evaluations}; at least 1 was expected")
    planned = plan(given, cwd)
    development = Development(texts, planned, seq_len)
    run = _Search(development, cwd, evaluations, progress)
    first = candidates(given, planned, methods, shares)
    learning = _learning(development, learn_texts, evaluations // 2) if given.base_model else None
    until = evaluations - (evaluations // 2 if learning else 0)
    if not given.hyperllama.learn:
        run.measure("the recipe as given", planned)
    for candidate in first:
        if run.used < until:
            run.candidate(candidate, given)
    scaled = sorted((c for c in run.means if c.has_scale), key=run.means.__getitem__)
    climbed = [run.climb(candidate, given, until) for candidate in scaled[:2]]
    if learning:
        ground = [c for c in climbed + scaled if c.method == "task_arithmetic"]
        if ground:
            best = min(ground, key=run.means.__getitem__)
            run.candidate(
                replace(
                    best,
                    learn=tuple((key, tuple(value) if key == "texts" else value) for key, value in learning.items()),
                ),
                given,
            )
    run.tried.sort(key=lambda entry: entry[0])
    mean, _, best_plan, learned, _ = run.tried[0]
    if not isfinite(mean):
        raise HyperLlamaError("no merge of these models has a finite loss on the development text")
    rows = [
        {"merge": name, "mean": mean, **{Path(text).stem: value for text, value in bits.items()}}
        if len({Path(text).stem for text in bits}) == len(bits)
        else {"merge": name, "mean": mean, **bits}
        for mean, name, _, _, bits in run.tried
    ]
    return Found(best_plan, learned, rows, run.flops, run.used)


def _learning(development: Development, texts: Sequence[str | Path], evaluations: int) -> dict[str, Any] | None:
    """Settings of `learn:` for what `evaluations` can pay, one of them for its measurement; None where that is no step."""
    if not texts:
        return None
    windows = 4 * len(texts)
    cost = windows * window_flops(development.model.config, development.seq_len)
    steps = min(24, (evaluations - 1) * development.flops // cost)
    if steps < 1:
        return None
    return {
        "texts": tuple(map(str, texts)),
        "by": "row",
        "steps": steps,
        "windows": windows,
        "seq_len": development.seq_len,
    }
