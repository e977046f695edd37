import gzip
import json
from pathlib import Path

import pytest

from hyperllama.data.text import iter_documents, language_of, text_files
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
