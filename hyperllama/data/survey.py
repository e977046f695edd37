"""What is known of a file's documents without keeping them: the place, sizes, digest, id and language of each."""

import hashlib
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hyperllama.data.shards import MAX_LANGUAGES
from hyperllama.data.text import Keys, file_documents, language_of
from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_file, sha256_file

_DAMAGES_NAMED = 20  # of a file, in words; all are counted


class Input(NamedTuple):
    """A text file and how it is read."""

    path: Path
    keys: Keys
    language: str | None
    source: int


@dataclass(frozen=True)
class Survey:
    """What is known of a file's documents: arrays (documents,), language tags by index, damaged records, the file's hash."""

    records: np.ndarray  # uint32
    characters: np.ndarray  # uint32
    sizes: np.ndarray  # uint32, bytes of UTF-8
    words: np.ndarray  # uint32, between white space
    digests: np.ndarray  # (documents, 2) uint64 of the text
    ids: np.ndarray  # uint64 of the id, empty where ids are not read
    languages: np.ndarray  # uint8, index into tags
    tags: list[str]
    damaged: int
    damages: list[str]
    sha256: str


def survey_file(file: Input, out: Path, *, skip_damaged: bool) -> None:
    """Read a file once and write its survey to `out`, atomically.

    Raises HyperLlamaError for a bad text (a damaged record, unless they are skipped), no text, or too many languages.
    """
    damages: list[str] = []
    damaged = 0

    def skip(sentence: str) -> None:
        nonlocal damaged
        damaged += 1
        if damaged <= _DAMAGES_NAMED:
            damages.append(sentence)

    tags: dict[str, int] = {}
    table = array("I")  # five numbers of 4 bytes a document
    digests = bytearray()
    ids = bytearray()
    for document in file_documents(file.path, file.keys, damaged=skip if skip_damaged else None):
        tag = language_of(document, file.language)
        if tag not in tags and len(tags) == MAX_LANGUAGES:
            raise HyperLlamaError(f"{file.path}: {tag!r} is one language too many, a shard holds {MAX_LANGUAGES}")
        if document.num_bytes >= 1 << 32:
            raise HyperLlamaError(f"{file.path}: the document at {document.record} has 4 GiB or more of text")
        tag_index = tags.setdefault(tag, len(tags))
        text = document.text
        table.extend((document.record, len(text), document.num_bytes, len(text.split()), tag_index))
        digests += hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if document.id is not None:
            ids += id_hash(document.id)
    if not table and not damaged:
        raise HyperLlamaError(f"{file.path} holds no text")
    with atomic_file(out) as temporary, open(temporary, "wb") as stream:
        np.savez(
            stream,
            table=np.frombuffer(table, dtype=np.uint32).reshape(-1, 5),
            digests=np.frombuffer(digests, dtype="<u8").reshape(-1, 2),
            ids=np.frombuffer(ids, dtype="<u8"),
            rest=np.array(json.dumps([list(tags), damaged, damages, sha256_file(file.path)])),
        )


def load_survey(path: Path) -> Survey:
    """A survey that survey_file wrote."""
    with np.load(path, allow_pickle=False) as saved:
        records, characters, sizes, words, languages = saved["table"].T
        rest = json.loads(str(saved["rest"]))
        of_documents = saved["digests"], saved["ids"], languages.astype(np.uint8)
        return Survey(records, characters, sizes, words, *of_documents, *rest)


def id_hash(identity: str) -> bytes:
    """64 bits of an id: lists of a billion are looked up at 8 bytes each; two ids of a corpus share one with chance 1e-10."""
    return hashlib.blake2b(identity.encode(), digest_size=8).digest()
