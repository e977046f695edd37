"""RegMean: linear layers merged by least squares on the models' own inputs; `hyperllama: regmean:`, one text a model.

    W = argmin sum_i w_i / n_i ||X_i W^T - X_i W_i^T||^2 = R + (sum_i w_i (W_i - R) G_i) (sum_i w_i G_i)^-1

X_i (n_i, K): what the layer reads in model i on its text; G_i = X_i^T X_i / n_i, off-diagonal elements times `off_diagonal`, as in
the paper. R may be anything: with the first model's weight the products are of small differences. Inputs that no model uses would
leave the inverse open: RIDGE of each G_i's mean diagonal is added to its diagonal, which pulls them to the plain mean. Under
task_arithmetic the result is base + lambda (W - base). Embedding, norms and a tied head are merged by the recipe's method.
FLOPs: a forward pass of every model on its windows, and the products and solutions above. Memory, fp32: two models, what the linear
layers moved, one model's G_i, the sums of G_i, and those once more in fp64.
Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hyperllama.arena import Arena
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.folder import folder_start
from hyperllama.flops import window_flops
from hyperllama.hub import model_config, read_weights
from hyperllama.merge.learned import read_texts
from hyperllama.merge.methods import Call
from hyperllama.merge.planner import Plan
from hyperllama.merge.steps import Step
from hyperllama.model import Llama
from hyperllama.names import logical_tensors

RIDGE = 1e-6
BATCH = 8  # windows in a forward pass


@dataclass(frozen=True)
class RegMean:
    """The merged linear layers by output tensor, fp32; FLOPs; windows read of each model's text."""

    weights: dict[str, Tensor]
    flops: int
    windows: dict[str, int]

    def tensor(self, step: Step, sources: Any) -> Tensor | None:
        """A step's tensor where it was solved for, in fp32."""
        return self.weights.get(step.name)

    def describe(self) -> dict[str, Any]:
        """For the merge's card."""
        return {"regmean": {"windows": self.windows, "flops": self.flops}}


class _Inputs(TorchFunctionMode):
    """Sums X^T X over the inputs X of every linear layer whose weight is known by its address."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self._names = {weight.data_ptr(): name for name, weight in weights.items()}
        self.sums = {name: torch.zeros(weight.shape[1], weight.shape[1]) for name, weight in weights.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and args[1].data_ptr() in self._names:
            rows = args[0].flatten(0, -2)
            self.sums[self._names[args[1].data_ptr()]].addmm_(rows.t(), rows)
        return func(*args, **(kwargs or {}))


def _mean(gram: Tensor, tokens: int, off_diagonal: float) -> Tensor:
    """G_i, in place."""
    diagonal = gram.diagonal() / tokens
    gram *= off_diagonal / tokens
    gram.diagonal().copy_(diagonal + RIDGE * diagonal.mean())
    return gram


def solve(first: Tensor, moved: Tensor, factor: Tensor) -> Tensor:
    """R + moved gram^-1, fp64 inside, fp32: R and moved (N, K), factor (K, K) the Cholesky factor of gram in fp64."""
    return (first.double() + torch.cholesky_solve(moved.double().t(), factor).t()).float()


@torch.no_grad()
def regmean(plan: Plan) -> RegMean:
    """Solve for the linear layers of a planned merge; a pure function of recipe, models and texts.

    Raises HyperLlamaError for bad texts, models without a tokenizer, and inputs of a layer that are not finite.
    """
    settings = plan.recipe.hyperllama.regmean
    assert settings is not None  # what the plan asks for
    labels = [read.model for read in plan.steps[0].inputs]
    folder = plan.folders[labels[0]].path
    if plan.tokenizer_from is None:
        raise HyperLlamaError(f"{folder} has no tokenizer, which hyperllama.regmean reads its texts with")
    tokenizer = Tokenizer.load(plan.tokenizer_from)
    # files hold the final norm divided by the head's factor
    config = model_config(plan.config, folder).model_copy(update={"lm_head_normalization_factor": 1.0})
    seq_len = min(settings.seq_len or config.max_position_embeddings, config.max_position_embeddings)
    texts = read_texts(settings.texts, tokenizer, folder_start(folder, tokenizer), seq_len)
    arena = Arena(config, torch.float32, "cpu", training=False)
    model, views = Llama(config, arena), arena.logical("weights")
    packed = {tensor.name: tensor.packed for tensor in logical_tensors(config)}
    layers = {name: weight for name, weight in arena.packed("weights").items() if weight.dim() == 2 and name != "embed"}
    steps = [step for step in plan.steps if packed[step.name] in layers]

    def key(step: Step) -> tuple[str, tuple[float, ...]]:
        """What has one sum of G_i: an input, and weights."""
        assert isinstance(step.call, Call)
        return packed[step.name], step.call.weights

    first: dict[str, Tensor] = {}
    moved = {step.name: torch.zeros_like(views[step.name]) for step in steps}
    totals = {key(step): torch.zeros(step.shape[1], step.shape[1]) for step in steps}
    flops, counts = 0, {}
    for i, (label, text) in enumerate(zip(labels, texts, strict=True)):
        read_weights(plan.folders[label], config, views)
        order = torch.randperm(len(text.windows), generator=torch.Generator().manual_seed(settings.seed))
        chosen = text.windows[order[: settings.windows], :-1]
        with _Inputs(layers) as inputs:
            for windows in chosen.split(BATCH):
                model(windows.contiguous())
        flops += len(chosen) * window_flops(config, seq_len) // 3
        counts[label] = len(chosen)
        grams = {name: _mean(gram, chosen.numel(), settings.off_diagonal) for name, gram in inputs.sums.items()}
        if bad := [name for name, gram in grams.items() if not torch.isfinite(gram).all()]:
            raise HyperLlamaError(f"{label} on {settings.texts[i]}: the inputs of {bad[0]} have NaN or infinity")
        flops += sum(2 * gram.numel() * chosen.numel() for gram in grams.values())
        first = first or {step.name: views[step.name].clone() for step in steps}
        for (name, weights), total in totals.items():
            total.add_(grams[name], alpha=weights[i])
        for step in steps:
            name, weights = key(step)
            moved[step.name].addmm_(views[step.name] - first[step.name], grams[name], alpha=weights[i])
            flops += 2 * grams[name].numel() * step.shape[0]

    factors = {which: torch.linalg.cholesky(total.double()) for which, total in totals.items()}
    solved = {}
    for step in steps:
        solved[step.name] = solve(first.pop(step.name), moved.pop(step.name), factors[key(step)])
        if step.base is not None:
            assert isinstance(step.call, Call)
            base = plan.folders[step.base.model].tensor(step.base.tensor).float()
            solved[step.name] = base.lerp(solved[step.name], step.call.lam)
        flops += 4 * step.shape[0] * step.shape[1] ** 2
    return RegMean(solved, flops + sum(len(factor) ** 3 // 3 for factor in factors.values()), counts)
