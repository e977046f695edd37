"""Forward and backward of a micro-batch: as it stands, compiled by torch, or replayed from a CUDA graph."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from hyperllama.model import Llama
from hyperllama.train.graphs import WARM_UP, record
from hyperllama.train.parallel import Replicas, Shards


class MicroStep:
    """Adds the gradients of a micro-batch to the arena and returns its loss, both times `loss_weight`.

    compiled: torch.compile makes the model's ops anew from their functional forms; gradients of a micro-batch are then rounded to
    the weights' dtype before they are added to the arena, and are complete only at its end: nothing is sent beside the backward.
    """

    def __init__(self, model: Llama, exchange: Replicas | Shards, z_loss: float, *, compiled: bool = False):
        self.model, self.exchange, self.z_loss, self.compiled = model, exchange, z_loss, compiled
        self.loss: Callable[..., Tensor] = torch.compile(model.loss) if compiled else model.loss

    def __call__(self, ids: Tensor, targets: Tensor, borders: Tensor | None, loss_weight: float) -> Tensor:
        """The loss of windows (B, T), detached."""
        if self.compiled:
            self.exchange.settle()
        loss = self.loss(ids, targets, loss_weight=loss_weight, cu_seqlens=borders, z_loss=self.z_loss)
        loss.backward()
        if self.compiled:
            self._collect()
        return loss.detach()

    def _collect(self) -> None:
        grads = self.model.arena.packed("grad")
        for name, weight in self.model.weights.items():
            if weight.grad is not None:
                grads[name].add_(weight.grad)
                weight.grad = None


class Graphed(MicroStep):
    """The same without the host: the kernels of a micro-batch, recorded once and launched as one.

    Recorded is the first shape and loss_weight that has come WARM_UP times before; replayed are micro-batches of these that have
    no borders of documents, whose number varies, while processes have nothing to say to each other; others run as they stand. Not
    yet run on a GPU.
    """

    def __init__(self, model: Llama, exchange: Replicas | Shards, z_loss: float):
        super().__init__(model, exchange, z_loss)
        self.seen: Counter[tuple[torch.Size, float]] = Counter()
        self.recorded = 0.0
        self.replay: Callable[[], None] | None = None

    def __call__(self, ids: Tensor, targets: Tensor, borders: Tensor | None, loss_weight: float) -> Tensor:
        """The loss of windows (B, T), detached."""
        if borders is not None or self.exchange.busy:
            return super().__call__(ids, targets, borders, loss_weight)
        if self.replay is None:
            self.seen[ids.shape, loss_weight] += 1
            if self.seen[ids.shape, loss_weight] <= WARM_UP:
                return super().__call__(ids, targets, borders, loss_weight)
            self.ids, self.targets, self.recorded = ids.clone(), targets.clone(), loss_weight
            self.replay = record(self._once)
        if ids.shape != self.ids.shape or loss_weight != self.recorded:
            return super().__call__(ids, targets, borders, loss_weight)
        self.ids.copy_(ids, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)
        self.replay()
        return self.last.clone()

    def _once(self) -> None:
        """What is recorded."""
        self.last = super().__call__(self.ids, self.targets, None, self.recorded)
