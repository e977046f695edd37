import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from hyperllama.data.build import build_shards
from hyperllama.data.shards import Shards, check_tokenizer, inspect
from hyperllama.data.tokenizer import Tokenizer, train_tokenizer
from hyperllama.errors import HyperLlamaError

DOCUMENTS = [
    ("fao", "Føroyar eru 18 oyggjar."),
    ("isl", "Ísland er eyja.\n\nÞar er kalt."),
    ("fao", "Ein stuttur tekstur, og so ein longri tekstur."),
    ("fas", "هیچ‌کس نمی‌داند."),
    ("isl", "Já."),
]


def stream(documents: list[tuple[str, str]]) -> list[int]:
    """What ByteTokenizer's shards must hold, computed here on its own."""
    return [token for _, text in documents for token in [*(byte + 3 for byte in text.encode()), 2]]


def many(seed: int, count: int = 40) -> list[tuple[str, str]]:
    generator = random.Random(seed)
    return [(generator.choice(["eng", "fao", "isl"]), "x" * generator.choice([1, 2, 9, 50, 200])) for _ in range(count)]


def test_files_hold_each_document_and_its_eos_in_order(make_shards, tmp_path: Path) -> None:
    shards = make_shards("s", DOCUMENTS)
    tokens = stream(DOCUMENTS)
    assert np.fromfile(tmp_path / "s" / "shard-00000.bin", "<u2").tolist() == tokens
    ends = np.fromfile(tmp_path / "s" / "documents.bin", "<u8")
    assert ends.tolist() == np.cumsum([len(text.encode()) + 1 for _, text in DOCUMENTS]).tolist()
    assert [shards.languages[i] for i in shards.document_languages] == [language for language, _ in DOCUMENTS]
    assert shards.read(0, shards.tokens).tolist() == tokens and shards.read(0, 1).dtype == np.int64


def test_manifest_counts_tokens_documents_and_bytes_per_language(make_shards, tmp_path: Path, byte_tokenizer) -> None:
    manifest = make_shards("s", DOCUMENTS).manifest
    for language in ("fao", "isl", "fas"):
        texts = [text for tag, text in DOCUMENTS if tag == language]
        size = sum(len(text.encode()) for text in texts)
        counts = {key: manifest["languages"][language][key] for key in ("tokens", "documents", "bytes")}
        assert counts == {"tokens": size + len(texts), "documents": len(texts), "bytes": size}
    for key in ("tokens", "documents", "bytes"):
        assert manifest[key] == sum(counts[key] for counts in manifest["languages"].values())
    assert manifest["policy"] == {"bos": False, "eos": True}
    assert manifest["tokenizer"]["fingerprint"] == byte_tokenizer.fingerprint
    source = tmp_path / "s.jsonl"
    assert [entry["sha256"] for entry in manifest["sources"]] == [hashlib.sha256(source.read_bytes()).hexdigest()]
    assert json.loads((tmp_path / "s" / "manifest.json").read_text()) == manifest


def test_text_survives_tokens_and_shards(make_shards, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(text for _, text in DOCUMENTS), encoding="utf-8")
    tokenizer = train_tokenizer([tmp_path / "t.txt"], tmp_path / "t.model", 330)
    shards = make_shards("s", DOCUMENTS, tokenizer)
    starts = [0, *shards.document_ends[:-1].tolist()]
    for (_, text), start, end in zip(DOCUMENTS, starts, shards.document_ends.tolist(), strict=True):
        ids = shards.read(start, end - start)
        assert ids[-1] == tokenizer.eos_id and tokenizer.decode(ids) == text


