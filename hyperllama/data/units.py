"""Units of tokenizing: runs of documents that one process turns into a file of tokens, in a build's work folder."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hyperllama.data.shards import on_disk
from hyperllama.data.survey import Input, Survey, survey_file
from hyperllama.data.text import Document, file_documents
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_file

UNIT_BYTES = 1 << 25  # text of a unit: seconds of work, so that little is lost and processes end together
_UNITS_OF_A_FILE = 16  # at most: each reads past what is before it in its file, which must stay cheap
_BATCH_BYTES = 1 << 22  # text tokenized at once


class Unit(NamedTuple):
    """Documents [first, last) of a file, read from record `record` on; its place among all documents is `offset`."""

    file: int
    first: int
    last: int
    record: int
    offset: int


class Job(NamedTuple):
    """What a process needs to know to tokenize units."""

    files: list[Input]
    work: Path
    skip_damaged: bool
    dtype: str
    bos: int | None
    eos: int


def survey_job_file(job: Job, number: int) -> int:
    """Survey file `number` of the job."""
    survey_file(job.files[number], survey_path(job, number), skip_damaged=job.skip_damaged)
    return number


def survey_path(job: Job, number: int) -> Path:
    """Where the survey of file `number` is."""
    return job.work / f"survey-{number:05d}.npz"


def mask_of(order: np.ndarray, count: int) -> np.ndarray:
    """(count,) bool, true at the numbers in `order`."""
    mask = np.zeros(count, dtype=bool)
    mask[order] = True
    return mask


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array atomically, as .npy."""
    with atomic_file(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, array)


def cut_units(surveys: Sequence[Survey]) -> list[Unit]:
    """Runs of documents of some UNIT_BYTES of text, none across files."""
    units = []
    offset = 0
    for file, survey in enumerate(surveys):
        ends = np.cumsum(survey.sizes, dtype=np.int64)
        if len(ends):
            step = max(UNIT_BYTES, int(ends[-1]) // _UNITS_OF_A_FILE)
            borders = np.unique(np.searchsorted(ends, np.arange(0, int(ends[-1]), step), side="right"))
            for first, last in itertools.pairwise([*borders.tolist(), len(ends)]):
                units.append(Unit(file, first, last, int(survey.records[first]), offset))
        offset += len(ends)
    return units


def tokens_path(job: Job, unit: Unit) -> Path:
    """Where the unit's tokens are."""
    return job.work / f"unit-{unit.file:05d}-{unit.first:010d}.bin"


def lengths_path(job: Job, unit: Unit) -> Path:
    """Where the lengths of the unit's chosen documents are, once all of its tokens are."""
    return tokens_path(job, unit).with_suffix(".npy")


def tokenize_unit(tokenizer: Tokenizer, job: Job, unit: Unit) -> Unit:
    """Write the tokens of the unit's chosen documents, and their lengths (chosen,) int64: when those are there it is done."""
    file = job.files[unit.file]
    begin, end = unit.offset + unit.first, unit.offset + unit.last
    chosen = np.load(job.work / "chosen.npy", mmap_mode="r")[begin:end]
    with np.load(survey_path(job, unit.file)) as survey:
        sizes = survey["table"][unit.first : unit.last, 2]
    damaged = (lambda sentence: None) if job.skip_damaged else None
    documents = file_documents(file.path, file.keys, first_record=unit.record, damaged=damaged)
    lengths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    with atomic_file(tokens_path(job, unit)) as temporary, open(temporary, "wb") as stream:
        for texts in _batches(itertools.islice(documents, len(sizes)), chosen, sizes, file.path):
            encoded = tokenizer.encode_batch(texts)
            for ids in encoded:
                ids.append(job.eos)
                if job.bos is not None:
                    ids.insert(0, job.bos)
            counts = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
            tokens = np.fromiter(itertools.chain.from_iterable(encoded), on_disk(job.dtype), count=int(counts.sum()))
            stream.write(tokens.tobytes())
            lengths.append(counts)
    save_array(lengths_path(job, unit), np.concatenate(lengths))
    return unit


def _batches(documents: Iterator[Document], chosen: np.ndarray, sizes: np.ndarray, path: Path) -> Iterator[list[str]]:
    """Texts of the chosen documents, some _BATCH_BYTES at a time."""
    batch: list[str] = []
    held = seen = 0
    for document, wanted, size in zip(documents, chosen.tolist(), sizes.tolist(), strict=False):
        if document.num_bytes != size:
            break
        seen += 1
        if wanted:
            batch.append(document.text)
            held += document.num_bytes
            if held >= _BATCH_BYTES:
                yield batch
                batch, held = [], 0
    if seen < len(sizes):
        raise HyperLlamaError(f"{path} was changed while it was being read: start again")
    if batch:
        yield batch
