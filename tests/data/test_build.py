"""Building shards: the same bytes by any number of processes and after any interruption; what a recipe takes of its text."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperllama.data import units
from hyperllama.data.build import build
from hyperllama.data.recipe import DataRecipe, load_data_recipe
from hyperllama.data.shards import Shards, inspect
from hyperllama.data.tokenizer import Tokenizer, train_tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.settings import validated

WORDS = ["báturin", "liggur", "í", "fjøruni", "og", "eingin", "veit", "hvør", "læt", "hann", "har", "eftir"]


def text_of(i: int) -> str:
    return " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 4 + i % 23)) + f" {i}"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """400 documents in four files of three kinds; id is the number, every tenth one stands twice."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": text_of(i - i % 10 // 9), "lang": "fao" if i % 3 else "isl", "id": str(i)} for i in range(400)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "a.jsonl").write_text("".join(lines[:150]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[150:330]).encode()))
    (folder / "c.txt").write_text("\f".join(row["text"] for row in rows[330:370]))
    (folder / "d.jsonl").write_text("".join(lines[370:]))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "t.txt").write_text("\n".join(map(text_of, range(200))))
    return train_tokenizer([folder / "t.txt"], folder / "t.model", 330)


def recipe(out: Path, tokenizer: Tokenizer, *sources: dict[str, Any], **settings: Any) -> DataRecipe:
    values = {"out": str(out), "tokenizer": str(tokenizer.path), "sources": list(sources), **settings}
    return validated(DataRecipe, values, "the test's recipe")


def texts(shards: Path, tokenizer: Tokenizer) -> list[str]:
    opened = Shards.open(shards)
    borders = [0, *opened.document_ends.tolist()]
    return [tokenizer.decode(opened.read(a, b - a)) for a, b in pairwise(borders)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1500)
    monkeypatch.setattr(units, "_BATCH_BYTES", 400)


def test_the_bytes_do_not_depend_on_processes_or_units(corpus, tokenizer, tmp_path, monkeypatch):
    settings = {"shuffle": True, "deduplicate": True, "shard_tokens": 1000}
    build(recipe(tmp_path / "one", tokenizer, {"files": str(corpus)}, **settings), tokenizer)
    monkeypatch.setattr(units, "UNIT_BYTES", 1500)
    monkeypatch.setattr(units, "_BATCH_BYTES", 400)
    build(recipe(tmp_path / "units", tokenizer, {"files": str(corpus)}, **settings), tokenizer)
    build(recipe(tmp_path / "many", tokenizer, {"files": str(corpus)}, **settings), tokenizer, processes=3)
    assert files(tmp_path / "one") == files(tmp_path / "units") == files(tmp_path / "many")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("stops_at", [("survey", 2), ("tokenize", 3), ("assemble", 1)])
def test_an_interrupted_build_goes_on_and_ends_in_the_same_bytes(
    corpus, tokenizer, tmp_path, small_units, stops_at, monkeypatch
):
    settings = {"shuffle": True, "shard_tokens": 1000}
    build(recipe(tmp_path / "whole", tokenizer, {"files": str(corpus)}, **settings), tokenizer)
    done = Counter()

    def stage(name: str):
        def progress(at: int, total: int) -> None:
            done[name] += 1
            if (name, done[name]) == stops_at:
                raise KeyboardInterrupt

        return progress

    again = recipe(tmp_path / "again", tokenizer, {"files": str(corpus)}, **settings)
    with pytest.raises(KeyboardInterrupt):
        build(again, tokenizer, stage=stage)
    assert not (tmp_path / "again").exists() and (tmp_path / ".again.work").is_dir()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".again.work").glob("[su]*-*")}
    assert before
    tokenized: list[str] = []
    encode = tokenizer._encode

    def spy(batch: list[str]) -> list[list[int]]:
        tokenized.extend(batch)
        return encode(batch)

    monkeypatch.setattr(tokenizer, "_encode", spy)
    build(again, tokenizer)
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    kept = sum(name.endswith(".npy") for name in before)
    assert (len(tokenized) < 400) == bool(kept)  # what was finished was not done again


