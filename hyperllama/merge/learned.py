"""Merge weights found by gradient: `hyperllama: learn:`, a few steps of Adam on development text of all languages at once.

    theta(c) = b + sum_i c_i * e_i            e_i: what the recipe adds of model i, lambda w_i d_i, shares and normalize included
    loss(c)  = mean over texts of bits per byte of theta(c)
    dloss/dc_i = <dloss/dtheta, e_i>          over one tensor (by: tensor), or over each of its rows (by: row)

Every c begins at 1: the recipe as it stands. The gradient of theta is the trainer's own; what is learnt are a few numbers a
tensor or a row, so the result stays in the span of the models. Each step takes windows evenly from every text; the rate falls
linearly to 0 over the second half of the steps.
FLOPs: `steps` times `windows` training windows (dense), which the merge's ledger counts as spent. Memory: N + 5 models in fp32.
Source: Yang et al. 2024, "AdaMerging" (layer-wise coefficients by gradient; there of the predictions' entropy, here of the loss).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log
from typing import Any

import torch
from torch import Tensor

from hyperllama.arena import Arena
from hyperllama.data.text import iter_documents
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.folder import folder_start
from hyperllama.flops import window_flops
from hyperllama.hub import model_config
from hyperllama.kernels.merge import weighted
from hyperllama.merge.planner import Plan
from hyperllama.merge.steps import Step
from hyperllama.merge.tensors import effective_differences
from hyperllama.model import Llama

BETAS = (0.9, 0.95)
EPSILON = 1e-8


@dataclass(frozen=True)
class Learned:
    """Weights by output tensor, one tensor a model that broadcasts to the output's; the loss of every step; FLOPs."""

    weights: dict[str, list[Tensor]]
    losses: list[float]
    flops: int

    def tensor(self, step: Step, sources: Any) -> Tensor:
        """A step's tensor with its coefficients, in fp32."""
        base, differences = effective_differences(step, sources)
        ends = [base + difference for difference in differences]
        return weighted(base, ends, self.weights[step.name], normalize=False, out_dtype=torch.float32)

    def describe(self) -> dict[str, Any]:
        """For the merge's card: losses, FLOPs and, by tensor, each model's mean coefficient."""
        means = {name: [round(float(c.mean()), 4) for c in weights] for name, weights in self.weights.items()}
        losses = [round(loss, 4) for loss in self.losses]
        return {"learned": {"bits_per_byte": losses, "flops": self.flops, "coefficients": means}}


@dataclass(frozen=True)
class Text:
    """Windows (n, T + 1) of one text, and what one token of it weighs: bits per byte are nats per token times it."""

    windows: Tensor
    bits_per_byte: float


def read_texts(files: Sequence[str], tokenizer: Tokenizer, start: int, seq_len: int) -> list[Text]:
    """The windows of each file. Raises HyperLlamaError naming a file that is missing, bad or shorter than a window."""
    texts = []
    for file in files:
        documents = list(iter_documents([file]))
        encoded = tokenizer.encode_batch([document.text for document in documents])
        stream = torch.tensor([token for ids in encoded for token in (start, *ids)])
        count = len(stream) // (seq_len + 1)
        if not count:
            raise HyperLlamaError(
                f"{file} has {len(stream)} tokens, fewer than one window of {seq_len + 1} to learn on"
            )
        n_bytes = sum(document.num_bytes for document in documents)
        texts.append(Text(stream[: count * (seq_len + 1)].view(count, -1), sum(map(len, encoded)) / n_bytes / log(2)))
    return texts


class _Coefficients:
    """The coefficients of one tensor (N, 1) or (N, rows), and Adam's moments of them."""

    def __init__(self, models: int, rows: int):
        self.c = torch.ones(models, rows)
        self.m, self.v = torch.zeros_like(self.c), torch.zeros_like(self.c)

    def weights(self, dim: int) -> list[Tensor]:
        """One tensor a model, broadcasting to a tensor of `dim` dimensions."""
        return [c[:, None] if dim == 2 else c for c in self.c]

    def step(self, gradient: Tensor, rate: float, t: int) -> None:
        """One step of Adam."""
        self.m.lerp_(gradient, 1 - BETAS[0])
        self.v.lerp_(gradient.square(), 1 - BETAS[1])
        m, v = self.m / (1 - BETAS[0] ** t), self.v / (1 - BETAS[1] ** t)
        self.c -= rate * m / (v.sqrt() + EPSILON)


def _dots(gradient: Tensor, differences: Sequence[Tensor], rows: bool) -> Tensor:
    """Gradients of a tensor's coefficients, (N, 1) or (N, rows)."""
    products = torch.stack([gradient * difference for difference in differences])
    if not rows:
        return products.flatten(1).sum(1, keepdim=True)
    return products.sum(-1) if gradient.dim() == 2 else products


def learn(plan: Plan) -> Learned:
    """Learn the coefficients of a planned merge; a pure function of recipe, models and texts.

    Raises HyperLlamaError for bad texts, models without a tokenizer, and when the loss is not finite.
    """
    settings, folder = plan.recipe.hyperllama.learn, next(iter(plan.folders.values()))
    assert settings is not None  # what the plan asks for
    if plan.tokenizer_from is None:
        raise HyperLlamaError(f"{folder.path} has no tokenizer, which hyperllama.learn reads its texts with")
    tokenizer = Tokenizer.load(plan.tokenizer_from)
    config = model_config(plan.config, folder.path)
    seq_len = min(settings.seq_len or config.max_position_embeddings, config.max_position_embeddings)
    texts = read_texts(settings.texts, tokenizer, folder_start(folder.path, tokenizer), seq_len)
    per_text = -(-settings.windows // len(texts))
    # files hold the final norm divided by the head's factor, and so do the differences
    config = config.model_copy(update={"lm_head_normalization_factor": 1.0})
    arena = Arena(config, torch.float32, "cpu", training=True)
    model = Llama(config, arena)
    weights, gradients = arena.logical("weights"), arena.logical("grad")

    base, differences, coefficients = {}, {}, {}
    for step in plan.steps:
        base[step.name], differences[step.name] = effective_differences(step, plan.folders)
        coefficients[step.name] = _Coefficients(len(step.inputs), step.shape[0] if settings.by == "row" else 1)

    def place() -> None:
        for name, c in coefficients.items():
            target = weights[name].copy_(base[name])
            for weight, difference in zip(c.weights(target.dim()), differences[name], strict=True):
                target.addcmul_(weight, difference)

    generator = torch.Generator().manual_seed(settings.seed)
    losses = []
    for t in range(1, settings.steps + 1):
        place()
        arena.grad.zero_()
        total = 0.0
        for text in texts:
            chosen = text.windows[torch.randint(len(text.windows), (per_text,), generator=generator)]
            scale = text.bits_per_byte / (per_text * seq_len * len(texts))
            loss = model.loss(chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous(), loss_weight=scale)
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        if not isfinite(total):
            raise HyperLlamaError(f"the loss of the merged model is {total} in step {t} of learning: lower learn.rate")
        rate = settings.rate * min(1.0, 2 * (1 - (t - 1) / settings.steps))
        for name, c in coefficients.items():
            c.step(_dots(gradients[name], differences[name], settings.by == "row"), rate, t)
    flops = settings.steps * per_text * len(texts) * window_flops(config, seq_len)
    found = {step.name: coefficients[step.name].weights(len(step.shape)) for step in plan.steps}
    return Learned(found, losses, flops)
