"""Operators applied to tensors: one at a time, from names or from an arena into another. See operators.py for the formulas.

Tiles of equal shares take the `grow` op, everything else `remap`. Masters are grown and the weights rounded from them, as every
optimizer step does: paired noise keeps its exact sums in the masters' format.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from hyperllama.arena import ALIGNMENT, Arena, Role
from hyperllama.errors import HyperLlamaError
from hyperllama.grow.operators import Operator, TensorMap
from hyperllama.kernels.backend import wide
from hyperllama.kernels.grow import grow, remap
from hyperllama.kernels.raw import noise_key
from hyperllama.names import logical_tensors

if TYPE_CHECKING:
    from hyperllama.grow.operators import Array

Read = Callable[[str], Tensor]
Check = Callable[[TensorMap, Tensor, Tensor], None]
Kind = Literal["weights", "m", "v"]


def grow_tensor(name: str, how: TensorMap, read: Read, kind: Kind = "weights") -> Tensor:
    """The grown tensor `name` from the old ones that `read` gives by name; the dtype is kept.

    kind: weights (or masters), or the moment m or v, which is multiplied by the gradient's factor or its square.
    """
    source = read(how.source)
    if how.zero or (how.fresh and kind != "weights"):
        return torch.zeros_like(source)
    if how.pieces is not None:
        return _means(source, how.pieces, len(how.rows), kind)
    if kind != "weights":
        rows, cols = how.gradient_factors()
        power = 1 if kind == "m" else 2
        return _gather(how, source, read, rows**power, None if cols is None else cols**power)
    cols = how.lr_factors()
    if how.gain is not None:
        return _gather(how, source, read, how.gain * how.rows.share(), None)
    if how.upper is None and how.rows.even_tiles and (how.cols is None or how.cols.even_tiles):
        if how.outputs:
            return source.repeat(how.rows.copies, how.cols.copies if how.cols else 1)
        copies = how.cols.copies if how.cols else 1
        return grow(source, how.rows.copies, copies, noise_db=how.noise_db, key=noise_key(how.seed, name))
    return _gather(how, source, read, np.ones(len(how.rows)), cols)


def grow_through(
    maps: Sequence[dict[str, TensorMap]], name: str, read: Read, check: Check | None = None, kind: Kind = "weights"
) -> Tensor:
    """The tensor `name` after several operators in turn; `maps` are theirs, first to last, `read` gives the old tensors.

    check: called with every map, the tensor it was applied to and the one that came out.
    """
    if not maps:
        return read(name)
    *before, last = maps
    sources: dict[str, Tensor] = {}

    def old(source: str) -> Tensor:
        sources[source] = grow_through(before, source, read, check, kind)
        return sources[source]

    grown = grow_tensor(name, last[name], old, kind)
    if check is not None:
        check(last[name], sources[last[name].source], grown)
    return grown


@torch.no_grad()
def grow_arena(small: Arena, large: Arena, operator: Operator) -> None:
    """Grow weights and, where both arenas train, masters and moments from one arena into another, a tensor at a time.

    Extra memory is one grown tensor, Q, K, V or gate, up together (aki: two). `small` may be the tail of `large`: written front to
    back, a tensor ends before the sources of those behind it begin, as long as none of them shrinks. The step count is the
    caller's and goes on, bias corrections with it: moments that start at zero (inserted layers, new tokens) take
    (1 - b1)/sqrt(1 - b2) of a full first step, 0.45 with the defaults.
    Raises HyperLlamaError when `large` is not of the operator's shape, the arenas' dtypes differ, or it can't be done in place.
    """
    if large.config != operator.grown(small.config) or large.dtype != small.dtype:
        raise HyperLlamaError(f"the arena to grow into does not have the dtype and shape that {operator.method} gives")
    if _share_memory(small, large) and not _clear_of_sources(small, large):
        raise HyperLlamaError(
            f"{operator.method} does not grow this shape in place: a tensor would meet another's source"
        )
    training = small.training and large.training
    roles: list[tuple[Role, Kind]] = (
        [("master", "weights"), ("m", "m"), ("v", "v")] if training else [("weights", "weights")]
    )
    views = {role: (small.logical(role), large.logical(role)) for role, _ in roles}
    maps = operator.tensors(small.config)
    for packed, parts in groupby(logical_tensors(large.config), lambda tensor: tensor.packed):
        hows, lines = {tensor.name: maps[tensor.name] for tensor in parts}, large.line_range(packed)
        for role, kind in roles:
            buffer: Tensor = getattr(large, role)
            _grow_packed(hows, *views[role], kind, buffer[lines.start * ALIGNMENT : lines.stop * ALIGNMENT])
    if training and large.rounds:
        large.weights.copy_(large.master)
    elif large.training and not training:
        large.master_from_weights()


def _grow_packed(
    hows: dict[str, TensorMap], sources: dict[str, Tensor], targets: dict[str, Tensor], kind: Kind, lines: Tensor
) -> None:
    """Grow the tensors of one packed tensor, in `lines` with the padding behind it: all are read before one is written."""
    grown = {name: grow_tensor(name, how, sources.__getitem__, kind) for name, how in hows.items()}
    lines.zero_()  # the padding: a source may have been there
    for name, tensor in grown.items():
        targets[name].copy_(tensor)


def _share_memory(small: Arena, large: Arena) -> bool:
    return small.weights.untyped_storage().data_ptr() == large.weights.untyped_storage().data_ptr()


def _clear_of_sources(small: Arena, large: Arena) -> bool:
    """Whether every packed tensor of `large` ends before the source of the next in its tail starts."""
    if list(small.shapes) != list(large.shapes):
        return False
    starts = [large.size - small.size + offset for offset in small.offsets.values()]
    ends = [large.line_range(name).stop * ALIGNMENT for name in large.shapes]
    return all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def _gather(how: TensorMap, source: Tensor, read: Read, row_scale: "Array", col_scale: "Array | None") -> Tensor:
    """Rows and columns by index, times their scales; new rows come from `how.upper` where there is one."""
    dtype, device = wide(source.dtype), source.device
    index = torch.from_numpy(how.rows.index()).to(device)
    uniform = bool((row_scale == row_scale[:1]).all()) and len(row_scale) > 0
    if how.cols is None:
        return (source[index].to(dtype) * torch.from_numpy(row_scale).to(device, dtype)).to(source.dtype)
    assert col_scale is not None
    cols = torch.from_numpy(how.cols.index()).to(device)
    scale = torch.from_numpy(col_scale * row_scale[0] if uniform else col_scale).to(device, dtype)
    if how.upper is None:
        out = remap(source, index, cols, scale)
    else:
        old = source.shape[0]
        out = torch.cat([remap(source, index[:old], cols, scale), remap(read(how.upper), index[old:], cols, scale)])
    return out if uniform else out.mul_(torch.from_numpy(row_scale).to(device, dtype)[:, None])


def _means(source: Tensor, pieces: tuple[tuple[int, ...], ...], rows: int, kind: Kind) -> Tensor:
    """Row i is the mean of the rows pieces[i], in fp32 (fp64), rounded once; moments only where there is one piece."""
    out = source.new_zeros(rows, source.shape[1])
    single = [i for i, ids in enumerate(pieces) if len(ids) == 1]
    out[single] = source[[pieces[i][0] for i in single]]
    if kind == "weights":
        for i, ids in enumerate(pieces):
            if len(ids) > 1:
                out[i] = source[list(ids)].to(wide(source.dtype)).mean(0)
    return out
