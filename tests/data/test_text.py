import base64
import gzip
import json
from pathlib import Path

import pytest

from hyperllama.data.text import Keys, file_documents, inspect_text, iter_documents, language_of, text_files
from hyperllama.errors import HyperLlamaError

LINES = [{"text": "Eitt.\nTvey.", "lang": "fao"}, {"text": "Two  ", "source": "x"}]
JSONL = "".join(json.dumps(line) + "\n" for line in LINES).encode()


def test_jsonl_plain_and_gzipped_give_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))
    for name in ("a.jsonl", "b.jsonl.gz"):
        documents = list(iter_documents(tmp_path / name))
        assert [(d.text, d.lang, d.path.name) for d in documents] == [
            ("Eitt.\nTvey.", "fao", name),
            ("Two  ", None, name),
        ]
        assert [d.num_bytes for d in documents] == [len(line["text"].encode()) for line in LINES]


def test_a_txt_file_is_one_document_and_form_feeds_separate_several(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("first\n\n  second\n", encoding="utf-8")
    (tmp_path / "many.txt.gz").write_bytes(gzip.compress("á\nb\f\n\fc\fd\n".encode()))
    (tmp_path / "notes.txt.jsonl").write_bytes(JSONL)
    assert [d.text for d in iter_documents(tmp_path / "one.txt")] == ["first\n\n  second\n"]
    assert [d.text for d in iter_documents(tmp_path / "many.txt.gz")] == ["á\nb", "c", "d\n"]
    assert len(list(iter_documents(tmp_path / "notes.txt.jsonl"))) == 2


def test_byte_order_mark_blank_lines_and_empty_documents_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n\n{"text": " \\n"}\n{"text": "y"}\n \n')
    assert [d.text for d in iter_documents(path)] == ["x", "y"]


def test_folders_are_walked_in_sorted_order_and_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.jsonl", "a/c.txt.gz", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = JSONL if name.endswith("jsonl") else b"x"
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "README.md").write_text("no text")
    (tmp_path / ".hidden.txt").write_text("no text")
    names = [str(file.relative_to(tmp_path)) for file in text_files([tmp_path])]
    assert names == ["a/c.txt.gz", "b/a.jsonl", "b/z.txt", "c.txt"]
    assert len(list(iter_documents(tmp_path))) == 5


def test_language_is_the_tag_then_the_callers_then_the_folder_then_und(tmp_path: Path) -> None:
    for folder in ("fao", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text('{"text": "x", "lang": "isl"}\n{"text": "y"}')
    tagged, untagged = iter_documents(tmp_path / "fao")
    *_, elsewhere = iter_documents(tmp_path / "other")
    assert [language_of(tagged, "swe"), language_of(untagged, "swe"), language_of(untagged)] == ["isl", "swe", "fao"]
    assert language_of(elsewhere) == "und"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no text"),
        (b'{"text": "  "}\n', "holds no text"),
        (b'{"text": "x"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        (b'{"text": "x"}\n\n{"text": \n', "line 3 is not JSON"),
        (b'["text"]\n', "line 1 is not an object"),
        (b'{"text": "x"}\n{"txt": "y"}\n', 'line 2 has no string under the key "text"'),
        (b'{"text": 3}\n', 'line 1 has no string under the key "text"'),
        (b'{"text": "x", "lang": 3}\n', 'line 1: "lang" must be a string'),
        (b'{"text": "\\ud800"}\n', 'line 1: "text" is not Unicode'),
    ],
)
def test_bad_jsonl_is_an_error_that_names_file_and_line(tmp_path: Path, content: bytes, expected: str) -> None:
    for name, data in (("bad.jsonl", content), ("bad.jsonl.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(HyperLlamaError) as error:
            list(iter_documents(tmp_path / name))
        assert f"{tmp_path / name} {expected}" in str(error.value)


def test_bad_txt_is_an_error_that_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo\n\xc3(\n")
    with pytest.raises(HyperLlamaError, match=r"bad\.txt line 3 is not UTF-8"):
        list(iter_documents(tmp_path / "bad.txt"))
    (tmp_path / "empty.txt").write_bytes(b"\n\f\n")
    with pytest.raises(HyperLlamaError, match=r"empty\.txt holds no text"):
        list(iter_documents(tmp_path / "empty.txt"))


def test_damaged_gzip_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    whole = gzip.compress(JSONL * 100)
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in the checksum
    for data in (whole[: len(whole) // 2], bytes(flipped), JSONL):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        with pytest.raises(HyperLlamaError, match=r"a\.jsonl\.gz is not a whole gzip file"):
            list(iter_documents(tmp_path / "a.jsonl.gz"))


def test_missing_unknown_empty_and_doubled_paths_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.txt").write_text("x")
    for paths, message in (
        ([tmp_path / "none.txt"], "none.txt does not exist"),
        ([tmp_path / "a.csv"], "a.csv is not a text file"),
        ([tmp_path / "empty"], "empty holds no text files"),
        ([tmp_path, tmp_path / "t.txt"], "t.txt is named twice"),
        ([], "no text files"),
    ):
        with pytest.raises(HyperLlamaError, match=message):
            list(iter_documents(paths))


ZSTD = base64.b64decode("KLUv/QRYrQAAeHsidGV4dCI6ImhlaSJ9CgEAIs46B3Balw==")  # zstd 1.5: three times {"text":"hei"}
NO_PYARROW = "pyarrow is not installed: zstd and parquet files were NOT tested"


def test_zstd_files_are_read_whole_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason=NO_PYARROW)
    (tmp_path / "a.jsonl.zst").write_bytes(ZSTD + ZSTD)  # two frames
    assert [d.text for d in iter_documents(tmp_path / "a.jsonl.zst")] == ["hei"] * 6
    for data in (ZSTD[:-5], JSONL):
        (tmp_path / "a.jsonl.zst").write_bytes(data)
        with pytest.raises(HyperLlamaError, match=r"a\.jsonl\.zst is not a whole zstd file"):
            list(iter_documents(tmp_path / "a.jsonl.zst"))


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason=NO_PYARROW)
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"row {i}" if i != 3 else " ", "lang": "fao" if i % 2 else None, "n": i} for i in range(50)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    documents = list(iter_documents(tmp_path / "a.parquet"))
    assert [(d.text, d.lang, d.record) for d in documents] == [
        (row["text"], row["lang"], i + 1) for i, row in enumerate(rows) if i != 3
    ]
    assert [d.text for d in file_documents(tmp_path / "a.parquet", first_record=30)] == [
        f"row {i}" for i in range(29, 50)
    ]
    with pytest.raises(HyperLlamaError, match='has no column "body"; it has lang, n, text'):
        list(iter_documents(tmp_path / "a.parquet", keys=Keys("body")))
    with pytest.raises(HyperLlamaError, match='row 1 has no string under the key "n"'):
        list(iter_documents(tmp_path / "a.parquet", keys=Keys("n")))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-9])
    with pytest.raises(HyperLlamaError, match=r"a\.parquet is not a whole parquet file"):
        list(iter_documents(tmp_path / "a.parquet"))


def test_reading_from_a_record_on_gives_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "{i}"}}' for i in range(9)) + "\n")
    (tmp_path / "b.txt").write_text("a\fb\f \fc\nd\fe")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.jsonl", "b.txt", "c.jsonl.gz"):
        documents = list(file_documents(tmp_path / name))
        for i, document in enumerate(documents):
            assert list(file_documents(tmp_path / name, first_record=document.record)) == documents[i:]


