"""The update of a step, decided on the device: the gradient's norm, clip or skip, AdamW; as it stands, or as a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from hyperllama.arena import Arena
from hyperllama.config import OptimizerSettings
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.train.distributed import Processes
from hyperllama.train.graphs import WARM_UP, record
from hyperllama.train.groups import Groups
from hyperllama.train.parallel import whole_norm


class Update:
    """Updates what this process has of an arena from its summed gradients.

    updates: 0-dim int64 on the device, counts the steps that are not skipped; rounding: the key of bf16 masters, see adamw.py.
    """

    def __init__(
        self, arena: Arena, groups: Groups | None, settings: OptimizerSettings, updates: Tensor, mine: Processes,
        rounding: int | None,
    ):  # fmt: skip
        self.arena, self.groups, self.settings, self.mine = arena, groups, settings, mine
        self.updates, self.rounding = updates, rounding
        self.lr = torch.zeros((), device=mine.device)

    def __call__(self, loss: Tensor, lr: float) -> Tensor:
        """Take a step at the rate `lr`, or none where `loss` or the gradient is not finite; returns the norm, 0-dim."""
        self.lr.fill_(lr)
        return self._step(loss)

    def _step(self, loss: Tensor) -> Tensor:
        arena, groups, settings = self.arena, self.groups, self.settings
        grad = arena.own("grad")
        norm = grad_norm(grad, *((groups.of_line, groups.norm_weights) if groups else ()))
        norm = whole_norm(norm, arena, self.mine)
        clip = clip_or_skip(loss, norm, settings.clip_norm)
        self.updates += clip > 0
        adamw(
            arena.master,
            grad,
            arena.m,
            arena.v,
            arena.own("weights") if arena.rounds else None,
            lr=self.lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            step=self.updates,
            clip=clip,
            groups=groups.of_line if groups else None,
            scales=groups.scales if groups else None,
            rounding=self.rounding,
        )
        return norm


class GraphedUpdate(Update):
    """The same, its kernels launched as one after WARM_UP steps, where no other process has a say (`arena.whole`)."""

    seen = 0
    replay: Callable[[], None] | None = None

    def __call__(self, loss: Tensor, lr: float) -> Tensor:
        """As Update's."""
        self.seen += 1
        if self.seen <= WARM_UP or not self.arena.whole:
            return super().__call__(loss, lr)
        if self.replay is None:
            self.loss = loss.clone()
            self.replay = record(self._once)
        self.lr.fill_(lr)
        self.loss.copy_(loss)
        self.replay()
        return self.norm.clone()

    def _once(self) -> None:
        """What is recorded."""
        self.norm = self._step(self.loss)


def clip_or_skip(loss: Tensor, norm: Tensor, limit: float | None) -> Tensor:
    """What gradients are multiplied by, decided on the device: 0, with which adamw skips the step, when anything is not finite."""
    clip = torch.ones_like(norm) if limit is None else torch.clamp(limit / (norm + 1e-6), max=1.0)
    return torch.where(torch.isfinite(loss) & torch.isfinite(norm), clip, 0.0)
