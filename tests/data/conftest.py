import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from hyperllama.data.build import build_shards
from hyperllama.data.shards import Shards
from hyperllama.data.tokenizer import Tokenizer


class ByteTokenizer(Tokenizer):
    """UTF-8 byte b is token b + 3: a tokenizer whose output a test can compute itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint = hashlib.sha256(path.name.encode()).hexdigest()
        self.vocab_size, self.bos_id, self.eos_id = 259, 1, 2
        self._encode = lambda texts: [[byte + 3 for byte in text.encode()] for text in texts]
        self._decode = lambda ids: bytes(i - 3 for i in ids if i > 2).decode(errors="replace")


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer(Path("bytes.model"))


MakeShards = Callable[..., Shards]


@pytest.fixture
def make_shards(tmp_path: Path, byte_tokenizer: ByteTokenizer) -> MakeShards:
    """make_shards(name, [(language, text), ...], tokenizer=..., shard_tokens=...) -> open Shards in tmp_path / name."""

    def make(name: str, documents: Iterable[tuple[str, str]], tokenizer: Tokenizer = byte_tokenizer, **options):
        text = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"text": text, "lang": lang}) for lang, text in documents]
        text.write_text("\n".join(lines), encoding="utf-8")
        build_shards([text], tokenizer, tmp_path / name, **options)
        return Shards.open(tmp_path / name)

    return make
