"""Sample text: grammatical sentences from one small data file per language, to try the software on.

This is not a corpus. It says nothing about a language, and every file that is written says so. What it is good for: any
amount of text in seconds, the same on every machine, with real words, agreement, government and word order to be
learned.

A data file (languages/<language>.yaml) holds

    classes     name -> forms: names of a word's forms; words: one string a word, its forms in order, `_` for a space
    titles, templates    sentences with slots
    pairs       {phenomenon, good, bad}: two sentences that share their words

A slot {x:class.form} draws a word of the class (`a+b`: of either) and spells its form; {x.form} spells the same word
again. {x:class.acc_@y} takes the form whose name ends in word y's form `g`: its gender. {#2-12} is a number. Words of
slots with a capital letter are drawn once per document: its cast.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_folder
from hyperllama.recipes import read_yaml

LANGUAGES = ("eng", "est", "fao", "isl", "fas", "swe")
SOURCE = "hyperllama sample text"
DEV_START = 1 << 40  # documents below are for training, from here on for development

_README = """# HyperLlama sample text

Sentences made from word lists and templates, to try the software on. It is not a corpus: no conclusion about a
language, a method or a model of language can be drawn from it.

    text/<language>/train.jsonl, dev.jsonl    {{"text", "lang", "source"}}
    minimal_pairs/<language>.jsonl            {{"good", "bad", "phenomenon", "lang", "source"}}

Languages: {languages}. Seed: {seed}. No development document is a training document, and no good sentence of a minimal
pair is a sentence of either.
"""

_SLOT = re.compile(r"\{(?:#(\d+)-(\d+)|(\w+)(?::([\w+]+))?\.(\w*)(?:@(\w+))?)\}")

_START = re.compile(r"(^|„|– )(\w)")  # where a sentence begins, also in direct speech

Word = dict[str, str]  # form name -> form


@dataclass(frozen=True)
class Slot:
    """A compiled slot: a number in [low, high], or a form of the word `name`, drawn from `pool` where it is first."""

    name: str
    pool: tuple[Word, ...]
    form: str
    gender_of: str
    gender_pool: tuple[Word, ...]  # an adjective may stand before its noun
    low: int = 0
    high: int = 0


Template = tuple[str | Slot, ...]


@dataclass(frozen=True)
class Grammar:
    """A language's compiled data file."""

    titles: tuple[Template, ...]
    templates: tuple[Template, ...]
    pairs: tuple[tuple[str, Template, Template], ...]


def read_grammar(path: Path) -> Grammar:
    """Compile a data file.

    Raises HyperLlamaError naming the file and the key, word, or slot that does not fit.
    """
    data = read_yaml(path)
    for key in ("classes", "titles", "templates", "pairs"):
        if not data.get(key):
            raise HyperLlamaError(f"{path}: key {key} is missing or empty")
    unknown = set(data) - {"classes", "titles", "templates", "pairs"}
    if unknown:
        raise HyperLlamaError(f"{path}: unknown key {min(unknown)}")
    classes = {name: _words(path, name, entry) for name, entry in data["classes"].items()}
    cast: dict[str, tuple[Word, ...]] = {}
    return Grammar(
        tuple(_compile(path, text, classes, cast, {}) for text in data["titles"]),
        tuple(_compile(path, text, classes, cast, {}) for text in data["templates"]),
        tuple(_pair(path, pair, classes) for pair in data["pairs"]),
    )


def _words(path: Path, name: str, entry: dict[str, Any]) -> tuple[Word, ...]:
    words = []
    for text in entry["words"]:
        forms = [form.replace("_", " ") for form in unicodedata.normalize("NFC", text).split()]
        if len(forms) != len(entry["forms"]):
            raise HyperLlamaError(f"{path}: classes.{name}: {text!r} has {len(forms)} forms, expected {entry['forms']}")
        words.append(dict(zip(entry["forms"], forms, strict=True)))
    return tuple(words)


def _compile(
    path: Path,
    text: str,
    classes: dict[str, tuple[Word, ...]],
    cast: dict[str, tuple[Word, ...]],
    others: dict[str, tuple[Word, ...]],
) -> Template:
    """Cut a template at its slots; `cast` and `others` collect the pools of slots with and without a capital letter."""
    for match in _SLOT.finditer(text):
        _, _, name, cls, _, _ = match.groups(default="")
        if cls:
            unknown = [part for part in cls.split("+") if part not in classes]
            if unknown:
                raise HyperLlamaError(f"{path}: {text!r} asks for the class {unknown[0]}, which is not there")
            pool = tuple(word for part in cls.split("+") for word in classes[part])
            (cast if name[0].isupper() else others)[name] = pool
    parts: list[str | Slot] = []
    end = 0
    for match in _SLOT.finditer(text):
        parts.append(text[end : match.start()])
        end = match.end()
        low, high, name, _, form, gender_of = match.groups(default="")
        if low:
            parts.append(Slot("", (), "", "", (), int(low), int(high)))
            continue
        pools = others | cast
        for missing in {name, gender_of or name} - set(pools):
            raise HyperLlamaError(f"{path}: {text!r} uses {missing}, which it draws from no class")
        slot = Slot(name, pools[name], form, gender_of, pools.get(gender_of, ()))
        for gender in {word.get("g", "?") for word in slot.gender_pool} or {""}:
            if any(form + gender not in word for word in slot.pool):
                raise HyperLlamaError(f"{path}: {text!r}: {{{name}}} has words without a form {form + gender}")
        parts.append(slot)
    parts.append(text[end:])
    if any("{" in part or "}" in part for part in parts if isinstance(part, str)):
        raise HyperLlamaError(f"{path}: {text!r} has a brace that is not a slot")
    return tuple(part for part in parts if part)


