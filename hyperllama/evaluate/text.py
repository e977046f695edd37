"""How well a model predicts text, in units that don't depend on its tokenizer.

    bits per byte = nll / ln 2 / UTF-8 bytes of the text          perplexity = exp(nll / tokens), None past fp64
    bits per character = nll / ln 2 / characters (code points)

nll is the sum over the tokens of all documents, each document alone: see score.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp, fsum, log
from pathlib import Path
from typing import Any

import numpy as np

from hyperllama.data.text import Document, iter_documents
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.evaluate.score import score, start_token, window_length
from hyperllama.model import Llama

CHUNK_BYTES = 1 << 23  # text held at once; windows of equal length are looked for within it


@dataclass(frozen=True)
class TextScores:
    """A text's documents: nll in nats, bytes and characters of each, (documents,); tokens and FLOPs of all."""

    nll: np.ndarray
    n_bytes: np.ndarray
    characters: np.ndarray
    tokens: int
    flops: int

    @property
    def bits(self) -> np.ndarray:
        """Bits of each document, (documents,)."""
        return self.nll / log(2)

    def summary(self) -> dict[str, Any]:
        """{documents, bytes, characters, tokens, nll_nats, bits_per_byte, bits_per_character, perplexity, flops}."""
        total, n_bytes, characters = fsum(self.nll), int(self.n_bytes.sum()), int(self.characters.sum())
        return {
            "documents": len(self.nll),
            "bytes": n_bytes,
            "characters": characters,
            "tokens": self.tokens,
            "nll_nats": total,
            "bits_per_byte": total / log(2) / n_bytes,
            "bits_per_character": total / log(2) / characters,
            "perplexity": exp(total / self.tokens) if total < 709 * self.tokens else None,
            "flops": self.flops,
        }


def evaluate_text(
    model: Llama, tokenizer: Tokenizer, paths: str | Path | Iterable[str | Path], **options: Any
) -> dict[str, Any]:
    """Score the documents of text files: see TextScores.summary; arguments and errors as in score_text."""
    return score_text(model, tokenizer, paths, **options).summary()


def score_text(
    model: Llama,
    tokenizer: Tokenizer,
    paths: str | Path | Iterable[str | Path],
    *,
    start: int | None = None,
    seq_len: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TextScores:
    """Score the documents of text files.

    `start` stands before each document (default: see start_token); `seq_len` is the window in tokens (default: the
    model's longest); `progress(done, total)` counts bytes read. Memory holds 8 MB of text at a time.
    Raises HyperLlamaError for bad text files, a window the model can't take, and a loss that is not finite.
    """
    start = start_token(tokenizer) if start is None else start
    seq_len = window_length(model, seq_len)
    n_tokens = flops = 0
    nll: list[float] = []
    sizes: list[tuple[int, int]] = []

    def flush(chunk: list[Document]) -> None:
        nonlocal n_tokens, flops
        sequences = tokenizer.encode_batch([document.text for document in chunk])
        scored = score(model, sequences, start=start, seq_len=seq_len)
        sizes.extend((document.num_bytes, len(document.text)) for document in chunk)
        n_tokens += sum(map(len, sequences))
        flops += scored.flops
        nll.extend(scored.nll)

    chunk: list[Document] = []
    held = 0
    for document in iter_documents(paths, progress=progress):
        chunk.append(document)
        held += document.num_bytes
        if held >= CHUNK_BYTES:
            flush(chunk)
            chunk, held = [], 0
    flush(chunk)
    n_bytes, characters = np.array(sizes, dtype=np.int64).T
    return TextScores(np.array(nll), n_bytes, characters, n_tokens, flops)
