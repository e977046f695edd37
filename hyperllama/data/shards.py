"""Shards: a folder of token files that a run maps into memory.

    manifest.json      counts per language, the tokenizer's fingerprint, the SHA-256 of every file and source
    shard-00000.bin    tokens, raw little-endian uint16 (uint32 when the vocabulary is larger than 65536); every
    shard-00001.bin    shard but the last holds `shard_tokens` tokens (or: file i holds `shard_lengths[i]`, see ds.py);
                       together they are one stream
    documents.bin      where each document ends in the stream (its EOS included), raw little-endian uint64
    languages.bin      each document's language, uint8, the "index" of the language in the manifest

A document is its tokens and one EOS (with BOS before them where "policy" says so). A window of length T is T+1 consecutive
tokens of the stream: T inputs and T targets. Window i starts at i * (T+1), so windows never overlap and what is left at the end
is never read.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from hyperllama.data.text import Progress
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.files import read_json, sha256_file

FORMAT = "hyperllama-shards"
VERSION = 1
MAX_LANGUAGES = 256  # a document's language is one byte
_CHECKED_TOKENS = 1 << 22  # at once
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


def shard_name(index: int) -> str:
    """The name of a shard folder's file of tokens."""
    return f"shard-{index:05d}.bin"


def on_disk(dtype: str) -> np.dtype:
    """The dtype of tokens in a file, little-endian on every machine."""
    return np.dtype(dtype).newbyteorder("<")


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as a read-only array; a plain one, because slicing the memmap class costs microseconds."""
    return np.asarray(np.memmap(path, dtype, "r"))


class Shards:
    """A shard folder, memory mapped. Attributes: `path`, `manifest`, `tokens`, `vocab_size`, `eos_id`,
    `fingerprint` (hex SHA-256 over the files' hashes), `languages` (tags by index), `shard_lengths` (tokens of each file),
    `document_ends` (documents,) int64, `document_languages` (documents,) uint8."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.tokens: int = manifest["tokens"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.eos_id: int = manifest["tokenizer"]["eos_id"]
        self.languages = tuple(sorted(manifest["languages"], key=lambda tag: manifest["languages"][tag]["index"]))
        listing = "".join(f"{name} {file['sha256']}\n" for name, file in sorted(manifest["files"].items()))
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()
        self.shard_lengths = _shard_lengths(manifest)
        self._shard_ends = np.cumsum(self.shard_lengths)
        dtype = on_disk(manifest["dtype"])
        self._shards = [_map(path / shard_name(index), dtype) for index in range(len(self.shard_lengths))]
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

    def starts(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Where the windows at `indices` (N,) begin in the stream, (N,) int64."""
        return np.asarray(indices, dtype=np.int64) * (seq_len + 1)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream, (count,) int64."""
        out = np.empty((1, count), dtype=np.int64)
        self._fill(out, np.array([start]))
        return out[0]

    def windows(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """The windows at `indices` (N,), as (N, seq_len + 1) int64."""
        out = np.empty((len(indices), seq_len + 1), dtype=np.int64)
        self._fill(out, self.starts(indices, seq_len))
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
            done, shard = 0, int(np.searchsorted(self._shard_ends, start, side="right"))
            while done < count:
                place = start + done - (int(self._shard_ends[shard]) - self.shard_lengths[shard])
                piece = self._shards[shard][place : place + count - done]
                row[done : done + len(piece)] = piece
                done, shard = done + len(piece), shard + 1
        if out.size and out.max() >= self.vocab_size:
            raise HyperLlamaError(
                f"{self.path} holds token id {out.max()}, which is not below its vocabulary size {self.vocab_size}"
            )

    def bad_documents(self) -> int:
        """How many documents do not end in EOS, have one inside, or hold a token outside the vocabulary; reads everything."""
        bad = np.zeros(len(self.document_ends), dtype=bool)
        for end, shard in zip(self._shard_ends.tolist(), self._shards, strict=True):
            for low in range(0, len(shard), _CHECKED_TOKENS):
                tokens = shard[low : low + _CHECKED_TOKENS]
                first = end - len(shard) + low
                last = np.zeros(len(tokens), dtype=bool)
                here = np.searchsorted(self.document_ends, [first, first + len(tokens)], side="right")
                ends = self.document_ends[
                    here[0] : here[1]
                ]  # ends in (first, first + len]; the token before is the last
                last[ends - 1 - first] = True
                wrong = np.flatnonzero(((tokens == self.eos_id) != last) | (tokens >= self.vocab_size))
                bad[np.searchsorted(self.document_ends, wrong + first, side="right")] = True
        return int(bad.sum())

    def language_tokens(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Targets of each window by language of the document they are in, (N, len(languages)) int64; rows sum to T."""
        count, width = len(indices), len(self.languages)
        if width == 1 or count == 0:
            return np.full((count, width), seq_len, dtype=np.int64)
        low = self.starts(indices, seq_len) + 1  # the first token is only ever an input
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
            positions = self.starts(indices, seq_len)[:, None] + np.arange(1, seq_len + 1)
            document = np.searchsorted(self.document_ends, positions, side="right")
            targets = targets + self.document_languages[document].astype(np.int64) * self.vocab_size
        return np.bincount(targets.reshape(-1), minlength=width * self.vocab_size).reshape(width, self.vocab_size)


class FileShards(Shards):
    """Shards whose windows lie within files, none across two: a file's last tokens that fill no window are not read.

    The files come in a permutation by NumPy's generator of `seed`, each one's windows in order: nanotron's reading of `.ds`.
    """

    def __init__(self, shards: Shards, seed: int) -> None:
        super().__init__(shards.path, shards.manifest)
        self.order = np.random.default_rng(seed).permutation(len(self.shard_lengths))

    def num_windows(self, seq_len: int) -> int:
        """How many windows of `seq_len` + 1 tokens the files hold."""
        return sum(length // (seq_len + 1) for length in self.shard_lengths)

    def starts(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Where the windows at `indices` (N,) begin in the stream, (N,) int64."""
        lengths = np.array(self.shard_lengths)[self.order]
        ends = np.cumsum(lengths // (seq_len + 1))
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < ends[-1]):
            raise IndexError(f"windows outside the {ends[-1]} of {self.path}")
        place = np.searchsorted(ends, indices, side="right")
        file = self.order[place]
        first = ends[place] - lengths[place] // (seq_len + 1)
        return self._shard_ends[file] - lengths[place] + (indices - first) * (seq_len + 1)


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

    Keys: tokens, documents, bytes, dtype, tokenizer, languages; damaged (how many records of the text were left out), damages
    (the first of each file, in words); files {name: "ok" or what is wrong}; and, when no file is damaged, lengths {largest
    length in tokens, a power of two: documents}, bad_documents (how many do not end in EOS, have one inside, or a token outside the
    vocabulary) and, with a tokenizer, samples [{language, tokens, text}] (the first 256 tokens of `samples` documents
    spread over the stream).
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    damages = _check_files(folder, manifest, True, progress)
    keys = ("tokens", "documents", "bytes", "dtype", "tokenizer", "languages")
    report: dict[str, Any] = {key: manifest[key] for key in keys}
    report["damaged"] = manifest.get("damaged", 0)
    report["damages"] = [sentence for source in manifest.get("sources", []) for sentence in source.get("damages", [])]
    report["files"] = {name: damage or "ok" for name, damage in damages.items()}
    if any(damages.values()):
        return report
    shards = Shards(folder, manifest)
    lengths = np.diff(shards.document_ends, prepend=0)
    powers, counts = np.unique(np.ceil(np.log2(lengths)).astype(np.int64), return_counts=True)
    report["lengths"] = {int(2**power): int(count) for power, count in zip(powers, counts, strict=True)}
    report["bad_documents"] = shards.bad_documents()
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


def _shard_lengths(manifest: dict[str, Any]) -> list[int]:
    """Tokens of each file: as listed, or all `shard_tokens` but the last."""
    if "shard_lengths" in manifest:
        return list(manifest["shard_lengths"])
    tokens, step = manifest["tokens"], manifest["shard_tokens"]
    return [min(step, tokens - start) for start in range(0, tokens, step)]


def _check_files(folder: Path, manifest: dict[str, Any], verify: bool, progress: Progress | None) -> dict[str, str]:
    """What is wrong with each file the manifest implies: "" when nothing is."""
    width = {"uint16": 2, "uint32": 4}.get(manifest["dtype"])
    if width is None or manifest["shard_tokens"] < 1 or manifest["tokens"] < 1:
        raise HyperLlamaError(f"{folder / 'manifest.json'} is damaged: dtype, tokens or shard_tokens make no sense")
    lengths = _shard_lengths(manifest)
    if sum(lengths) != manifest["tokens"] or min(lengths) < 1:
        raise HyperLlamaError(f'{folder / "manifest.json"} is damaged: "shard_lengths" do not add up to "tokens"')
    sizes = {shard_name(i): length * width for i, length in enumerate(lengths)}
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
