"""Minimal pairs (Warstadt et al. 2020, arXiv 1912.00582): is the good sentence more likely than the bad one?

A file has one object a line: {"good": ..., "bad": ..., "phenomenon": ...}; other keys are ignored. A sentence's
log-probability is the sum over all its tokens after the start token, without an end token: see score.py. The good
sentence's must be strictly greater; a tie counts one half. What is compared:

    sentence    the sum over the sentence
    word        the sum up to the end of the words that differ: what follows them has no say
    length      the sum over the sentence per character, as lm-eval's acc_norm

Equal sentences are computed once, and batches hold sentences of like length: see score.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.rows import read_rows
from hyperllama.evaluate.score import score, start_token, window_length
from hyperllama.evaluate.statistics import wilson
from hyperllama.model import Llama

WAYS = ("sentence", "word", "length")


class Pair(NamedTuple):
    """One line of a file of minimal pairs."""

    good: str
    bad: str
    phenomenon: str


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a file of minimal pairs.

    Raises HyperLlamaError naming the file when it is missing or empty, and the line when it is not such an object or
    its sentences are the same.
    """
    pairs = []
    for where, texts in read_rows(path, Pair._fields):
        pair = Pair(*texts)
        if pair.good == pair.bad:
            raise HyperLlamaError(f"{where}: the good and the bad sentence are the same")
        pairs.append(pair)
    return pairs


def check_way(by: str) -> None:
    """Raise HyperLlamaError unless pairs can be compared so."""
    if by not in WAYS:
        raise HyperLlamaError(f"minimal pairs are compared by {', '.join(WAYS)}, not by {by!r}")


def up_to_the_difference(good: str, bad: str) -> tuple[str, str]:
    """Both sentences up to the end of the words in which they differ (where one only lacks words, and one word more)."""
    words = [[match.span() for match in re.finditer(r"\S+", text)] for text in (good, bad)]
    texts = [[text[begin:end] for begin, end in spans] for text, spans in zip((good, bad), words, strict=True)]
    shorter = min(map(len, texts))
    prefix = next((i for i in range(shorter) if texts[0][i] != texts[1][i]), shorter)
    suffix = next((i for i in range(shorter - prefix) if texts[0][-1 - i] != texts[1][-1 - i]), shorter - prefix)
    if suffix and suffix == shorter - prefix:
        suffix -= 1
    ends = [len(spans) - suffix for spans in words]
    cut = [text[: spans[end - 1][1]] if end else "" for text, spans, end in zip((good, bad), words, ends, strict=True)]
    return (cut[0], cut[1]) if cut[0] != cut[1] else (good, bad)  # they differ in white space


@dataclass(frozen=True)
class PairScores:
    """The answers to a file of minimal pairs: 1 right, 0 wrong, 0.5 a tie, (pairs,)."""

    pairs: list[Pair]
    points: np.ndarray
    flops: int

    def summary(self) -> dict[str, Any]:
        """{pairs, accuracy, interval, by_phenomenon: {name: {pairs, accuracy, interval}}, flops}; intervals are Wilson's, 95 %."""
        groups = self.by_phenomenon()
        return {
            **_summary(self.points),
            "by_phenomenon": {name: _summary(self.points[rows]) for name, rows in groups.items()},
            "flops": self.flops,
        }

    def by_phenomenon(self) -> dict[str, list[int]]:
        """Numbers of the pairs of each phenomenon."""
        rows: dict[str, list[int]] = {}
        for number, pair in enumerate(self.pairs):
            rows.setdefault(pair.phenomenon, []).append(number)
        return dict(sorted(rows.items()))


def evaluate_pairs(model: Llama, tokenizer: Tokenizer, path: str | Path, **options: Any) -> dict[str, Any]:
    """Score a file of minimal pairs: see PairScores.summary; arguments and errors as in score_pairs."""
    return score_pairs(model, tokenizer, path, **options).summary()


def score_pairs(
    model: Llama,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    by: str = "sentence",
    start: int | None = None,
    seq_len: int | None = None,
) -> PairScores:
    """Score a file of minimal pairs by sentence, word or length; other arguments as in score_text.

    Raises HyperLlamaError for a bad file, a window the model can't take, and a loss that is not finite.
    """
    check_way(by)
    pairs = read_pairs(path)
    cut = up_to_the_difference if by == "word" else lambda good, bad: (good, bad)
    sentences = [sentence for pair in pairs for sentence in cut(pair.good, pair.bad)]
    scored = score(
        model,
        tokenizer.encode_batch(sentences),
        start=start_token(tokenizer) if start is None else start,
        seq_len=window_length(model, seq_len),
    )
    nll = np.array(scored.nll)
    if by == "length":
        nll /= [len(sentence) for sentence in sentences]
    good, bad = nll[::2], nll[1::2]
    return PairScores(pairs, np.where(good == bad, 0.5, good < bad), scored.flops)


def _summary(points: np.ndarray) -> dict[str, Any]:
    total = float(points.sum())
    return {"pairs": len(points), "accuracy": total / len(points), "interval": list(wilson(total, len(points)))}
