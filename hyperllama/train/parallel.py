"""Data parallelism over the arena: how the gradients of several processes become one update.

    ddp      every process has the whole arena: gradients are summed, and all make the same update
    zero1    masters and moments are cut into a slice a process (Rajbhandari et al. 2020, arXiv 1910.02054): gradients are summed
             into their slice, a process updates its own and sends the weights to the others
    fsdp     weights and gradients too: a layer's weights come when the model needs them, forward and backward, and go again; its
             gradients are summed into their slice after every micro-batch

In all of them a process owns the same slice of the arena's addresses, so optimizer, norm, checkpoints and resuming know nothing of
the mode. Slices are contiguous: a layer belongs to one or two processes, which send it to all (broadcast) and sum it (reduce).

Communication runs beside the work: gradients while the backward is in the layers below (ddp, zero1: of the last micro-batch);
updated weights while the next forward is in the layers before; with fsdp the next layer while the model is in one.
Collectives are torch.distributed's.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from hyperllama.arena import ALIGNMENT, Arena, Role, Unit
from hyperllama.grow.operators import Operator, TensorMap
from hyperllama.grow.tensors import Kind, grow_tensor
from hyperllama.names import logical_tensors
from hyperllama.train.distributed import Processes

Works = list[dist.Work]


def exchange(arena: Arena, mine: Processes) -> "Replicas | Shards":
    """What goes between the processes of a run that have the arena whole, in slices, or sharded."""
    return Shards(arena, mine) if arena.sharded else Replicas(arena, mine)


class Replicas:
    """ddp and zero1: every process has all weights. Whoever reads them outside the model waits for them (`settle`) first.

    `last`: this is the last micro-batch of a step, whose backward completes the gradients.
    """

    needs_all = False  # whether all processes have to run equally many micro-batches

    @property
    def busy(self) -> bool:
        """Whether something is sent or comes while the next micro-batch runs."""
        return self.mine.world > 1 and (self.last or bool(self.coming))

    def __init__(self, arena: Arena, mine: Processes):
        self.arena, self.mine, self.last = arena, mine, False
        starts = [arena.offsets[f"layers.{i}.attn_norm"] for i in range(arena.config.num_layers)]
        self.borders = [0, *starts, arena.offsets["norm"], arena.size]  # of the embedding, the layers, what follows
        self.layer = arena.config.num_layers  # gradients are summed, or being summed, from there on
        self.sums: Works = []
        self.coming: list[Works] = []  # updated weights on their way, first to last

    def forward_reaches(self, layer: int) -> None:
        """Wait for the weights of `layer` and of those before it."""
        while self.coming and len(self.borders) - 1 - len(self.coming) <= layer + 1:
            _wait(self.coming.pop(0))

    def backward_left(self, layer: int) -> None:
        """Start to sum the gradients of `layer` and of what lies behind it, when they are complete."""
        if self.last and layer < self.layer:
            self._sum(layer)

    def finish(self) -> None:
        """Start what is left and wait for all sums. The pieces are the same for a process that had no window."""
        self.settle()  # a process without a window has not waited, and weights are about to be written
        for layer in reversed(range(-1, self.layer)):
            self._sum(layer)
        _wait(self.sums)
        self.layer = self.arena.config.num_layers

    def send(self) -> None:
        """zero1: send every process the weights that this one has updated, in the order in which the forward needs them."""
        self.settle()
        if not self.arena.whole:
            self.coming = [
                [_broadcast(self.arena.weights[low:high], owner) for owner, low, high in _owned(self.arena, *borders)]
                for borders in pairwise(self.borders)
            ]

    def settle(self) -> None:
        """Wait until all weights are up to date."""
        self.forward_reaches(self.arena.config.num_layers)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under their Hugging Face names; all processes ask together."""
        self.settle()
        yield from self.arena.logical("weights").items()

    def _sum(self, layer: int) -> None:
        """Start to sum what lies between `layer` and where the sums have come."""
        end = self.arena.size if self.layer == self.arena.config.num_layers else self.borders[self.layer + 1]
        self.layer = layer
        self._start(self.borders[layer + 1], end)

    def _start(self, begin: int, end: int) -> None:
        """Sum the elements from `begin` to `end`: everywhere (ddp), or where their slice is (zero1)."""
        if self.mine.world > 1 and self.arena.whole:
            self.sums.append(dist.all_reduce(self.arena.grad[begin:end], async_op=True))
        elif self.mine.world > 1:
            self.sums += [
                _reduce(self.arena.grad[low:high], owner) for owner, low, high in _owned(self.arena, begin, end)
            ]


