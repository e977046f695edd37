"""Tokens that datatrove wrote, for nanotron, used where they lie: a shard folder of links to its files.

    X.ds            tokens, raw little-endian uint16 or uint32
    X.ds.index      where each document ends in the file, in tokens, raw little-endian uint64
    X.ds.metadata   text: "tokenizer|bytes of a token", the number of tokens, the same for people; not always there

A folder of them is adopted by reading it once: the new folder holds a manifest with their hashes, a document index, and a link
to each `.ds`, in the order of their names. Its tokenizer is the user's word, checked by the vocabulary and by the documents' ends.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

import hyperllama
from hyperllama.data.shards import FORMAT, VERSION, on_disk, shard_name
from hyperllama.data.text import Progress
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_folder, sha256_file, write_json


def adopt(
    source: str | Path,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    language: str = "und",
    eos_token: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the shard folder `out` of the `.ds` files in the folder `source`, and return its manifest.

    eos_token: what ends documents there; default: the tokenizer's EOS. Bytes and characters of the text are not known.
    Raises HyperLlamaError when there are none, an index does not fit its tokens, the widths of tokens differ, or a document
    does not end in EOS. A token outside the vocabulary is found when it is read, or by `inspect`.
    """
    source, eos = Path(source), tokenizer.eos_id
    if eos_token is not None:
        if eos_token not in tokenizer.tokens():
            raise HyperLlamaError(f"{tokenizer.path} has no token {eos_token!r}")
        eos = tokenizer.tokens().index(eos_token)
    if eos is None:
        raise HyperLlamaError(f"{tokenizer.path} has no EOS: name the token that ends documents")
    found = ds_files(source)
    width = _width(found, tokenizer)
    dtype = {2: "uint16", 4: "uint32"}[width]
    sizes = [file.stat().st_size for file in found]
    lengths = [size // width for size in sizes]
    ends: list[np.ndarray] = []
    last: list[np.ndarray] = []
    for file, length in zip(found, lengths, strict=True):
        own = _ends(file, length)
        last.append(np.memmap(file, on_disk(dtype), "r")[own - 1])
        ends.append(own + sum(lengths[: len(ends)]))
    _check(np.concatenate(last), eos, source)
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, sum(sizes))

    with atomic_folder(out) as folder:
        documents = np.concatenate(ends)
        (folder / "documents.bin").write_bytes(documents.astype("<u8").tobytes())
        (folder / "languages.bin").write_bytes(bytes(len(documents)))
        files = {}
        for i, file in enumerate(found):
            os.symlink(file.absolute(), folder / shard_name(i))
            files[shard_name(i)] = {"sha256": sha256_file(file, add), "bytes": sizes[i]}
        for name in ("documents.bin", "languages.bin"):
            files[name] = {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        counts = {"tokens": sum(lengths), "documents": len(documents), "bytes": 0}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            **counts,
            "shard_tokens": max(lengths),
            "shard_lengths": lengths,
            "policy": {"bos": None, "eos": True},
            "languages": {language: {"index": 0, **counts}},
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": eos,
                "name": tokenizer.path.name,
            },
            "files": files,
            "sources": [{"name": f"{file.absolute().parent.name}/{file.name}"} for file in found],
            "code_version": hyperllama.__version__,
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def ds_files(folder: str | Path) -> list[Path]:
    """The `.ds` files of a folder by name. Raises HyperLlamaError when there are none."""
    found = sorted(Path(folder).glob("*.ds"))
    if not found:
        raise HyperLlamaError(f"{folder} is not a folder with .ds files")
    return found


def _width(found: list[Path], tokenizer: Tokenizer) -> int:
    """Bytes of a token: what the metadata say, else what the vocabulary needs."""
    needed = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    widths = set()
    for file in found:
        metadata = file.with_name(f"{file.name}.metadata")
        stated = metadata.read_text(encoding="utf-8").split("\n")[0].rpartition("|")[2] if metadata.is_file() else ""
        widths.add(int(stated) if stated in ("2", "4") else needed)
    if len(widths) > 1:
        raise HyperLlamaError(f"{found[0].parent}: some of its files have tokens of 2 bytes, others of 4")
    return widths.pop()


def _ends(file: Path, length: int) -> np.ndarray:
    """Ends of the file's documents, checked against its length in tokens."""
    index = file.with_name(f"{file.name}.index")
    if not index.is_file():
        raise HyperLlamaError(f"{index} does not exist: without it nobody knows where documents end")
    ends = np.fromfile(index, "<u8").astype(np.int64)
    if len(ends) == 0 or ends[-1] != length or (np.diff(ends, prepend=0) < 1).any():
        raise HyperLlamaError(
            f"{index} does not fit {file.name}, which holds {length:,} tokens: one of them is damaged"
        )
    return ends


def _check(last: np.ndarray, eos: int, source: Path) -> None:
    """Raise HyperLlamaError unless `last`, every document's last token, is EOS throughout."""
    tokens, counts = np.unique(last, return_counts=True)
    if tokens.tolist() != [eos]:
        most = int(tokens[counts.argmax()])
        raise HyperLlamaError(
            f"{source}: not all documents end in token {eos}; {counts.max():,} of {counts.sum():,} end in {most}: "
            "they were made with another tokenizer, or another token ends documents (--eos-token)"
        )