def test_work_for_other_settings_or_text_is_not_used(corpus, tokenizer, tmp_path, small_units):
    def stop(name: str):
        def progress(at: int, total: int) -> None:
            if name == "assemble":
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        build(recipe(tmp_path / "s", tokenizer, {"files": str(corpus)}), tokenizer, stage=stop)
    (corpus / "d.jsonl").write_text(json.dumps({"text": "annar tekstur", "lang": "fao"}))
    build(recipe(tmp_path / "s", tokenizer, {"files": str(corpus)}), tokenizer)
    assert texts(tmp_path / "s", tokenizer)[-1] == "annar tekstur"


def test_documents_stand_in_the_order_of_the_files_unless_shuffled(corpus, tokenizer, tmp_path):
    plain = [text_of(i - i % 10 // 9) for i in range(400)]
    build(recipe(tmp_path / "plain", tokenizer, {"files": str(corpus)}), tokenizer)
    assert texts(tmp_path / "plain", tokenizer) == plain
    orders = set()
    for seed in (1, 2):
        build(recipe(tmp_path / f"{seed}", tokenizer, {"files": str(corpus), "shuffle": True}, seed=seed), tokenizer)
        shuffled = texts(tmp_path / f"{seed}", tokenizer)
        assert Counter(shuffled) == Counter(plain) and shuffled != plain
        orders.add(tuple(shuffled))
    assert len(orders) == 2


def test_exact_copies_are_left_out_also_across_sources(corpus, tokenizer, tmp_path):
    sources = [{"files": str(corpus / "a.jsonl")}, {"files": [str(corpus / "[b-d]*")]}]
    manifest = build(recipe(tmp_path / "s", tokenizer, *sources, deduplicate=True), tokenizer)
    kept = texts(tmp_path / "s", tokenizer)
    assert kept == list(dict.fromkeys(text_of(i - i % 10 // 9) for i in range(400)))
    assert sum(source["duplicates"] for source in manifest["taken"].values()) == 400 - len(kept)


def test_published_ids_split_a_corpus_in_two(corpus, tokenizer, tmp_path):
    ids = [str(i) for i in range(0, 150, 4)]
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    parts = {}
    for key in ("keep_ids", "drop_ids"):
        source = {"files": str(corpus / "a.jsonl"), "id_key": "id", key: str(tmp_path / "ids.txt")}
        build(recipe(tmp_path / key, tokenizer, source), tokenizer)
        parts[key] = texts(tmp_path / key, tokenizer)
    plain = [text_of(i - i % 10 // 9) for i in range(150)]
    assert parts["keep_ids"] == [plain[int(i)] for i in ids]
    assert parts["drop_ids"] == [text for i, text in enumerate(plain) if str(i) not in ids]


def test_budgets_of_documents_characters_fractions_and_shares(corpus, tokenizer, tmp_path):
    plain = [text_of(i - i % 10 // 9) for i in range(150)]
    lengths = np.cumsum([len(text) for text in plain])
    for number, (budget, count) in enumerate(
        [
            ({"documents": 7}, 7),
            ({"documents": 1000}, 150),
            ({"fraction": 0.29}, 43),  # 43.5, rounded down
            ({"characters": int(lengths[20])}, 20),  # the document that would reach the limit is left out
            ({"characters": int(lengths[20]) + 1}, 21),
        ]
    ):
        source = {"files": str(corpus / "a.jsonl"), **budget}
        build(recipe(tmp_path / f"{number}", tokenizer, source), tokenizer)
        assert texts(tmp_path / f"{number}", tokenizer) == plain[:count]
    halves = []
    for number, budget in enumerate(({"fraction": 0.29}, {"skip": 0.29}, {"skip": 0.29, "fraction": 0.1})):
        source = {"files": str(corpus / "a.jsonl"), "shuffle": True, **budget}
        manifest = build(recipe(tmp_path / f"half{number}", tokenizer, source), tokenizer)
        halves.append(texts(tmp_path / f"half{number}", tokenizer))
    assert Counter(halves[0] + halves[1]) == Counter(plain) and halves[2] == halves[1][:10]  # 10.7 of what is left
    assert manifest["taken"][str(corpus / "a.jsonl")]["passed_over"] == 43
    replay = {"files": str(corpus / "a.jsonl"), "share": 0.1, "shuffle": True, "name": "replay"}
    manifest = build(recipe(tmp_path / "r", tokenizer, {"files": str(corpus / "b.jsonl.gz")}, replay), tokenizer)
    taken = manifest["taken"]["replay"]["characters"] / manifest["characters"]
    assert 0.1 - max(map(len, plain)) / manifest["characters"] <= taken <= 0.1


def test_counts_per_language_are_those_of_the_text(corpus, tokenizer, tmp_path):
    manifest = build(
        recipe(tmp_path / "s", tokenizer, {"files": str(corpus), "language": "fas"}, shuffle=True), tokenizer
    )
    expected: dict[str, Counter] = {}
    for i in range(400):
        tag = "fas" if 330 <= i < 370 else "fao" if i % 3 else "isl"
        text = text_of(i - i % 10 // 9)
        expected.setdefault(tag, Counter()).update(
            documents=1,
            bytes=len(text.encode()),
            characters=len(text),
            words=len(text.split()),
            tokens=len(tokenizer.encode(text)) + 1,
        )
    for tag, counts in expected.items():
        assert {key: manifest["languages"][tag][key] for key in counts} == counts
    shards = Shards.open(tmp_path / "s")
    at = Counter(shards.languages[i] for i in shards.document_languages)
    assert at == {tag: counts["documents"] for tag, counts in expected.items()}


def test_bos_and_another_eos_are_written_and_recorded(corpus, tokenizer, tmp_path):
    source = {"files": str(corpus / "a.jsonl"), "documents": 3}
    manifest = build(recipe(tmp_path / "s", tokenizer, source, bos=True, eos_token="<unk>"), tokenizer)
    assert manifest["policy"] == {"bos": True, "eos": True} and manifest["tokenizer"]["eos_id"] == 0
    tokens = [[1, *tokenizer.encode(text_of(i)), 0] for i in range(3)]
    assert Shards.open(tmp_path / "s").read(0, manifest["tokens"]).tolist() == list(chain(*tokens))
    with pytest.raises(HyperLlamaError, match=r"eos_token: .* has no token '<end>'"):
        build(recipe(tmp_path / "e", tokenizer, source, eos_token="<end>"), tokenizer)


def test_damaged_records_are_an_error_or_skipped_and_counted(corpus, tokenizer, tmp_path, small_units):
    lines = (corpus / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines[3:3] = [b'{"text": \n', b'{"txt": "x"}\n', b'{"text": "\xff"}\n']
    (corpus / "a.jsonl").write_bytes(b"".join(lines))
    source = {"files": str(corpus / "a.jsonl")}
    with pytest.raises(HyperLlamaError, match=r"a\.jsonl line 4 is not JSON"):
        build(recipe(tmp_path / "s", tokenizer, source), tokenizer)
    assert not (tmp_path / ".s.work").exists()
    manifest = build(recipe(tmp_path / "s", tokenizer, source, damaged="skip"), tokenizer)
    assert texts(tmp_path / "s", tokenizer) == [text_of(i - i % 10 // 9) for i in range(150)]
    assert manifest["damaged"] == 3
    assert [sentence.split(" ")[2] for sentence in manifest["sources"][0]["damages"]] == ["4", "5", "6"]
    assert inspect(tmp_path / "s")["damages"] == manifest["sources"][0]["damages"]


def test_a_document_of_megabytes_is_one_document(tokenizer, tmp_path):
    long = " ".join(map(text_of, range(20_000)))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "stutt"}) + "\n" + json.dumps({"text": long}))
    manifest = build(recipe(tmp_path / "s", tokenizer, {"files": str(tmp_path / "long.jsonl")}), tokenizer)
    assert manifest["documents"] == 2 and manifest["bytes"] == 5 + len(long.encode()) > 1_000_000
    assert texts(tmp_path / "s", tokenizer)[1] == long


def test_two_builds_of_one_folder_are_refused(corpus, tokenizer, tmp_path):
    def stage(name: str):
        with pytest.raises(HyperLlamaError, match="is being built by another process"):
            build(recipe(tmp_path / "s", tokenizer, {"files": str(corpus)}), tokenizer)
        return lambda done, total: None

    build(recipe(tmp_path / "s", tokenizer, {"files": str(corpus)}), tokenizer, stage=stage)


def test_a_killed_build_leaves_no_process_and_goes_on(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 20)
    (tmp_path / "big.jsonl").write_text("".join(json.dumps({"text": text_of(i) * 200}) + "\n" for i in range(600)))
    script = (
        "import sys; from hyperllama.data import units; from hyperllama.data.build import build; "
        "from hyperllama.data.recipe import data_recipe; "
        "from hyperllama.data.tokenizer import Tokenizer; from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    units.UNIT_BYTES = 1 << 20\n"
        "    r = data_recipe([sys.argv[1]], tokenizer=Path(sys.argv[2]), out=Path(sys.argv[3]))\n"
        "    build(r, Tokenizer.load(r.tokenizer), processes=2)\n"
    )
    (tmp_path / "script.py").write_text(script)
    arguments = [tmp_path / "big.jsonl", tokenizer.path, tmp_path / "s"]
    process = subprocess.Popen([sys.executable, tmp_path / "script.py", *map(str, arguments)])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".s.work/unit-*.npy")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "s").exists()
    while any(_runs(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    build(recipe(tmp_path / "s", tokenizer, {"files": [str(arguments[0])]}), tokenizer)
    build(recipe(tmp_path / "whole", tokenizer, {"files": [str(arguments[0])]}), tokenizer)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_recipes_that_contradict_themselves_are_refused(tmp_path):
    start = {"out": "o", "tokenizer": "t"}
    for sources, message in (
        ([{}], "give either files or dataset"),
        ([{"files": "a", "dataset": "a/b", "dataset_files": "c"}], "give either files or dataset"),
        ([{"dataset": "a/b"}], "dataset and dataset_files belong together"),
        ([{"files": "a", "keep_ids": "b"}], "need id_key"),
        ([{"files": "a", "documents": 3, "fraction": 0.5}], "at most one of"),
        ([{"files": "a", "share": 0.5}], "must leave room"),
        ([{"files": "a"}, {"files": "a"}], "two sources are called 'a'"),
        ([{"file": "a"}], "unknown key sources.0.file; did you mean 'files'"),
    ):
        (tmp_path / "r.yaml").write_text(json.dumps({**start, "sources": sources}))
        with pytest.raises(HyperLlamaError, match=message):
            load_data_recipe(tmp_path / "r.yaml")


def test_the_recipes_of_the_paper_are_whole(monkeypatch, tmp_path):
    """Each of recipes/data resolves, offline, to the command that fetches its data."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = sorted((Path(__file__).parents[2] / "recipes" / "data").glob("*.yaml"))
    assert len(found) >= 8
    for path in found:
        for source in load_data_recipe(path).sources:
            with pytest.raises(HyperLlamaError, match=r"hf download|does not exist|matches no text file"):
                source.resolve()


def test_nothing_to_write_is_an_error(corpus, tokenizer, tmp_path):
    source = {"files": str(corpus / "a.jsonl"), "characters": 1}
    with pytest.raises(HyperLlamaError, match="no document is left"):
        build(recipe(tmp_path / "s", tokenizer, source), tokenizer)
    assert os.listdir(tmp_path) == ["corpus"]