class Shards:
    """fsdp: a process has its slice of everything, and of the layers only those near where the model is.

    The embedding, the last norm and the head are everywhere, as both ends of the model use a tied table: 6 bytes a parameter.
    """

    needs_all = busy = True

    def __init__(self, arena: Arena, mine: Processes):
        self.arena, self.mine, self.last = arena, mine, False
        self.layers = arena.config.num_layers
        self.ends = (arena.units[0], arena.units[-1])
        self.coming: dict[int, Works] = {}  # layers that are here or on their way
        self.sending: tuple[Unit, Works] | None = None  # gradients that are being summed

    def forward_reaches(self, layer: int) -> None:
        """Wait for the weights of `layer`, and send for those of the next."""
        if layer < 0:
            self._hold(0)
        elif layer < self.layers:
            self._hold(layer, layer + 1)
        else:  # the backward, if there is one, begins with the last
            self._hold(self.layers - 1)

    def backward_left(self, layer: int) -> None:
        """Sum the gradients of `layer`, make room for those of the one before, and send for the weights of one more."""
        self._collect()
        if layer < self.layers:
            unit = self.arena.units[layer + 1]
            self.sending = unit, self._summed(unit)
        if layer > 0:
            self._hold(layer - 1, layer - 2)
            self.arena.units[layer].take("grad").zero_()
        else:
            self._hold()

    def finish(self) -> None:
        """Wait for all sums, of both ends too."""
        self._collect()
        for unit in self.ends:
            _wait(self._summed(unit))
            self._add(unit)

    def send(self) -> None:
        """Renew what is everywhere; layers come when they are needed."""
        self._hold()
        for unit in self.ends:
            _wait(self._gathered(unit))

    def settle(self) -> None:
        """Nothing is on its way between steps."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under their Hugging Face names, a layer at a time; all processes ask together, to the end."""
        views, units = self.arena.logical("weights"), self.arena.units
        for tensor in logical_tensors(self.arena.config):
            inside = [
                i for i, unit in enumerate(units[1:-1]) if unit.start <= self.arena.offsets[tensor.packed] < unit.stop
            ]
            self._hold(*inside)
            yield tensor.name, views[tensor.name]
        self._hold()

    def _hold(self, *layers: int) -> None:
        """Have the weights of these layers alone: the first now, the others when they come."""
        for layer in [layer for layer in self.coming if layer not in layers]:
            _wait(self.coming.pop(layer))  # one that nobody wanted in the end
            self.arena.units[layer + 1].give_back("weights")
        for layer in layers:
            if layer not in self.coming and 0 <= layer < self.layers:
                self.coming[layer] = self._gathered(self.arena.units[layer + 1])
        if layers:
            _wait(self.coming[layers[0]])

    def _gathered(self, unit: Unit) -> Works:
        """Start to bring a unit's weights together."""
        whole, own, span = unit.take("weights"), self.arena.weights, self.arena.span
        works = []
        for owner, low, high in _owned(self.arena, unit.start, unit.stop):
            part = whole[low - unit.start : high - unit.start]
            if owner == self.mine.rank:
                part.copy_(own[low - span.start : high - span.start])
            works.append(_broadcast(part, owner))
        return works

    def _summed(self, unit: Unit) -> Works:
        """Start to sum a unit's gradients at their owners."""
        return [
            _reduce(unit.grad[low - unit.start : high - unit.start], owner)
            for owner, low, high in _owned(self.arena, unit.start, unit.stop)
        ]

    def _collect(self) -> None:
        """Wait for the sums that were started, keep what is this process's, and free the rest."""
        if self.sending is not None:
            unit, works = self.sending
            _wait(works)
            self._add(unit)
            unit.give_back("grad")
            self.sending = None

    def _add(self, unit: Unit) -> None:
        for owner, low, high in _owned(self.arena, unit.start, unit.stop):
            if owner == self.mine.rank:
                first = self.arena.span.start
                self.arena.grad[low - first : high - first] += unit.grad[low - unit.start : high - unit.start]