def test_reading_does_not_depend_on_how_the_stream_is_cut_into_files(make_shards) -> None:
    documents = many(0)
    whole = make_shards("whole", documents)
    tokens = np.array(stream(documents))
    for shard_tokens in (1, 7, 64, len(tokens) - 1, len(tokens)):
        cut = make_shards(f"cut{shard_tokens}", documents, shard_tokens=shard_tokens)
        assert len(list(cut.path.glob("shard-*.bin"))) == -(-len(tokens) // shard_tokens)
        for start, count in ((0, len(tokens)), (5, 0), (13, 150), (len(tokens) - 3, 3)):
            assert cut.read(start, count).tolist() == tokens[start : start + count].tolist()
        assert (
            cut.windows(np.arange(cut.num_windows(20)), 20) == whole.windows(np.arange(cut.num_windows(20)), 20)
        ).all()


def test_windows_are_consecutive_pieces_of_t_plus_1_tokens(make_shards) -> None:
    documents = many(1)
    shards = make_shards("s", documents)
    tokens = stream(documents)
    assert shards.num_windows(31) == len(tokens) // 32
    for i in range(shards.num_windows(31)):
        assert shards.window(i, 31).tolist() == tokens[i * 32 : (i + 1) * 32]
    for wrong in (-1, shards.num_windows(31)):
        with pytest.raises(IndexError):
            shards.window(wrong, 31)


def test_targets_are_counted_by_the_language_of_their_document(make_shards) -> None:
    for seed in range(5):
        documents = many(seed)
        shards = make_shards(f"s{seed}", documents)
        language_of_token = [language for language, text in documents for _ in range(len(text) + 1)]
        for seq_len in (1, 8, 63):
            index = np.random.default_rng(seed).permutation(shards.num_windows(seq_len))
            counted = shards.language_tokens(index, seq_len)
            for i, row in zip(index, counted, strict=True):
                targets = language_of_token[i * (seq_len + 1) + 1 : (i + 1) * (seq_len + 1)]
                assert row.tolist() == [targets.count(language) for language in shards.languages]


def test_one_language_takes_the_short_cut_to_the_same_counts(make_shards) -> None:
    shards = make_shards("s", [("fao", "x" * 30)] * 9)
    assert shards.language_tokens(np.arange(5), 17).tolist() == [[17]] * 5
    assert shards.language_tokens(np.arange(0), 17).shape == (0, 1)


def test_the_same_text_gives_the_same_bytes(make_shards) -> None:
    first, second = (make_shards(name, many(2), shard_tokens=100) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert first.manifest["files"] == second.manifest["files"]
    assert make_shards("c", many(3), shard_tokens=100).fingerprint != first.fingerprint


def test_large_vocabularies_are_stored_as_uint32(make_shards, byte_tokenizer) -> None:
    byte_tokenizer.vocab_size = 65536
    assert make_shards("u2", DOCUMENTS, byte_tokenizer).manifest["dtype"] == "uint16"
    byte_tokenizer.vocab_size, byte_tokenizer.eos_id = 65537, 65536
    shards = make_shards("u4", DOCUMENTS, byte_tokenizer)
    assert shards.manifest["dtype"] == "uint32"
    assert shards.read(0, shards.tokens).tolist() == [65536 if t == 2 else t for t in stream(DOCUMENTS)]


def test_texts_are_streamed_in_batches(make_shards, byte_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_shards("whole", many(4))
    sizes: list[int] = []
    encode = byte_tokenizer._encode

    def spy(texts: list[str]) -> list[list[int]]:
        sizes.append(sum(map(len, texts)))
        return encode(texts)

    byte_tokenizer._encode = spy
    monkeypatch.setattr("hyperllama.data.units._BATCH_BYTES", 100)
    assert make_shards("batched", many(4), byte_tokenizer).manifest["files"] == whole.manifest["files"]
    assert len(sizes) > 5 and max(sizes) < 100 + 200  # one document over the limit at most


def test_language_may_come_from_the_caller_or_the_folder(tmp_path: Path, byte_tokenizer) -> None:
    (tmp_path / "swe").mkdir()
    (tmp_path / "swe" / "a.txt").write_text("hej")
    by_folder = build_shards([tmp_path / "swe"], byte_tokenizer, tmp_path / "1")
    by_caller = build_shards([tmp_path / "swe"], byte_tokenizer, tmp_path / "2", language="deu")
    assert (list(by_folder["languages"]), list(by_caller["languages"])) == (["swe"], ["deu"])


def test_nothing_appears_when_building_fails(tmp_path: Path, byte_tokenizer) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    with pytest.raises(HyperLlamaError, match=r"bad\.jsonl line 2"):
        build_shards([tmp_path / "bad.jsonl"], byte_tokenizer, tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_what_cannot_be_built_is_refused(make_shards, tmp_path: Path, byte_tokenizer) -> None:
    make_shards("s", DOCUMENTS)
    with pytest.raises(HyperLlamaError, match="already exists"):
        make_shards("s", DOCUMENTS)
    with pytest.raises(HyperLlamaError, match="no text files"):
        build_shards([], byte_tokenizer, tmp_path / "none")
    with pytest.raises(HyperLlamaError, match="build_shards: shard_tokens"):
        make_shards("zero", DOCUMENTS, shard_tokens=0)
    with pytest.raises(HyperLlamaError, match="one language too many"):
        make_shards("babel", [(f"l{i}", "x") for i in range(257)])
    byte_tokenizer.eos_id = None
    with pytest.raises(HyperLlamaError, match="has no EOS"):
        make_shards("noeos", DOCUMENTS, byte_tokenizer)


def test_truncated_missing_and_altered_files_are_named(make_shards) -> None:
    folder = make_shards("s", many(5), shard_tokens=500).path
    for name in ("shard-00000.bin", "shard-00001.bin", "documents.bin", "languages.bin"):
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        with pytest.raises(HyperLlamaError, match=rf"{name} has {len(good) - 1} bytes, expected {len(good)}"):
            Shards.open(folder, verify=False)
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        with pytest.raises(HyperLlamaError, match=f"{name} is damaged"):
            Shards.open(folder)
        assert inspect(folder)["files"][name].startswith("is damaged")
        Shards.open(folder, verify=False)
        path.unlink()
        with pytest.raises(HyperLlamaError, match=f"{name} is missing"):
            Shards.open(folder, verify=False)
        path.write_bytes(good)
    Shards.open(folder)


def test_a_missing_or_damaged_manifest_is_named(make_shards, tmp_path: Path) -> None:
    folder = make_shards("s", DOCUMENTS).path
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"format": "other"}, "not a shard manifest"),
        ({"version": 99}, "has version 99"),
        ({"tokens": "many"}, '"tokens" must be of type int'),
        ({"dtype": "float16"}, "is damaged"),
        ({"files": {}}, '"files" must list'),
        ({"tokenizer": {}}, '"tokenizer" must hold'),
        ({"languages": {"fao": {}}}, '"index"'),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(HyperLlamaError, match=message):
            Shards.open(folder)
    path.write_text("{")
    with pytest.raises(HyperLlamaError, match="not valid JSON"):
        Shards.open(folder)
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(HyperLlamaError, match=r"has no manifest\.json"):
            Shards.open(missing)


def test_a_token_outside_the_vocabulary_is_an_error_even_unverified(make_shards) -> None:
    folder = make_shards("s", DOCUMENTS).path
    data = np.fromfile(folder / "shard-00000.bin", "<u2")
    data[7] = 259
    data.tofile(folder / "shard-00000.bin")
    shards = Shards.open(folder, verify=False)
    with pytest.raises(HyperLlamaError, match="holds token id 259"):
        shards.read(0, 8)


def test_another_tokenizer_is_refused(make_shards, tmp_path: Path, byte_tokenizer) -> None:
    shards = make_shards("s", DOCUMENTS)
    check_tokenizer(shards, byte_tokenizer)
    (tmp_path / "t.txt").write_text("another tokenizer")
    other: Tokenizer = train_tokenizer([tmp_path / "t.txt"], tmp_path, 275)
    for use in (lambda: check_tokenizer(shards, other), lambda: inspect(shards.path, other)):
        with pytest.raises(HyperLlamaError, match="made with another tokenizer"):
            use()


def test_inspect_counts_lengths_and_shows_samples(make_shards, byte_tokenizer) -> None:
    shards = make_shards("s", [("fao", "x" * length) for length in (1, 3, 4, 7, 7, 300)], shard_tokens=100)
    report = inspect(shards.path, byte_tokenizer, samples=2)
    assert report["lengths"] == {2: 1, 4: 1, 8: 3, 512: 1}  # with EOS: 2, 4, 5, 8, 8, 301 tokens
    assert set(report["files"].values()) == {"ok"} and len(report["files"]) == 6
    assert report["languages"]["fao"]["documents"] == 6
    assert [(s["language"], s["tokens"], s["text"]) for s in report["samples"]] == [
        ("fao", 2, "x"),
        ("fao", 301, "x" * 256),
    ]


def test_verification_reports_progress(make_shards) -> None:
    folder = make_shards("s", many(6), shard_tokens=500).path
    calls: list[tuple[int, int]] = []
    Shards.open(folder, progress=lambda done, total: calls.append((done, total)))
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert calls == sorted(calls) and calls[-1] == (size, size)
