"""How likely a model finds a sequence: every token is scored exactly once, given what stands before it.

A sequence is tokenised alone and stands after a start token, which is context and not scored; no end token is scored.
In training a document follows the EOS of the one before, so EOS is the start, unless a model's config.json names a BOS.

A sequence longer than the window of W tokens is scored in windows that overlap by W // 2. The tokens of the overlap
were scored before and are context here: every token beyond the first window sees at least the W // 2 + 1 before it.

    input      start t0 t1 t2 t3 t4 t5 t6 t7         W = 4
    target        t0 t1 t2 t3 t4 t5 t6 t7 t8
    window 0     [ x  x  x  x ]
    window 1           [ .  .  x  x ]                x scored, . context
    window 2                 [ .  .  x  x ]
    window 3                       [ .  .  x ]

Windows are sorted by length and padded on the right to the longest of their batch; causal attention never looks there.
"""

from collections.abc import Iterator, Sequence
from math import fsum, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.flops import window_flops
from hyperllama.model import IGNORE, Llama

BATCH_TOKENS = 1 << 14  # a batch, padding included


class Score(NamedTuple):
    """Negative log-likelihood of every sequence in nats, and the FLOPs of the forward passes (causal convention)."""

    nll: list[float]
    flops: int


class Window(NamedTuple):
    """Targets `begin` to `end` of a sequence, of which those from `first` on are scored."""

    sequence: int
    begin: int
    first: int
    end: int


def start_token(tokenizer: Tokenizer) -> int:
    """What stands before the first token: EOS as between the documents of our shards, BOS where a tokenizer has no EOS.

    Raises HyperLlamaError for a tokenizer with neither.
    """
    start = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    if start is None:
        raise HyperLlamaError(f"{tokenizer.path} has neither EOS nor BOS: nothing can stand before the first token")
    return start


def window_length(model: Llama, seq_len: int | None) -> int:
    """`seq_len` tokens, or the longest window of the model.

    Raises HyperLlamaError when `seq_len` is longer than that.
    """
    longest = model.config.max_position_embeddings
    if seq_len is not None and not 0 < seq_len <= longest:
        raise HyperLlamaError(f"seq_len is {seq_len}; this model takes windows of 1 to {longest} tokens")
    return seq_len or longest


def windows_of(sequence: int, n_tokens: int, seq_len: int) -> Iterator[Window]:
    """The windows that score each of `n_tokens` tokens once."""
    end = 0
    while end < n_tokens:
        first, begin = end, max(0, end - seq_len // 2)
        end = min(begin + seq_len, n_tokens)
        yield Window(sequence, begin, first, end)


def score(
    model: Llama,
    sequences: Sequence[Sequence[int]],
    *,
    start: int,
    seq_len: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Score:
    """Score token sequences (without start and end tokens) with windows of `seq_len` tokens.

    Losses are the model's, in fp32, and are summed in fp64. Equal sequences are computed once and score the same.
    Raises HyperLlamaError when a loss is not finite.
    """
    distinct = {sequence: i for i, sequence in enumerate(dict.fromkeys(map(tuple, sequences)))}
    texts = [(start, *sequence) for sequence in distinct]
    windows = [window for i, text in enumerate(texts) for window in windows_of(i, len(text) - 1, seq_len)]
    windows.sort(key=lambda window: window.end - window.begin, reverse=True)
    parts: list[list[float]] = [[] for _ in texts]
    for batch in _batches(windows, batch_tokens):
        ids, targets = _tensors(batch, texts, model.arena.weights.device)
        losses = model.token_losses(ids, targets).double().sum(1)
        for window, loss in zip(batch, losses.tolist(), strict=True):
            parts[window.sequence].append(loss)
    nll = [fsum(part) for part in parts]
    if not all(map(isfinite, nll)):
        raise HyperLlamaError("the model's loss is not finite: its weights hold NaN or infinity, or overflow")
    flops = sum(window_flops(model.config, window.end - window.begin, "causal") // 3 for window in windows)
    return Score([nll[distinct[tuple(sequence)]] for sequence in sequences], flops)


def _batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Cut windows, longest first, into batches of at most `batch_tokens` padded tokens and at least one window."""
    at = 0
    while at < len(windows):
        rows = max(1, batch_tokens // (windows[at].end - windows[at].begin))
        yield windows[at : at + rows]
        at += rows


def _tensors(batch: list[Window], texts: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Input ids and targets (B, T) int64; a text is one longer than its sequence, so target i is text[i + 1]."""
    longest = batch[0].end - batch[0].begin
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets = torch.full((len(batch), longest), IGNORE, dtype=torch.int64)
    for row, (sequence, begin, first, end) in enumerate(batch):
        text = torch.tensor(texts[sequence][begin : end + 1])
        ids[row, : end - begin] = text[:-1]
        targets[row, first - begin : end - begin] = text[first - begin + 1 :]
    return ids.to(device), targets.to(device)


LOGITS = 1 << 24  # of score_continuations, held at once


@torch.no_grad()
def score_continuations(
    model: Llama,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    seq_len: int,
    batch_tokens: int = BATCH_TOKENS,
) -> list[tuple[float, bool]]:
    """Log-probability in nats of each continuation after its context, both tokens, and whether it is the likeliest at every token.

    Of a context and continuation longer than a window, the last `seq_len` + 1 tokens count; an equal request is computed once.
    Raises HyperLlamaError for a request without a context token, for a continuation longer than a window, and when a logit is
    not finite.
    """
    rows = []
    for context, continuation in requests:
        if not context:
            raise HyperLlamaError("a continuation without context has no first token: give the start token as context")
        if len(continuation) > seq_len:
            raise HyperLlamaError(f"a continuation of {len(continuation)} tokens does not fit a window of {seq_len}")
        rows.append(((*context, *continuation)[-(seq_len + 1) :], len(continuation)))
    distinct = sorted(set(rows), key=lambda row: len(row[0]), reverse=True)
    found: dict[tuple[tuple[int, ...], int], tuple[float, bool]] = {}
    device, at = model.arena.weights.device, 0
    while at < len(distinct):
        batch = distinct[at : at + max(1, batch_tokens // len(distinct[at][0]))]
        at += len(batch)
        ids = torch.zeros(len(batch), len(batch[0][0]) - 1, dtype=torch.int64)
        for row, (text, _) in enumerate(batch):
            ids[row, : len(text) - 1] = torch.tensor(text[:-1])
        hidden = model(ids.to(device))
        for row, (text, count) in enumerate(batch):
            total, greedy, step = 0.0, True, max(1, LOGITS // model.config.vocab_size)
            for low in range(len(text) - 1 - count, len(text) - 1, step):
                high = min(low + step, len(text) - 1)
                logits = model.logits(hidden[row, low:high]).float()
                targets = torch.tensor(text[low + 1 : high + 1], device=device)
                own = logits.gather(1, targets[:, None])[:, 0]
                total += float((own.double() - logits.double().logsumexp(1)).sum())
                greedy &= bool((logits.argmax(1) == targets).all())
            if not isfinite(total):
                raise HyperLlamaError(
                    "the model's logits are not finite: its weights hold NaN or infinity, or overflow"
                )
            found[text, count] = total, greedy
    return [found[row] for row in rows]