def _owned(arena: Arena, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The elements from `start` to `stop` by the process that owns them: (rank, from, to)."""
    own = arena.size // arena.world
    for rank in range(start // own, -(-stop // own)):
        yield rank, max(start, rank * own), min(stop, (rank + 1) * own)


def _broadcast(part: Tensor, owner: int) -> dist.Work:
    return dist.broadcast(part, owner, async_op=True)


def _reduce(part: Tensor, owner: int) -> dist.Work:
    return dist.reduce(part, owner, async_op=True)


def _wait(works: Works) -> None:
    """Wait for collectives, once."""
    for work in works:
        work.wait()
    works.clear()


def whole_norm(norm: Tensor, arena: Arena, mine: Processes) -> Tensor:
    """The norm of the whole gradient from that of this process's slice."""
    return norm if arena.whole else mine.sum_(norm.double().square()).sqrt().to(norm.dtype)


@torch.no_grad()
def grow_slices(small: Arena, large: Arena, operator: Operator, mine: Processes) -> None:
    """zero1: grow_arena where every process has a slice of the masters and moments.

    Tensor by tensor: all processes get the small one, grow it, and keep what is in their slice. The small slices lie apart. Extra
    memory is one grown tensor and its small one.
    """
    maps = operator.tensors(small.config)
    before = {key: list(parts) for key, parts in groupby(logical_tensors(small.config), lambda tensor: tensor.packed)}
    roles: list[tuple[Role, Kind]] = [("master" if small.rounds else "weights", "weights"), ("m", "m"), ("v", "v")]
    for packed, parts in groupby(logical_tensors(large.config), lambda tensor: tensor.packed):
        hows = {tensor.name: maps[tensor.name] for tensor in parts}
        for role, kind in roles:
            old = small.packed("weights")[packed] if role == "weights" else _collected(small, role, packed, mine)
            sources = {tensor.name: old[tensor.start : tensor.start + tensor.shape[0]] for tensor in before[packed]}
            _grow_packed(hows, sources, large, packed, role, kind)


def _grow_packed(
    hows: dict[str, TensorMap], sources: dict[str, Tensor], large: Arena, packed: str, role: Role, kind: Kind
) -> None:
    """Grow the tensors of one packed tensor into the weights, and into what this process has of `role`: all are read first."""
    grown = [grow_tensor(name, how, sources.__getitem__, kind).flatten() for name, how in hows.items()]
    lines, at, span = large.line_range(packed), large.offsets[packed], large.span
    if kind == "weights":  # the padding too: a source may have been there
        large.weights[lines.start * ALIGNMENT : lines.stop * ALIGNMENT].zero_()
    for part in grown:
        end = at + len(part)
        if kind == "weights":
            large.weights[at:end].copy_(part)
        low, high = max(at, span.start), min(end, span.stop)
        if role != "weights" and low < high:
            buffer: Tensor = getattr(large, role)
            buffer[low - span.start : high - span.start].copy_(part[low - at : high - at])
        at = end


def _collected(arena: Arena, role: Role, packed: str, mine: Processes) -> Tensor:
    """A packed tensor of a sliced role, from the processes that have its parts."""
    shape, first = arena.shapes[packed], arena.offsets[packed]
    whole = torch.zeros(shape, dtype=arena.grad.dtype, device=arena.grad.device)
    flat, buffer = whole.view(-1), getattr(arena, role)
    low, high = max(first, arena.span.start), min(first + len(flat), arena.span.stop)
    if low < high:
        flat[low - first : high - first].copy_(buffer[low - arena.span.start : high - arena.span.start])
    return mine.sum_(whole)  # all but one of the terms are zeros
