"""Shards: a folder of token files that a run maps into memory.

    manifest.json      counts per language, the tokenizer's fingerprint, the SHA-256 of every file and source
    shard-00000.bin    tokens, raw little-endian uint16 (uint32 when the vocabulary is larger than 65536); every
    shard-00001.bin    shard but the last holds `shard_tokens` tokens; together they are one stream
    documents.bin      where each document ends in the stream (its EOS included), raw little-endian uint64
    languages.bin      each document's language, uint8, the "index" of the language in the manifest

A document is its tokens and one EOS. A window of length T is T+1 consecutive tokens of the stream: T inputs and
T targets. Window i starts at i * (T+1), so windows never overlap and what is left at the end is never read.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import hyperllama
from hyperllama.data.text import Document, Progress, iter_documents, language_of, text_files
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_folder, read_json, sha256_file, write_json

FORMAT = "hyperllama-shards"
VERSION = 1
MAX_LANGUAGES = 256  # a document's language is one byte
_BATCH_BYTES = 1 << 22  # UTF-8 bytes of the documents tokenized at once
_KEYS: dict[str, type] = {
    "tokens": int,
    "documents": int,
    "bytes": int,
    "shard_tokens": int,
    "dtype": str,
    "languages": dict,
    "tokenizer": dict,
    "files": dict,
}


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


def build_shards(
    texts: Iterable[str | Path],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    language: str | None = None,
    shard_tokens: int = 2**27,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenize `texts` (files and folders) into the new shard folder `out` and return its manifest.

    A document's language is its own tag, else `language`, else the name of its folder if known, else "und". Memory
    holds a few MiB of text (or the longest document), however large the corpus. The same inputs give the same bytes.
    Raises HyperLlamaError when `out` exists, a text is bad (see iter_documents) or the tokenizer has no EOS.
    """
    if tokenizer.eos_id is None:
        raise HyperLlamaError(f"tokenizer {tokenizer.path} has no EOS token, which every document in a shard ends with")
    if shard_tokens < 1:
        raise HyperLlamaError(f"shard_tokens must be at least 1, not {shard_tokens}")
    files = text_files(texts)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    languages: dict[str, dict[str, int]] = {}
    tokens = 0
    with atomic_folder(out) as folder:
        shards: list[_HashedFile] = []
        ends_file, tags_file = (_HashedFile(folder / name) for name in ("documents.bin", "languages.bin"))
        for documents in _batches(iter_documents(files, progress=progress)):
            encoded = tokenizer.encode_batch([document.text for document in documents])
            lengths = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
            pairs = zip(documents, lengths.tolist(), strict=True)
            tags = [_count(languages, document, language, length) for document, length in pairs]
            stream = np.array([token for ids in encoded for token in (*ids, tokenizer.eos_id)], dtype=_on_disk(dtype))
            ends_file.append((tokens + np.cumsum(lengths)).astype("<u8"))
            tags_file.append(np.array(tags, dtype=np.uint8))
            while len(stream):
                place = tokens % shard_tokens
                if place == 0:
                    shards.append(_HashedFile(folder / _shard_name(len(shards))))
                piece, stream = stream[: shard_tokens - place], stream[shard_tokens - place :]
                shards[-1].append(piece)
                tokens += len(piece)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            "tokens": tokens,
            "documents": sum(counts["documents"] for counts in languages.values()),
            "bytes": sum(counts["bytes"] for counts in languages.values()),
            "shard_tokens": shard_tokens,
            "policy": {"bos": False, "eos": True},
            "languages": languages,
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "name": tokenizer.path.name,
            },
            "files": {
                file.path.name: {"sha256": file.digest.hexdigest(), "bytes": file.size}
                for file in (*shards, ends_file, tags_file)
            },
            "sources": [
                {"name": f"{file.resolve().parent.name}/{file.name}", "sha256": sha256_file(file)} for file in files
            ],
            "code_version": hyperllama.__version__,
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents until their text passes _BATCH_BYTES."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _count(languages: dict[str, dict[str, int]], document: Document, language: str | None, tokens: int) -> int:
    """Add a document to its language's counts and return the language's index."""
    tag = language_of(document, language)
    if tag not in languages:
        if len(languages) == MAX_LANGUAGES:
            raise HyperLlamaError(f"{document.path}: {tag!r} is one language too many, a shard holds {MAX_LANGUAGES}")
        languages[tag] = {"index": len(languages), "tokens": 0, "documents": 0, "bytes": 0}
    counts = languages[tag]
    counts["tokens"] += tokens
    counts["documents"] += 1
    counts["bytes"] += document.num_bytes
    return counts["index"]


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.bin"


