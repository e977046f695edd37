"""Evaluation of a Hugging Face model folder, ours or foreign, with the tokenizer that lies in it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hyperllama.arena import Arena
from hyperllama.data.text import text_files
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.facts import evaluate_facts, read_facts
from hyperllama.evaluate.pairs import PairScores, check_way, read_pairs, score_pairs
from hyperllama.evaluate.score import start_token
from hyperllama.evaluate.text import TextScores, score_text
from hyperllama.files import read_json
from hyperllama.hub import model_config, open_folder, read_weights
from hyperllama.model import Llama


def load_folder(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> tuple[Llama, Tokenizer]:
    """Load a model folder for evaluation; weights of any stored dtype are computed with in `dtype`.

    `device` defaults to CUDA where there is one, else the CPU. Raises HyperLlamaError when the folder is not a whole
    Llama, has no tokenizer, or has one with more tokens than the model has rows for.
    """
    folder = open_folder(path)
    config = model_config(folder.config, folder.path)
    tokenizer = Tokenizer.load(folder.path)
    rows = config.unpadded_vocab_size or config.vocab_size
    if tokenizer.vocab_size > rows:
        raise HyperLlamaError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model in {folder.path} knows {rows}: "
            "they do not belong together"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    arena = Arena(config, dtype, device, training=False)
    read_weights(folder, config, arena.logical("weights"))
    return Llama(config, arena), tokenizer


def folder_start(path: str | Path, tokenizer: Tokenizer) -> int:
    """The start token of a folder's model: the BOS its config.json names (ours name none), else as start_token says."""
    bos = read_json(Path(path) / "config.json").get("bos_token_id")
    if isinstance(bos, int) and 0 <= bos < tokenizer.vocab_size:
        return bos
    return start_token(tokenizer)


@dataclass(frozen=True)
class Measured:
    """What a model folder was measured to be: scores by file; facts as evaluate_facts gives them, by folder."""

    name: str
    texts: dict[str, TextScores]
    pairs: dict[str, PairScores]
    facts: dict[str, dict[str, Any]]
    flops: int

    def summary(self) -> dict[str, Any]:
        """{"model": path, "texts": {file: see TextScores}, "pairs": {file: see PairScores}, "facts": if any, "flops": int}."""
        parts = {
            "texts": {file: score.summary() for file, score in self.texts.items()},
            "pairs": {file: score.summary() for file, score in self.pairs.items()},
        }
        for summaries in parts.values():
            for summary in summaries.values():
                del summary["flops"]
        return {"model": self.name, **parts, **({"facts": self.facts} if self.facts else {}), "flops": self.flops}


def evaluate_folder(
    path: str | Path, texts: Iterable[str | Path], pairs: Iterable[str | Path], **options: Any
) -> dict[str, Any]:
    """Evaluate a model folder: see Measured.summary; arguments and errors as in measure_folder."""
    return measure_folder(path, texts, pairs, **options).summary()


def measure_folder(
    path: str | Path,
    texts: Iterable[str | Path],
    pairs: Iterable[str | Path],
    *,
    facts: Iterable[str | Path] = (),
    by: str = "sentence",
    seq_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Measure a model folder on text files (or folders of them), files of minimal pairs and folders of facts.

    by: how pairs and facts are compared, see pairs.py (facts: by sentence where pairs are by word). FLOPs are those of all
    forward passes together, in the causal convention, padding left out. `progress(done, total)` counts bytes.
    Raises HyperLlamaError like load_folder, score_text, score_pairs and evaluate_facts.
    """
    check_way(by)
    pairs, facts = list(pairs), list(facts)
    for file in pairs:  # mistakes are found before hours of work
        read_pairs(file)
    for folder in facts:
        read_facts(folder)
    model, tokenizer = load_folder(path, dtype=dtype, device=device)
    start = folder_start(path, tokenizer)
    sizes = {Path(text): sum(file.stat().st_size for file in text_files([text])) for text in texts}
    pair_sizes = {Path(file): Path(file).stat().st_size if Path(file).is_file() else 0 for file in pairs}
    total, before = sum(sizes.values()) + sum(pair_sizes.values()), 0

    def report(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, total)

    text_scores, pair_scores, fact_results = {}, {}, {}
    for text, size in sizes.items():
        text_scores[str(text)] = score_text(model, tokenizer, text, start=start, seq_len=seq_len, progress=report)
        before += size
    for file, size in pair_sizes.items():
        pair_scores[str(file)] = score_pairs(model, tokenizer, file, by=by, start=start, seq_len=seq_len)
        before += size
        report(0, total)
    for folder in facts:
        ranked_by = "sentence" if by == "word" else by
        fact_results[str(folder)] = evaluate_facts(model, tokenizer, folder, by=ranked_by, start=start, seq_len=seq_len)
    flops = sum(scores.flops for scores in text_scores.values()) + sum(scores.flops for scores in pair_scores.values())
    flops += sum(result.pop("flops") for result in fact_results.values())
    return Measured(str(path), text_scores, pair_scores, fact_results, flops)
