"""The sample text is deterministic, held apart from its pairs, in its own script, and refuses a bad data file."""

import json
import subprocess
import sys
import unicodedata
from itertools import islice
from pathlib import Path

import pytest
import yaml

from hyperllama.data.sample import (
    DEV_START,
    LANGUAGES,
    Slot,
    documents,
    grammar,
    minimal_pairs,
    read_grammar,
    write_corpus,
)
from hyperllama.errors import HyperLlamaError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("language", LANGUAGES)
def test_document_i_depends_on_language_seed_and_i_alone(language):
    first = list(islice(documents(language, 1), 8))
    assert first[5:] == list(islice(documents(language, 1, start=5), 3))
    assert first != list(islice(documents(language, 2), 8)) and len(set(first)) == 8


def test_another_process_writes_the_same_text():
    code = "from hyperllama.data.sample import *; from itertools import islice; print(list(islice(documents('isl', 3), 4)))"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert text.strip() == str(list(islice(documents("isl", 3), 4)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_is_composed_and_in_its_own_script(language):
    text = "".join(islice(documents(language, 0), 50))
    assert unicodedata.normalize("NFC", text) == text and "_" not in text and "{" not in text
    letters = {unicodedata.name(c).split()[0] for c in text if c.isalpha()}
    assert letters == ({"ARABIC"} if language == "fas" else {"LATIN"})


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_word_and_template_is_reached(language):
    """Each word of each class can stand in some slot; 3000 documents use all templates."""
    rules = grammar(language)
    templates = [*rules.titles, *rules.templates, *(t for pair in rules.pairs for t in pair[1:])]
    reached = {id(word) for template in templates for slot in template if isinstance(slot, Slot) for word in slot.pool}
    data = yaml.safe_load((ROOT / "hyperllama" / "data" / "languages" / f"{language}.yaml").read_text())
    assert len(reached) == sum(len(entry["words"]) for entry in data["classes"].values())
    text = " ".join(islice(documents(language, 0), 3000)).lower()
    for template in [*rules.titles, *rules.templates]:
        longest = max((part for part in template if isinstance(part, str)), key=len)
        assert longest.lower() in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_pairs_differ_and_cover_their_phenomena(language):
    pairs = list(minimal_pairs(language, 0, 100))
    assert len({pair["good"] for pair in pairs}) == 100
    assert {pair["phenomenon"] for pair in pairs} == {pair[0] for pair in grammar(language).pairs}
    assert len({pair["phenomenon"] for pair in pairs}) >= 3
    for pair in pairs:
        good, bad = pair["good"].split(), pair["bad"].split()
        changed = sum(a != b for a, b in zip(good, bad, strict=True)) if len(good) == len(bad) else 1
        assert pair["good"] != pair["bad"] and (
            changed <= 4 or sorted(map(str.lower, good)) == sorted(map(str.lower, bad))
        )


def test_a_corpus_has_its_sizes_and_its_parts_are_apart(tmp_path):
    write_corpus(tmp_path / "c", ("eng", "fas"), 20_000, seed=5, dev_bytes=3_000, pairs=30)
    for language in ("eng", "fas"):
        parts = {}
        for part, size in (("train", 20_000), ("dev", 3_000)):
            rows = [json.loads(line) for line in (tmp_path / "c" / "text" / language / f"{part}.jsonl").open()]
            assert all(row["lang"] == language and row["source"] == "hyperllama sample text" for row in rows)
            parts[part] = [row["text"] for row in rows]
            assert size <= sum(len(text.encode()) for text in parts[part]) < size + 3_000
        assert not set(parts["train"]) & set(parts["dev"])
        pairs = [json.loads(line) for line in (tmp_path / "c" / "minimal_pairs" / f"{language}.jsonl").open()]
        assert len(pairs) == 30
        assert not any(pair["good"] in text for pair in pairs for text in parts["train"] + parts["dev"])
    assert "not a corpus" in (tmp_path / "c" / "README.md").read_text()
    with pytest.raises(HyperLlamaError, match="already exists"):
        write_corpus(tmp_path / "c", ("eng",), 1, seed=5, dev_bytes=1, pairs=1)


def test_development_documents_come_from_their_own_range():
    assert next(documents("swe", 0, DEV_START)) not in set(islice(documents("swe", 0), 100))


def test_unknown_languages_and_too_many_pairs_are_refused():
    with pytest.raises(HyperLlamaError, match="no sample text in 'xyz'"):
        next(documents("xyz", 0))
    with pytest.raises(HyperLlamaError, match="ask for fewer"):
        list(minimal_pairs("fao", 0, 10**6))


GOOD = {
    "classes": {"n": {"forms": ["g", "w"], "words": ["m a", "f b"]}, "a": {"forms": ["m", "f"], "words": ["x y"]}},
    "titles": ["{t:n.w}"],
    "templates": ["{q:a.@t} {t:n.w}."],
    "pairs": [{"phenomenon": "p", "good": "{t:n.w}", "bad": "{t.g}"}],
}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"templates": ["{t:nouns.w}"]}, "asks for the class nouns"),
        ({"templates": ["{t.w}"]}, "uses t, which it draws from no class"),
        ({"templates": ["{t:n.plural}"]}, "without a form plural"),
        ({"templates": ["{q:a.x_@t} {t:n.w}"]}, "without a form x_"),
        ({"templates": ["{t:n.w"]}, "brace that is not a slot"),
        ({"templates": []}, "key templates is missing"),
        ({"tempaltes": ["x"]}, "unknown key tempaltes"),
        ({"pairs": [{"good": "a", "bad": "b"}]}, "expected phenomenon, good and bad"),
        ({"classes": {"n": {"forms": ["w"], "words": ["a b"]}}}, "has 2 forms"),
    ],
)
def test_a_bad_data_file_is_refused_with_its_place(tmp_path, change, sentence):
    file = tmp_path / "xyz.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    assert read_grammar(file)
    file.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(HyperLlamaError, match=sentence) as error:
        read_grammar(file)
    assert "xyz.yaml" in str(error.value)