def test_damaged_records_can_be_skipped_and_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": 1}\n\xff\n{"text": "y"}\n')
    (tmp_path / "b.txt").write_bytes(b"one\f\n\xff\ftwo")
    named: list[str] = []
    assert [d.text for d in iter_documents(tmp_path, damaged=named.append)] == ["x", "y", "one", "two"]
    assert [sentence.rsplit("/", 1)[1][:20] for sentence in named] == [
        "a.jsonl line 2 has n", "a.jsonl line 3 is no", "b.txt line 2 is not ",
    ]  # fmt: skip


def test_globs_stand_for_the_text_files_they_match(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("x/b.jsonl", "x/a.txt", "x/y/c.txt", "x/d.csv"):
        (tmp_path / name).write_text("x")
    assert [file.name for file in text_files([tmp_path / "x" / "*"])] == ["a.txt", "b.jsonl"]
    assert [file.name for file in text_files([tmp_path / "**" / "*.txt"])] == ["a.txt", "c.txt"]
    with pytest.raises(HyperLlamaError, match=r"\*\.gz matches no text file"):
        text_files([tmp_path / "*.gz"])


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL + b"not json\n")
    documents = iter_documents(tmp_path / "a.jsonl")
    assert [next(documents).lang, next(documents).lang] == ["fao", None]  # the bad third line has not been looked at
    with pytest.raises(HyperLlamaError, match="line 3"):
        next(documents)


def test_progress_counts_the_bytes_of_all_files_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL * 30_000)  # over 1 MiB, so there are calls on the way
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))
    calls: list[tuple[int, int]] = []
    list(iter_documents(tmp_path, progress=lambda done, total: calls.append((done, total))))
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert len(calls) > 2 and calls == sorted(calls)
    assert {total for _, total in calls} == {size} and calls[-1] == (size, size)


def test_inspecting_text_counts_languages_lengths_and_damages(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL + b"{\n" + b'{"text": "\xc3\xa1\xc3\xa1", "lang": "fao"}\n')
    report = inspect_text([tmp_path])
    assert report["languages"] == {
        "fao": {"documents": 2, "bytes": 15, "characters": 13},
        "und": {"documents": 1, "bytes": 5, "characters": 5},
    }
    assert (report["documents"], report["bytes"], report["characters"]) == (3, 20, 18)
    assert report["lengths"] == {2: 1, 8: 1, 16: 1}  # áá, "Two  ", "Eitt.\nTvey."
    assert report["damaged"] == 1 and "a.jsonl line 3" in report["damages"][0]
    assert [sample["text"] for sample in report["samples"]] == ["Eitt.\nTvey.", "Two  "]