def _on_disk(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as a read-only array; a plain one, because slicing the memmap class costs microseconds."""
    return np.asarray(np.memmap(path, dtype, "r"))


class Shards:
    """A shard folder, memory mapped. Attributes: `path`, `manifest`, `tokens`, `vocab_size`, `eos_id`,
    `fingerprint` (hex SHA-256 over the files' hashes), `languages` (tags by index), `document_ends` (documents,)
    int64, `document_languages` (documents,) uint8."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.tokens: int = manifest["tokens"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.eos_id: int = manifest["tokenizer"]["eos_id"]
        self.languages = tuple(sorted(manifest["languages"], key=lambda tag: manifest["languages"][tag]["index"]))
        listing = "".join(f"{name} {file['sha256']}\n" for name, file in sorted(manifest["files"].items()))
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()
        self._shard_tokens: int = manifest["shard_tokens"]
        dtype, files = _on_disk(manifest["dtype"]), range(-(-self.tokens // self._shard_tokens))
        self._shards = [_map(path / _shard_name(index), dtype) for index in files]
        # Offsets are below 2^63; one signed type keeps NumPy from comparing uint64 with int64 as floats.
        self.document_ends = _map(path / "documents.bin", np.dtype("<i8"))
        self.document_languages = _map(path / "languages.bin", np.dtype(np.uint8))

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True, progress: Progress | None = None) -> "Shards":
        """Map the shards in `folder`; sizes are always checked, SHA-256 unless `verify` is false.

        Raises HyperLlamaError naming the file that is missing, truncated or altered.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, damage in _check_files(folder, manifest, verify, progress).items():
            if damage:
                raise HyperLlamaError(f"{folder / name} {damage}: copy the shard folder again, or build it again")
        return cls(folder, manifest)

    def num_windows(self, seq_len: int) -> int:
        """How many windows of `seq_len` + 1 tokens there are."""
        return self.tokens // (seq_len + 1)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream, (count,) int64."""
        out = np.empty((1, count), dtype=np.int64)
        self._fill(out, np.array([start]))
        return out[0]

    def windows(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """The windows at `indices` (N,), as (N, seq_len + 1) int64."""
        out = np.empty((len(indices), seq_len + 1), dtype=np.int64)
        self._fill(out, np.asarray(indices, dtype=np.int64) * (seq_len + 1))
        return out

    def window(self, index: int, seq_len: int) -> np.ndarray:
        """The window at `index`, (seq_len + 1,) int64."""
        return self.windows(np.array([index]), seq_len)[0]

    def _fill(self, out: np.ndarray, starts: np.ndarray) -> None:
        """Fill each row of `out` (N, count) with the tokens from its start on, across shard files.

        Raises IndexError outside the stream and HyperLlamaError for a token id outside the vocabulary.
        """
        count = out.shape[1]
        if len(starts) and not (starts.min() >= 0 and starts.max() + count <= self.tokens):
            raise IndexError(f"tokens outside the {self.tokens} of {self.path}")
        for row, start in zip(out, starts.tolist(), strict=True):
            done = 0
            while done < count:
                shard, place = divmod(start + done, self._shard_tokens)
                piece = self._shards[shard][place : place + count - done]
                row[done : done + len(piece)] = piece
                done += len(piece)
        if out.size and out.max() >= self.vocab_size:
            raise HyperLlamaError(
                f"{self.path} holds token id {out.max()}, which is not below its vocabulary size {self.vocab_size}"
            )

    def language_tokens(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Targets of each window by language of the document they are in, (N, len(languages)) int64; rows sum to T."""
        count, width = len(indices), len(self.languages)
        if width == 1 or count == 0:
            return np.full((count, width), seq_len, dtype=np.int64)
        low = np.asarray(indices, dtype=np.int64) * (seq_len + 1) + 1  # the first token is only ever an input
        high = low + seq_len
        first = np.searchsorted(self.document_ends, low, side="right")  # document d holds [ends[d-1], ends[d])
        last = np.searchsorted(self.document_ends, high - 1, side="right")
        overlaps = last - first + 1
        row = np.repeat(np.arange(count), overlaps)
        document = np.arange(overlaps.sum()) - np.repeat(np.cumsum(overlaps) - overlaps, overlaps) + first[row]
        begin = np.where(document > 0, self.document_ends[np.maximum(document, 1) - 1], 0)
        length = np.minimum(self.document_ends[document], high[row]) - np.maximum(begin, low[row])
        cell = row * width + self.document_languages[document]
        # bincount sums in float64, exact below 2^53
        return np.bincount(cell, weights=length, minlength=count * width).astype(np.int64).reshape(count, width)

    def token_counts(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """How often each token id is a target of these windows, by its document's language: (languages, vocab_size) int64."""
        targets, width = self.windows(indices, seq_len)[:, 1:], len(self.languages)
        if width > 1:
            positions = np.asarray(indices, dtype=np.int64)[:, None] * (seq_len + 1) + np.arange(1, seq_len + 1)
            document = np.searchsorted(self.document_ends, positions, side="right")
            targets = targets + self.document_languages[document].astype(np.int64) * self.vocab_size
        return np.bincount(targets.reshape(-1), minlength=width * self.vocab_size).reshape(width, self.vocab_size)


def check_tokenizer(shards: Shards, tokenizer: Tokenizer) -> None:
    """Raise HyperLlamaError unless `shards` were made with exactly this tokenizer file."""
    made_with = shards.manifest["tokenizer"]
    if made_with["fingerprint"] != tokenizer.fingerprint:
        raise HyperLlamaError(
            f"{shards.path} was made with another tokenizer ({made_with['name']}, {made_with['vocab_size']} tokens, "
            f"SHA-256 {made_with['fingerprint'][:12]}) than {tokenizer.path} ({tokenizer.vocab_size} tokens, "
            f"SHA-256 {tokenizer.fingerprint[:12]})"
        )


def inspect(
    folder: str | Path, tokenizer: Tokenizer | None = None, *, samples: int = 3, progress: Progress | None = None
) -> dict[str, Any]:
    """What is in a shard folder: the manifest's counts, each file's state, document lengths, sample texts.

    Keys: tokens, documents, bytes, dtype, tokenizer, languages; files {name: "ok" or what is wrong}; and, when no
    file is damaged, lengths {largest length in tokens, a power of two: documents} and, with a tokenizer, samples
    [{language, tokens, text}] (the first 256 tokens of `samples` documents spread over the stream).
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    damages = _check_files(folder, manifest, True, progress)
    keys = ("tokens", "documents", "bytes", "dtype", "tokenizer", "languages")
    report: dict[str, Any] = {key: manifest[key] for key in keys}
    report["files"] = {name: damage or "ok" for name, damage in damages.items()}
    if any(damages.values()):
        return report
    shards = Shards(folder, manifest)
    lengths = np.diff(shards.document_ends, prepend=0)
    powers, counts = np.unique(np.ceil(np.log2(lengths)).astype(np.int64), return_counts=True)
    report["lengths"] = {int(2**power): int(count) for power, count in zip(powers, counts, strict=True)}
    if tokenizer is not None:
        check_tokenizer(shards, tokenizer)
        report["samples"] = []
        for document in np.unique(np.linspace(0, len(lengths) - 1, samples, dtype=np.int64)):
            length = int(lengths[document])
            ids = shards.read(int(shards.document_ends[document]) - length, min(length, 256))
            language = shards.languages[shards.document_languages[document]]
            report["samples"].append({"language": language, "tokens": length, "text": tokenizer.decode(ids)})
    return report


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise HyperLlamaError(f"{folder} is not a shard folder: it has no manifest.json")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise HyperLlamaError(f'{path} is not a shard manifest: "format" must be "{FORMAT}"')
    if manifest.get("version") != VERSION:
        raise HyperLlamaError(f"{path} has version {manifest.get('version')!r}, this code reads version {VERSION}")
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise HyperLlamaError(f'{path} is damaged: "{key}" must be of type {kind.__name__}')
    if not {"fingerprint", "vocab_size", "eos_id", "name"} <= set(manifest["tokenizer"]):
        raise HyperLlamaError(f'{path} is damaged: "tokenizer" must hold fingerprint, vocab_size, eos_id and name')
    indices = [counts.get("index") for counts in manifest["languages"].values()]
    if set(indices) != set(range(len(indices))):
        raise HyperLlamaError(f'{path} is damaged: the "index" of {len(indices)} languages must count from 0')
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any], verify: bool, progress: Progress | None) -> dict[str, str]:
    """What is wrong with each file the manifest implies: "" when nothing is."""
    width = {"uint16": 2, "uint32": 4}.get(manifest["dtype"])
    if width is None or manifest["shard_tokens"] < 1 or manifest["tokens"] < 1:
        raise HyperLlamaError(f"{folder / 'manifest.json'} is damaged: dtype, tokens or shard_tokens make no sense")
    step, tokens = manifest["shard_tokens"], manifest["tokens"]
    sizes = {_shard_name(i): min(step, tokens - start) * width for i, start in enumerate(range(0, tokens, step))}
    sizes |= {"documents.bin": 8 * manifest["documents"], "languages.bin": manifest["documents"]}
    if set(sizes) != set(manifest["files"]):
        raise HyperLlamaError(f'{folder / "manifest.json"} is damaged: "files" must list {", ".join(sorted(sizes))}')
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, sum(sizes.values()))

    damages = {}
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            damages[name] = "is missing"
        elif path.stat().st_size != size:
            damages[name] = f"has {path.stat().st_size} bytes, expected {size}"
        elif verify and sha256_file(path, add) != manifest["files"][name].get("sha256"):
            damages[name] = "is damaged (its SHA-256 is not the manifest's)"
        else:
            damages[name] = ""
    return damages
