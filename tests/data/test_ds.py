"""datatrove's token files, written here byte by byte as its writer does, read where they lie."""

import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from hyperllama.data.ds import adopt
from hyperllama.data.shards import FileShards, Shards, inspect
from hyperllama.errors import HyperLlamaError

FILES = {"b_00001.ds": [[5, 6, 2], [7, 2]], "a_00000.ds": [[9] * 9 + [2]], "c_00002.ds": [[8, 2], [3] * 20 + [2]]}


def write(folder: Path, files: dict[str, list[list[int]]], width: int = 2, metadata: bool = True) -> Path:
    folder.mkdir()
    for name, documents in files.items():
        tokens = [token for document in documents for token in document]
        ends = np.cumsum([len(document) for document in documents]).tolist()
        (folder / name).write_bytes(struct.pack(f"<{len(tokens)}{'H' if width == 2 else 'I'}", *tokens))
        (folder / f"{name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
        if metadata:
            (folder / f"{name}.metadata").write_text(f"some/tokenizer|{width}\n{len(tokens)}\n{len(tokens)} T")
    return folder


@pytest.mark.parametrize("width", [2, 4])
def test_tokens_and_documents_are_those_of_the_files_by_name(tmp_path, byte_tokenizer, width):
    source = write(tmp_path / "ds", FILES, width)
    adopt(source, byte_tokenizer, tmp_path / "s", language="fao")
    shards = Shards.open(tmp_path / "s")
    documents = [document for name in sorted(FILES) for document in FILES[name]]
    stream = list(chain(*documents))
    assert shards.read(0, shards.tokens).tolist() == stream
    assert shards.document_ends.tolist() == np.cumsum([len(d) for d in documents]).tolist()
    assert shards.languages == ("fao",) and (tmp_path / "s" / "shard-00000.bin").is_symlink()
    assert shards.windows(np.arange(7), 4).tolist() == [stream[5 * i : 5 * i + 5] for i in range(7)]
    assert inspect(tmp_path / "s", byte_tokenizer)["bad_documents"] == 0


def test_without_metadata_the_vocabulary_says_how_wide_a_token_is(tmp_path, byte_tokenizer):
    adopt(write(tmp_path / "ds", FILES, metadata=False), byte_tokenizer, tmp_path / "s")
    assert Shards.open(tmp_path / "s").tokens == 38


def test_windows_within_files_drop_each_files_rest(tmp_path, byte_tokenizer):
    adopt(write(tmp_path / "ds", FILES), byte_tokenizer, tmp_path / "s")
    for seed in range(6):
        shards = FileShards(Shards.open(tmp_path / "s"), seed)
        names = np.random.default_rng(seed).permutation(sorted(FILES))  # nanotron permutes the sorted names
        expected = []
        for name in names:
            tokens = list(chain(*FILES[name]))
            expected += [tokens[i : i + 4] for i in range(0, len(tokens) - 3, 4)]
        assert shards.num_windows(3) == len(expected)
        assert shards.windows(np.arange(len(expected)), 3).tolist() == expected
        with pytest.raises(IndexError):
            shards.windows(np.array([len(expected)]), 3)


def test_what_does_not_fit_is_named(tmp_path, byte_tokenizer):
    source = write(tmp_path / "ds", FILES)
    with pytest.raises(HyperLlamaError, match=r"not all documents end in token 5; 5 of 5 end in 2"):
        byte_tokenizer._tokens = [str(i) for i in range(259)]
        adopt(source, byte_tokenizer, tmp_path / "s", eos_token="5")
    (source / "a_00000.ds").write_bytes((source / "a_00000.ds").read_bytes()[:-2])
    with pytest.raises(HyperLlamaError, match=r"a_00000\.ds\.index does not fit"):
        adopt(source, byte_tokenizer, tmp_path / "s")
    (source / "a_00000.ds.index").unlink()
    with pytest.raises(HyperLlamaError, match=r"a_00000\.ds\.index does not exist"):
        adopt(source, byte_tokenizer, tmp_path / "s")
    with pytest.raises(HyperLlamaError, match=r"is not a folder with \.ds files"):
        adopt(tmp_path, byte_tokenizer, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    mixed = write(tmp_path / "mixed", FILES)
    (mixed / "a_00000.ds.metadata").write_text("t|4\n1\n1 T")
    with pytest.raises(HyperLlamaError, match="tokens of 2 bytes, others of 4"):
        adopt(mixed, byte_tokenizer, tmp_path / "s")


def test_a_changed_file_is_found(tmp_path, byte_tokenizer):
    source = write(tmp_path / "ds", FILES)
    adopt(source, byte_tokenizer, tmp_path / "s")
    data = bytearray((source / "b_00001.ds").read_bytes())
    data[0] ^= 1
    (source / "b_00001.ds").write_bytes(data)
    with pytest.raises(HyperLlamaError, match=r"shard-00001\.bin is damaged"):
        Shards.open(tmp_path / "s")
    data[2:4] = (2).to_bytes(2, "little")  # an EOS inside the first document
    (source / "b_00001.ds").write_bytes(data)
    assert Shards.open(tmp_path / "s", verify=False).bad_documents() == 1
