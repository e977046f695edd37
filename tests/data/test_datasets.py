"""The hub's cache read without the hub: a folder laid out as its own client lays it out, and read by that client too."""

import os
from pathlib import Path

import huggingface_hub
import pytest

from hyperllama.data.datasets import cache_folder, dataset_files
from hyperllama.data.text import Keys, iter_documents
from hyperllama.errors import HyperLlamaError

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: datasets of parquet files were NOT tested")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATTERN = "data/fao_Latn/train/*.parquet"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds two files of FineWeb-2's Faroese and one of SmolLM's corpus, which has three."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    rows = [{"text": f"tekstur {i}", "id": f"<urn:uuid:{i}>", "language": "fao", "score": 0.9} for i in range(6)]
    add(tmp_path, "HuggingFaceFW/fineweb-2", "data/fao_Latn/train/000_00000.parquet", rows[:4])
    add(tmp_path, "HuggingFaceFW/fineweb-2", "data/fao_Latn/train/000_00001.parquet", rows[4:])
    add(tmp_path, "HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup/train-00001-of-00003.parquet", rows)
    return tmp_path


def add(cache: Path, name: str, path: str, rows: list[dict]) -> None:
    folder = cache / f"datasets--{name.replace('/', '--')}"
    blob = folder / "blobs" / path.replace("/", "_")
    link = folder / "snapshots" / COMMIT / path
    for parent in (blob.parent, link.parent, folder / "refs"):
        parent.mkdir(parents=True, exist_ok=True)
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), blob, row_group_size=2)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs" / "main").write_text(COMMIT)


def test_files_are_those_that_the_hubs_client_finds(cache):
    commit, files = dataset_files("HuggingFaceFW/fineweb-2", PATTERN)
    theirs = huggingface_hub.snapshot_download(
        "HuggingFaceFW/fineweb-2", repo_type="dataset", local_files_only=True, cache_dir=cache, allow_patterns=PATTERN
    )
    assert commit == COMMIT
    assert files == [Path(theirs) / "data/fao_Latn/train" / f"000_0000{i}.parquet" for i in (0, 1)]
    assert dataset_files("HuggingFaceFW/fineweb-2", PATTERN, COMMIT)[1] == files


def test_documents_stream_out_of_a_dataset(cache):
    _, files = dataset_files("HuggingFaceFW/fineweb-2", PATTERN)
    documents = list(iter_documents(files, keys=Keys("text", "language", "id")))
    assert [(d.text, d.lang, d.id) for d in documents] == [(f"tekstur {i}", "fao", f"<urn:uuid:{i}>") for i in range(6)]


def test_what_is_not_in_the_cache_is_named_with_the_command_that_fetches_it(cache):
    for name, pattern, revision, message in (
        ("HuggingFaceFW/fineweb-3", "*.parquet", "main", "fineweb-3 at main is not in the hub's cache"),
        ("HuggingFaceFW/fineweb-2", "*.parquet", "v1", r"hf download .*fineweb-2 --repo-type dataset --revision v1"),
        ("HuggingFaceFW/fineweb-2", "data/isl*/*", "main", "no text files that match"),
        ("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup/*", "main", "train-00000-of-00003.parquet and 1 other"),
        ("fineweb-2", "*", "main", "expected owner/name"),
    ):
        with pytest.raises(HyperLlamaError, match=message):
            dataset_files(name, pattern, revision)


def test_the_cache_is_where_the_hubs_variables_say(monkeypatch):
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_folder() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert cache_folder() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert cache_folder() == Path("/c")