def _pair(path: Path, pair: dict[str, str], classes: dict[str, tuple[Word, ...]]) -> tuple[str, Template, Template]:
    if set(pair) != {"phenomenon", "good", "bad"}:
        raise HyperLlamaError(f"{path}: pairs: expected phenomenon, good and bad, got {', '.join(pair)}")
    known: dict[str, tuple[Word, ...]] = {}
    good, bad = (_compile(path, pair[key], classes, {}, known) for key in ("good", "bad"))
    return pair["phenomenon"], good, bad


@cache
def grammar(language: str) -> Grammar:
    """The grammar of a language.

    Raises HyperLlamaError for a language without a data file.
    """
    if language not in LANGUAGES:
        raise HyperLlamaError(f"there is no sample text in {language!r}; languages: {', '.join(LANGUAGES)}")
    return read_grammar(Path(__file__).with_name("languages") / f"{language}.yaml")


def _spell(template: Template, words: dict[str, Word], random: Random) -> str:
    """Fill a template: words not yet in `words` are drawn and left there."""
    out = []
    for part in template:
        if isinstance(part, str):
            out.append(part)
        elif part.pool:
            word, gender = _word(part.name, part.pool, words, random), ""
            if part.gender_of:
                gender = _word(part.gender_of, part.gender_pool, words, random)["g"]
            out.append(word[part.form + gender])
        else:
            out.append(str(random.randint(part.low, part.high)))
    return _START.sub(lambda match: match[1] + match[2].upper(), "".join(out))


def _word(name: str, pool: tuple[Word, ...], words: dict[str, Word], random: Random) -> Word:
    """The word of a slot, drawn where it is first asked for; nobody meets himself."""
    while name not in words:
        word = pool[int(random.random() * len(pool))]
        if not any(word is other for other in words.values()):
            words[name] = word
    return words[name]


def _paragraphs(language: str, seed: int, i: int) -> list[list[str]]:
    """Document i as paragraphs of sentences, a title first in every third; a pure function of the arguments."""
    rules, random = grammar(language), Random(f"{language}/{seed}/{i}")
    cast: dict[str, Word] = {}
    paragraphs = [[_spell(random.choice(rules.titles), cast, random)]] if random.random() < 1 / 3 else []
    for _ in range(random.randint(1, 3)):
        paragraphs.append([])
        for _ in range(random.randint(3, 6)):
            words = dict(cast)
            paragraphs[-1].append(_spell(random.choice(rules.templates), words, random))
            cast.update((name, word) for name, word in words.items() if name[0].isupper())
    return paragraphs


def documents(language: str, seed: int, start: int = 0) -> Iterator[str]:
    """Documents start, start + 1, ... without end; document i is a pure function of (language, seed, i)."""
    i = start
    while True:
        yield _text(_paragraphs(language, seed, i))
        i += 1


def _text(paragraphs: list[list[str]]) -> str:
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)


def minimal_pairs(language: str, seed: int, count: int) -> Iterator[dict[str, str]]:
    """`count` different pairs of sentences that share their words, phenomena in turn.

    Raises HyperLlamaError when the language's word lists can't make so many.
    """
    rules, seen, i, misses = grammar(language), set[str](), 0, 0
    while len(seen) < count:
        random = Random(f"{language}/{seed}/pair/{i}")
        phenomenon, good, bad = rules.pairs[i % len(rules.pairs)]
        words: dict[str, Word] = {}
        pair = {"good": _spell(good, words, random), "bad": _spell(bad, words, random)}
        i += 1
        if pair["good"] in seen or pair["good"] == pair["bad"]:
            misses += 1
            if misses > 1000:
                raise HyperLlamaError(f"the sample text in {language} has no {count} minimal pairs: ask for fewer")
        else:
            misses = 0
            seen.add(pair["good"])
            yield {**pair, "phenomenon": phenomenon, "lang": language, "source": SOURCE}


def write_corpus(
    out: str | Path, languages: tuple[str, ...], bytes_per_language: int, *, seed: int, dev_bytes: int, pairs: int
) -> None:
    """Write text/<language>/{train,dev}.jsonl (at least so many bytes) and minimal_pairs/<language>.jsonl, atomically.

    No development document is a training document; no good sentence of a pair is in the text.
    Raises HyperLlamaError when `out` exists or a language is unknown.
    """
    with atomic_folder(out) as folder:
        (folder / "minimal_pairs").mkdir()
        for language in languages:
            rows = list(minimal_pairs(language, seed, pairs))
            _write_lines(folder / "minimal_pairs" / f"{language}.jsonl", rows)
            held_out = {row["good"] for row in rows}
            (folder / "text" / language).mkdir(parents=True)
            dev = _collect(language, seed, DEV_START, dev_bytes, held_out)
            train = _collect(language, seed, 0, bytes_per_language, held_out, set(dev))
            for part, texts in (("train", train), ("dev", dev)):
                lines = [{"text": text, "lang": language, "source": SOURCE} for text in texts]
                _write_lines(folder / "text" / language / f"{part}.jsonl", lines)
        (folder / "README.md").write_text(_README.format(languages=", ".join(languages), seed=seed), encoding="utf-8")


def _collect(
    language: str, seed: int, start: int, size: int, held_out: set[str], not_these: set[str] | None = None
) -> list[str]:
    texts: list[str] = []
    total, i = 0, start
    while total < size:
        paragraphs = _paragraphs(language, seed, i)
        i += 1
        text = _text(paragraphs)
        if all(held_out.isdisjoint(paragraph) for paragraph in paragraphs) and text not in (not_these or ()):
            texts.append(text)
            total += len(text.encode())
    return texts


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
