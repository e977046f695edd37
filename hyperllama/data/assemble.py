"""The last stage of a build: documents copied from the units' files into shards, in the order of the output, and hashed."""

import hashlib
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hyperllama
from hyperllama.data.recipe import DataRecipe
from hyperllama.data.shards import FORMAT, MAX_LANGUAGES, VERSION, on_disk, shard_name
from hyperllama.data.survey import Survey
from hyperllama.data.text import Progress
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.data.units import Job, Unit, lengths_path, mask_of, tokens_path
from hyperllama.errors import HyperLlamaError

_COPY_TOKENS = 1 << 22  # tokens copied at once


class _HashedFile:
    """A file that grows: what is appended goes to disk and into its size and SHA-256."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = hashlib.sha256()
        self.size = 0

    def append(self, values: np.ndarray) -> None:
        data = values.tobytes()
        with open(self.path, "ab") as file:
            file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def describe(self) -> dict[str, Any]:
        return {"sha256": self.digest.hexdigest(), "bytes": self.size}


def assemble(
    folder: Path,
    recipe: DataRecipe,
    tokenizer: Tokenizer,
    job: Job,
    units: list[Unit],
    surveys: Sequence[Survey],
    order: np.ndarray,
    progress: Progress,
) -> dict[str, Any]:
    """Copy the documents in the order of the output from the units' files into shards; returns the manifest."""
    total = sum(len(survey.records) for survey in surveys)
    chosen = mask_of(order, total)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every unit's mapped file holds a descriptor
    unit_of, start, length = np.empty(total, np.int32), np.empty(total, np.int64), np.zeros(total, np.int64)
    parts = []
    for i, unit in enumerate(units):
        here = np.flatnonzero(chosen[unit.offset + unit.first : unit.offset + unit.last]) + unit.offset + unit.first
        lengths = np.load(lengths_path(job, unit))
        unit_of[here], length[here], start[here] = i, lengths, np.cumsum(lengths) - lengths
        empty = tokens_path(job, unit).stat().st_size == 0
        parts.append(np.zeros(0) if empty else np.asarray(np.memmap(tokens_path(job, unit), on_disk(job.dtype), "r")))
    tags, languages = _languages(surveys, order)
    ends_file, tags_file = (_HashedFile(folder / name) for name in ("documents.bin", "languages.bin"))
    shards: list[_HashedFile] = []
    tokens, width = 0, np.dtype(job.dtype).itemsize
    ends = np.cumsum(length[order])
    for low, high in _spans(ends, _COPY_TOKENS):
        block = order[low:high]
        pieces = []
        for run in np.split(block, np.flatnonzero((np.diff(block) != 1) | (np.diff(unit_of[block]) != 0)) + 1):
            begin, end = start[run[0]], start[run[-1]] + length[run[-1]]
            pieces.append(parts[unit_of[run[0]]][begin:end])
        stream = np.concatenate(pieces)
        while len(stream):
            place = tokens % recipe.shard_tokens
            if place == 0:
                shards.append(_HashedFile(folder / shard_name(len(shards))))
            piece, stream = stream[: recipe.shard_tokens - place], stream[recipe.shard_tokens - place :]
            shards[-1].append(piece)
            tokens += len(piece)
        ends_file.append(ends[low:high].astype("<u8"))
        tags_file.append(languages[low:high])
        progress(int(ends[high - 1]) * width, int(ends[-1]) * width)
    counted = {
        "tokens": length[order],
        "documents": np.ones(len(order), dtype=np.int64),
        "bytes": np.concatenate([survey.sizes for survey in surveys])[order].astype(np.int64),
        "characters": np.concatenate([survey.characters for survey in surveys])[order].astype(np.int64),
        "words": np.concatenate([survey.words for survey in surveys])[order].astype(np.int64),
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": job.dtype,
        **{key: int(values.sum()) for key, values in counted.items()},
        "shard_tokens": recipe.shard_tokens,
        "policy": {"bos": recipe.bos, "eos": True},
        "languages": {
            tag: {"index": i} | {key: int(values[languages == i].sum()) for key, values in counted.items()}
            for i, tag in enumerate(tags)
        },
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": job.eos,
            "name": tokenizer.path.name,
        },
        "files": {file.path.name: file.describe() for file in (*shards, ends_file, tags_file)},
        "sources": [
            {"name": f"{file.path.absolute().parent.name}/{file.path.name}", "sha256": survey.sha256}
            | ({"damaged": survey.damaged, "damages": survey.damages} if survey.damaged else {})
            for file, survey in zip(job.files, surveys, strict=True)
        ],
        "recipe": recipe.model_dump(exclude={"out", "tokenizer"}),
        "code_version": hyperllama.__version__,
    }


def _languages(surveys: Sequence[Survey], order: np.ndarray) -> tuple[list[str], np.ndarray]:
    """All tags in the order of their first document of the output, and each such document's index, (N,) uint8."""
    all_tags = list(dict.fromkeys(tag for survey in surveys for tag in survey.tags))
    numbers = [np.array([all_tags.index(tag) for tag in survey.tags], dtype=np.int64) for survey in surveys]
    by_document = np.concatenate([own[survey.languages] for own, survey in zip(numbers, surveys, strict=True)])[order]
    used, first = np.unique(by_document, return_index=True)
    used = used[np.argsort(first)]
    if len(used) > MAX_LANGUAGES:
        raise HyperLlamaError(f"{len(used)} languages are too many, a shard folder holds {MAX_LANGUAGES}")
    index = np.zeros(len(all_tags), dtype=np.uint8)
    index[used] = np.arange(len(used))
    return [all_tags[i] for i in used], index[by_document]


def _spans(ends: np.ndarray, step: int) -> Iterator[tuple[int, int]]:
    """Cut documents with these ends into runs of at most `step` tokens, or one document."""
    low = 0
    while low < len(ends):
        before = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + step, side="right")))
        yield low, high
        low = high
