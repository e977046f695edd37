"""How well a model predicts text, in units that don't depend on its tokenizer.

    bits per byte = nll / ln 2 / UTF-8 bytes of the text          perplexity = exp(nll / tokens), None past fp64

nll is the sum over the tokens of all documents, each document alone: see score.py.
"""

from collections.abc import Callable, Iterable
from math import exp, fsum, log
from pathlib import Path
from typing import Any

from hyperllama.data.text import Document, iter_documents
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.evaluate.score import BATCH_TOKENS, score, start_token, window_length
from hyperllama.model import Llama

CHUNK_BYTES = 1 << 23  # text held at once; windows of equal length are looked for within it


def evaluate_text(
    model: Llama,
    tokenizer: Tokenizer,
    paths: str | Path | Iterable[str | Path],
    *,
    start: int | None = None,
    seq_len: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score the documents of text files: {documents, bytes, tokens, nll_nats, bits_per_byte, perplexity, flops}.

    `start` stands before each document (default: see start_token); `seq_len` is the window in tokens (default: the
    model's longest); `progress(done, total)` counts bytes read. Memory holds 8 MB of text at a time.
    Raises HyperLlamaError for bad text files, a window the model can't take, and a loss that is not finite.
    """
    start = start_token(tokenizer) if start is None else start
    seq_len = window_length(model, seq_len)
    documents = n_bytes = n_tokens = flops = 0
    nll: list[float] = []

    def flush(chunk: list[Document]) -> None:
        nonlocal documents, n_bytes, n_tokens, flops
        sequences = tokenizer.encode_batch([document.text for document in chunk])
        scored = score(model, sequences, start=start, seq_len=seq_len, batch_tokens=batch_tokens)
        documents += len(chunk)
        n_bytes += sum(document.num_bytes for document in chunk)
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
    total = fsum(nll)
    return {
        "documents": documents,
        "bytes": n_bytes,
        "tokens": n_tokens,
        "nll_nats": total,
        "bits_per_byte": total / log(2) / n_bytes,
        "perplexity": exp(total / n_tokens) if total < 709 * n_tokens else None,
        "flops": flops,
    }
