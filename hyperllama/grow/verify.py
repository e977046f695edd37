"""Whether a grown model computes the small one's function: by its weights, all of them, and by logits on random tokens.

Copies of a unit have equal values, so a consumer sees of its weights only their sum over the copies: the function is kept when for
every tensor, row i and old column c

    sum_{j: cols[j] = c} W'[i, j] = W[rows[i], c]        the embedding, whose columns are outputs: W'[i, j] = W[rows[i], cols[j]]

and every gain is the old one times factor and share. That needs no second model in memory and sees every weight, where logits see a
few tokens; logits see the program too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hyperllama.errors import HyperLlamaError
from hyperllama.grow.operators import GrowVocabulary, Operator, TensorMap

if TYPE_CHECKING:
    from hyperllama.grow.operators import Array
    from hyperllama.model import Llama

CHUNK = 1 << 20  # elements of the grown tensor that are widened at a time
SMALL = 1e-6  # of the largest weight: a few roundings of fp32
FLOOR = {"float16": 2.0**-20}  # what halves of subnormal numbers lose; with other formats next to nothing


class Gap(NamedTuple):
    """The largest difference to what the weights should sum to, and the largest weight of the tensor."""

    difference: float
    largest: float

    def within(self, dtype: str) -> bool:
        """Whether the difference is none but for a few roundings."""
        return self.difference <= SMALL * self.largest + FLOOR.get(dtype, 1e-37)


def gap(how: TensorMap, source: "Array", grown: "Array") -> Gap:
    """The gap of one tensor in fp64, a few rows at a time; arrays of any float dtype. `how.upper` is not looked at."""
    import numpy as np

    rows = how.rows.index() if how.pieces is None else np.arange(len(how.rows))
    source, grown = source.reshape(len(source), -1), grown.reshape(len(grown), -1)
    if how.pieces is not None:
        single = np.array([(i, ids[0]) for i, ids in enumerate(how.pieces) if len(ids) == 1], np.int64).reshape(-1, 2)
        rows, grown = single[:, 1], grown[single[:, 0]]
    cols = np.arange(source.shape[1]) if how.cols is None or how.pieces is not None else how.cols.index()
    gains = np.ones(len(rows)) if how.gain is None else how.gain * how.rows.share()
    order, starts = np.argsort(cols, kind="stable"), np.searchsorted(np.sort(cols), np.arange(source.shape[1]))
    difference = largest = 0.0
    step = max(1, CHUNK // max(1, grown.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        wanted, found = source[rows[part]].astype(np.float64), grown[part].astype(np.float64)
        largest = max(largest, float(np.abs(wanted).max(initial=0)))
        if how.zero:
            wanted = np.zeros_like(wanted)
        elif how.outputs:
            wanted = wanted[:, cols]
        if not how.outputs:
            found = np.add.reduceat(found[:, order], starts, axis=1)
        difference = max(difference, float(np.abs(found - wanted * gains[part, None]).max(initial=0)))
    return Gap(difference, largest)


def report(gaps: Sequence[Gap], operators: Sequence[Operator], dtype: str) -> dict[str, Any]:
    """What the gaps of all tensors say.

    `claimed`: whether the operators keep the function; where they don't only finite weights were checked. `rounded`: whether they
    round weights, which moves the logits of a model in 16 bits. `preserved`: every tensor's difference is none but for a few
    roundings of fp32; `max_difference` is the largest one over the largest weight of its tensor.
    """
    claimed = all(operator.preserves for operator in operators)
    return {
        "tensors": len(gaps),
        "claimed": claimed,
        "rounded": not all(operator.exact for operator in operators),
        "max_difference": max((g.difference / g.largest for g in gaps if g.largest > 0), default=0.0),
        "preserved": claimed and all(g.within(dtype) for g in gaps),
    }


def compare_logits(
    small: "Llama", large: "Llama", operators: Sequence[Operator], *, windows: int = 2, seq_len: int = 64
) -> dict[str, Any]:
    """Compare the logits of both models on random tokens that both know, weights as stored, arithmetic in fp32.

    `preserved`: a largest difference of at most 1e-4 of the largest logit, a few hundred roundings of fp32.
    """
    import torch

    config = small.config
    seq_len = min(seq_len, config.max_position_embeddings)
    before = after = torch.arange(config.unpadded_vocab_size or config.vocab_size)
    for operator in operators:
        if isinstance(operator, GrowVocabulary):
            new_id = {ids[0]: i for i, ids in enumerate(operator.pieces) if len(ids) == 1}
            kept = torch.tensor([int(i) in new_id for i in after])
            before = before[kept]
            after = torch.tensor([new_id[int(i)] for i in after[kept]], dtype=torch.int64)
    if not len(before):
        raise HyperLlamaError("the new vocabulary keeps no token of the old one: there are no logits to compare")
    drawn = torch.randint(len(before), (windows, seq_len), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [
            model.logits(model(tokens[drawn]))[..., tokens]
            for model, tokens in ((_fp32(small), before), (_fp32(large), after))
        ]
    difference, largest = float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())
    return {
        "tokens": drawn.numel(),
        "max_logit_difference": difference,
        "max_logit": largest,
        "preserved": difference <= 1e-4 * max(largest, 1e-3),
    }


def _fp32(model: "Llama") -> "Llama":
    import torch

    from hyperllama.arena import Arena
    from hyperllama.model import Llama

    if model.arena.dtype == torch.float32:
        return model
    arena = Arena(model.config, torch.float32, "cpu", training=False)
    arena.weights.copy_(model.arena.weights)
    return Llama(model.config, arena)
