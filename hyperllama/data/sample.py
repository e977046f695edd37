"""Sample text: grammatical sentences made from one small data file per language, to try the software on.

    languages/isl.yaml --> Grammar (pools of inflected words, compiled templates) --> document i, minimal pair j

This is not a corpus. It says nothing about a language, and no linguistic conclusion can be drawn from it; every file
that is written says so. What it is good for: any amount of text in seconds, the same on every machine, in which
agreement, government and word order are there to be learned.

A data file holds, in this order:

    cells       the names of a word's forms, per kind of word; nouns have them per number
    paradigms   endings: `1` and `2` stand for the stems that an entry gives; `m-ur` is a paradigm of gender m
    derive      forms that are built from other forms: "{gen}ga"
    pronouns    per gender and number
    words       kind -> id -> {c: classes, f: "paradigm stem" or "= form form ...", g, obj, gov, ...}
    templates   group -> sentences with slots
    texts       cast, opening, body and end of a kind of text
    pairs       phenomenon -> [good, bad] templates that share their words

`_` is a space and `=` a zero-width non-joiner inside forms and sentences. A slot is
{name:class/number.form~other}: `/s` and `/p` choose the number, `~x` agrees with x in gender and number, `^x` in person
and number, `@v` takes the class that v asks for and `$v` the form that v governs, `#2-9` is a number, a capital letter
is a member of the cast, and `*` names it, or uses its pronoun when the sentence before had it as its subject.
"""

import json
import re
from bisect import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from itertools import accumulate, count, product
from pathlib import Path
from random import Random
from typing import Any

import yaml

from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_folder

LANGUAGES = ("eng", "est", "fao", "isl", "fas", "swe")
SOURCE = "hyperllama sample text"
DEV_START = 1 << 40  # documents below are for training, from here on for development

_README = """# HyperLlama sample text

Sentences made by templates and word lists (`hyperllama/data/languages/*.yaml`), to try the software on.
It is not a corpus: no conclusion about a language, a method or a model of language can be drawn from it.

    text/<language>/train.jsonl, dev.jsonl    {{"text", "lang", "source"}}
    minimal_pairs/<language>.jsonl            {{"good", "bad", "phenomenon", "lang", "source"}}

Languages: {languages}. Seed: {seed}. No dev document is a train document, and no sentence of either is a sentence of a
minimal pair.
"""

_SLOT = re.compile(
    r"\{(?P<name>\w+)(?::(?P<cls>[@#]?[\w-]+(?:/[sp])?))?(?:\.(?P<form>[\w.*$]+))?(?:(?P<mark>[~^])(?P<agree>\w+))?\}"
)
_KEYS = {"language", "digits", "mention", "cells", "paradigms", "derive", "pronouns", "features", "words", "templates",
         "texts", "pairs"}  # fmt: skip
_ITEM_KEYS = {"c", "f", "g", "pn", "obj", "gov"}

Word = dict[str, str]  # form name -> form, and the features "id", "gn", "pn", "obj", "gov"


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled sentence: which words to draw, and how to spell them out."""

    source: str
    size: int  # slots
    draws: list[tuple[int, list[Word]]]  # slot, pool
    asked: list[tuple[int, int, dict[str, list[Word]]]]  # slot, the slot that asks, its object class -> pool
    cast: list[tuple[int, str]]  # slot, member of the cast
    pieces: list[tuple[str, int, str, int, int, str]]  # text before, slot, form, governor, agrees with, feature
    tail: str
    capital: int  # where the first letter stands


@dataclass(frozen=True, slots=True)
class Text:
    """A kind of document."""

    cast: dict[str, list[Word]]
    title: list[Template]
    open: list[Template]
    body: list[list[Template]]
    weights: list[int]  # cumulative, one per body group
    end: list[Template]


@dataclass(slots=True)
class Grammar:
    """One language: words by class, compiled texts and minimal pairs."""

    language: str
    mention: tuple[str, str] = ("", "")
    words: dict[str, list[Word]] = field(default_factory=dict)  # id -> its fillers (one per number for nouns)
    pools: dict[str, list[Word]] = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)  # cumulative, one per kind of text
    pairs: list[tuple[str, bool, list[tuple[Template, Template]]]] = field(default_factory=list)  # name, order, templates

    def document(self, rng: Random) -> list[list[str]]:
        """One document as paragraphs of sentences; a title is a paragraph of its own."""
        random = rng.random
        text = self.texts[bisect(self.weights, int(random() * self.weights[-1]))]
        cast: dict[str, Word] = {}
        for name, pool in text.cast.items():
            cast[name] = _pick(pool, random, list(cast.values()))
        paragraphs: list[list[str]] = []
        if text.title and random() < 0.4:
            paragraphs.append([self._sentence(_any(text.title, random), cast, random, None)[0]])
        total, subject, paragraph = 3 + int(random() * 10), None, []
        for index in range(total):
            if index == 0:
                template = _any(text.open, random)
            elif index == total - 1:
                template = _any(text.end, random)
            else:
                template = _any(text.body[bisect(text.weights, int(random() * text.weights[-1]))], random)
            if paragraph and random() < 0.2:
                paragraphs.append(paragraph)
                paragraph, subject = [], None  # a new paragraph names its subject again
            sentence, subject = self._sentence(template, cast, random, subject)
            paragraph.append(sentence)
        return [*paragraphs, paragraph]

    def pair(self, index: int, rng: Random) -> tuple[str, str, str]:
        """(phenomenon, good sentence, bad sentence); the phenomena take turns."""
        name, _, items = self.pairs[index % len(self.pairs)]
        good, bad = items[int(rng.random() * len(items))]
        words = _fill(good, {}, rng.random)
        return name, self._spell(good, words, rng.random, None)[0], self._spell(bad, words, rng.random, None)[0]

    def _sentence(
        self, template: Template, cast: dict[str, Word], random: Any, subject: Word | None
    ) -> tuple[str, Word | None]:
        return self._spell(template, _fill(template, cast, random), random, subject)

    def _spell(
        self, template: Template, words: list[Word], random: Any, subject: Word | None
    ) -> tuple[str, Word | None]:
        """The sentence, and the member of the cast that is its subject."""
        out: list[str] = []
        now: Word | None = None
        for before, slot, key, governor, agree, feature in template.pieces:
            word = words[slot]
            if key == "*":
                now = word
                key = self.mention[word is subject and random() < 0.75]
            if governor >= 0:
                key = words[governor]["gov"] + key
            if agree >= 0:
                key += words[agree][feature]
            out.append(before)
            out.append(word[key])
        out.append(template.tail)
        sentence, at = "".join(out), template.capital
        return sentence[:at] + sentence[at].upper() + sentence[at + 1 :], now


def _any(templates: list[Template], random: Any) -> Template:
    return templates[int(random() * len(templates))]


def _pick(pool: list[Word], random: Any, taken: list[Word]) -> Word:
    """A word of the pool that is not yet in the sentence; early entries are the frequent ones, as in real text."""
    while True:
        r = random()
        word = pool[int(len(pool) * r * (0.4 + 0.6 * r))]
        for other in taken:
            if other["id"] == word["id"]:
                break
        else:
            return word


def _fill(template: Template, cast: dict[str, Word], random: Any) -> list[Word]:
    words: list[Word] = [{}] * template.size
    taken: list[Word] = []
    for slot, name in template.cast:
        words[slot] = cast[name]
        taken.append(cast[name])
    for slot, pool in template.draws:
        words[slot] = word = _pick(pool, random, taken)
        taken.append(word)
    for slot, asker, pools in template.asked:
        words[slot] = word = _pick(pools[words[asker]["obj"]], random, taken)
        taken.append(word)
    return words


class _Reader:
    """Checks a data file and compiles it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise HyperLlamaError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            self.fail("the file", "must be a mapping of keys")
        for key in sorted(set(data) - _KEYS):
            self.fail(key, f"is not a known key; known are {', '.join(sorted(_KEYS))}")
        for key in ("language", "mention", "cells", "words", "templates", "texts", "pairs"):
            if not data.get(key):
                self.fail(key, "is missing or empty")
        self.data: dict[str, Any] = data
        self.digits = str.maketrans("0123456789", data.get("digits", "0123456789"))
        self.grammar = Grammar(data["language"], mention=tuple(data["mention"].split()))
        self.groups: dict[str, list[str]] = data["templates"]
        self.extra = set(data.get("features", []))
        for kind, items in data["words"].items():
            if kind not in data["cells"]:
                self.fail(f"words.{kind}", "has no cells")
            for name, item in items.items():
                self.word(kind, str(name), item)
        for name, text in data["texts"].items():
            self.text(name, text)
        for name, pair in data["pairs"].items():
            self.pair(name, pair)
        weights = [text["weight"] for text in data["texts"].values()]
        self.grammar.weights = list(accumulate(weights))

    def fail(self, key: str, problem: str) -> None:
        raise HyperLlamaError(f"{self.path}: {key} {problem}")

    def forms(self, kind: str, where: str, item: dict[str, Any], cells: int) -> tuple[list[str], str]:
        """(the forms in the order of the cells, the gender that the paradigm's name starts with)."""
        paradigm, *stems = str(item["f"]).split()
        if paradigm == "=":
            patterns, stems, gender = stems, [], ""
        else:
            table = self.data.get("paradigms", {}).get(kind, {})
            if paradigm not in table:
                self.fail(where, f"names the paradigm {paradigm!r}, which paradigms.{kind} does not hold")
            patterns, gender = table[paradigm].split(), paradigm.rpartition("-")[0]
        if len(patterns) != cells:
            self.fail(where, f"has {len(patterns)} forms ({paradigm}), but the cells of a {kind} are {cells}")
        forms = []
        for pattern in patterns:
            used = [int(digit) for digit in re.findall(r"\d", pattern)]
            if used and max(used) > len(stems):
                self.fail(where, f"needs {max(used)} stems for {pattern!r} ({paradigm})")
            forms.append(_plain(re.sub(r"\d", lambda match: stems[int(match[0]) - 1], pattern)))
        return forms, gender

    def word(self, kind: str, name: str, item: Any) -> None:
        where = f"words.{kind}.{name}"
        if not isinstance(item, dict) or not {"c", "f"} <= set(item):
            self.fail(where, "must be a mapping with the keys c (classes) and f (forms)")
        for key in sorted(set(item) - _ITEM_KEYS - self.extra):
            self.fail(f"{where}.{key}", f"is not a known key; known are {', '.join(sorted(_ITEM_KEYS | self.extra))}")
        cells = self.data["cells"][kind]
        numbers = {number: names.split() for number, names in (cells if isinstance(cells, dict) else {"": cells}).items()}
        forms, gender = self.forms(kind, where, item, sum(map(len, numbers.values())))
        gender = item.get("g", gender)
        for number, names in numbers.items():
            word = {cell: form for cell, form in zip(names, forms, strict=False) if form != "-"}
            forms = forms[len(names) :]
            if not word:
                continue
            for cell, pattern in self.data.get("derive", {}).get(kind, {}).items():
                word[cell] = re.sub(r"\{(.+?)\}", lambda match, word=word: word[match[1]], pattern)
            word[""] = word.get(names[0], "")
            gn = f"{gender}.{number}" if gender else number
            for cell, form in self.data.get("pronouns", {}).get(gn, {}).items():
                word[f"pro.{cell}"] = _plain(form)
            word |= {"id": name, "gn": gn, "pn": item.get("pn", f"3{number}")}
            word |= {key: _plain(str(value)) for key, value in item.items() if key in self.extra | {"obj", "gov"}}
            self.grammar.words.setdefault(name, []).append(word)
            for cls in item["c"].split():
                for pool in (cls, f"{cls}/{number[0]}") if number else (cls,):
                    self.grammar.pools.setdefault(pool, []).append(word)

    def pool(self, cls: str, where: str) -> list[Word]:
        if cls.startswith("#"):
            low, _, high = cls[1:].partition("-")
            return [{"id": f"#{n}", "": str(n).translate(self.digits)} for n in range(int(low), int(high) + 1)]
        if cls not in self.grammar.pools:
            self.fail(where, f"asks for the class {cls!r}, which no word has")
        return self.grammar.pools[cls]

    def template(self, where: str, source: str, cast: dict[str, list[Word]], shared: Template | None = None) -> Template:
        """Compile a sentence and check that every form it can ask for exists; `shared` lends its slots (bad pairs)."""
        where = f"{where} {source!r}"
        matches = list(_SLOT.finditer(source))
        if re.search(r"[{}]", _SLOT.sub("", source)):
            self.fail(where, "has a slot that cannot be read")
        slots: dict[str, int] = {}
        classes: dict[str, str] = {}
        for match in list(_SLOT.finditer(shared.source)) if shared else matches:
            slots.setdefault(match["name"], len(slots))
            if match["cls"]:
                classes[match["name"]] = match["cls"]
        draws, asked, members = [], [], []
        possible: dict[str, list[Word]] = {}
        for name, slot in slots.items():
            cls = classes.get(name, "")
            if cls.startswith("@"):
                continue
            if cls:
                possible[name] = self.pool(cls, where)
                draws.append((slot, possible[name]))
            elif name in cast:
                possible[name] = cast[name]
                members.append((slot, name))
            else:
                self.fail(where, f"uses {name!r}, which has no class and is not in the cast")
        for name, slot in slots.items():
            asker, _, number = classes.get(name, "")[1:].partition("/")
            if classes.get(name, "").startswith("@"):
                if asker not in possible or any("obj" not in word for word in possible[asker]):
                    self.fail(where, f"asks {asker!r} for a class, but it has none")
                wanted = {word["obj"] for word in possible[asker]}
                pools = {obj: self.pool(f"{obj}/{number}" if number else obj, where) for obj in sorted(wanted)}
                asked.append((slot, slots[asker], pools))
                possible[name] = [word for pool in pools.values() for word in pool]
        pieces, at = [], 0
        for match in matches:
            name, form, agree = match["name"], match["form"] or "", match["agree"]
            if any(other not in slots for other in [name] + ([agree] if agree else [])):
                self.fail(where, f"refers to a slot it does not have in {match[0]}")
            governor, key = -1, form
            if form.startswith("$"):
                asker, dot, rest = form[1:].partition(".")
                if asker not in slots:
                    self.fail(where, f"refers to a slot it does not have in {match[0]}")
                governor, key = slots[asker], dot + rest
            feature = {"~": "gn", "^": "pn"}.get(match["mark"], "")
            if agree and (key or governor >= 0):
                key += "."
            govs = {word["gov"] for word in possible[form[1:].partition(".")[0]]} if governor >= 0 else {""}
            agrees = {word[feature] for word in possible[agree]} if agree else {""}
            keys = self.grammar.mention if form == "*" else [g + key + a for g, a in product(sorted(govs), sorted(agrees))]
            for word, wanted_key in product(possible[name], keys):
                if wanted_key not in word:
                    self.fail(where, f"asks {word['id']!r} for the form {wanted_key!r}, which it does not have")
            pieces.append((_plain(source[at : match.start()]), slots[name], key, governor,
                           slots[agree] if agree else -1, feature))  # fmt: skip
            at = match.end()
        capital = len(source) - len(source.lstrip("–—“”«»„\"' "))
        return Template(source, len(slots), draws, asked, members, pieces, _plain(source[at:]), capital)

    def text(self, name: str, text: dict[str, Any]) -> None:
        where = f"texts.{name}"
        for key in ("weight", "cast", "open", "body", "end"):
            if key not in text:
                self.fail(f"{where}.{key}", "is missing")
        cast = {member: self.pool(cls, where) for member, cls in text["cast"].items()}

        def group(key: str) -> list[Template]:
            if key not in self.groups:
                self.fail(where, f"names the group {key!r}, which templates does not hold")
            return [self.template(f"templates.{key}", source, cast) for source in self.groups[key]]

        body = [group(key) for key in text["body"]]
        title = group(text["title"]) if "title" in text else []
        weights = list(accumulate(text["body"].values()))
        self.grammar.texts.append(Text(cast, title, group(text["open"]), body, weights, group(text["end"])))

    def pair(self, name: str, pair: dict[str, Any]) -> None:
        where = f"pairs.{name}"
        if pair.get("differ") not in ("word", "order") or not pair.get("items"):
            self.fail(where, "needs `differ: word` or `differ: order`, and items")
        items = []
        for good, bad in pair["items"]:
            first = self.template(where, good, {})
            items.append((first, self.template(where, bad, {}, first)))
        self.grammar.pairs.append((name, pair["differ"] == "order", items))


def _plain(text: str) -> str:
    return text.replace("_", " ").replace("=", "\u200c")


def read_grammar(path: Path) -> Grammar:
    """Read, check and compile a language's data file.

    Raises HyperLlamaError naming the file and the key when it is not what the module's docstring describes.
    """
    return _Reader(path).grammar


@cache
def grammar(language: str) -> Grammar:
    """The built-in grammar of a language tag; HyperLlamaError when there is none."""
    if language not in LANGUAGES:
        raise HyperLlamaError(f"there is no sample text in {language!r}: choose from {', '.join(LANGUAGES)}")
    return read_grammar(Path(__file__).with_name("languages") / f"{language}.yaml")


def _rng(*key: object) -> Random:
    """A generator that depends on the key alone; only its .random() is used, which every Python version keeps."""
    return Random(int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little"))


def _paragraphs(language: str, seed: int, start: int) -> Iterator[list[list[str]]]:
    made = grammar(language)
    return (made.document(_rng("document", language, seed, index)) for index in count(start))


def _join(paragraphs: list[list[str]]) -> str:
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)


def documents(language: str, seed: int, start: int = 0) -> Iterator[str]:
    """Endless documents from number `start` on; document i is a pure function of (language, seed, i).

    Raises HyperLlamaError when the language is not one of LANGUAGES.
    """
    return (_join(paragraphs) for paragraphs in _paragraphs(language, seed, start))


def minimal_pairs(language: str, seed: int, count: int) -> Iterator[dict[str, str]]:
    """`count` pairs {"good", "bad", "phenomenon", "lang", "source"}: one word, or the order of the words, differs.

    No two have the same good sentence. Raises HyperLlamaError when the templates cannot make that many.
    """
    made = grammar(language)
    seen: set[str] = set()
    for index in range(count):
        for attempt in range(200):  # a pair whose forms happen to coincide, or that we had, is drawn again
            name, good, bad = made.pair(index, _rng("pair", language, seed, index, attempt))
            if good != bad and good not in seen:
                break
        else:
            raise HyperLlamaError(f"the {language} sample text has fewer than {count} minimal pairs: ask for fewer")
        seen.add(good)
        yield {"good": good, "bad": bad, "phenomenon": name, "lang": language, "source": SOURCE}


def _write_documents(
    path: Path, language: str, seed: int, start: int, size: int, banned: set[str]
) -> Iterator[str]:
    """Write documents until their texts hold `size` UTF-8 bytes; yield each text.

    A document is left out when it is banned, or when one of its sentences is.
    """
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for paragraphs in _paragraphs(language, seed, start):
            if written >= size:
                break
            text = _join(paragraphs)
            if text in banned or any(not banned.isdisjoint(paragraph) for paragraph in paragraphs):
                continue
            file.write(json.dumps({"text": text, "lang": language, "source": SOURCE}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            yield text


def write_corpus(
    out: Path, languages: Iterable[str], bytes_per_language: int, *, seed: int, dev_bytes: int, pairs: int
) -> None:
    """Write a folder of sample text, laid out as a folder of real text, atomically.

    out/text/<language>/train.jsonl and dev.jsonl hold the fewest documents whose texts reach `bytes_per_language` and
    `dev_bytes` bytes of UTF-8; out/minimal_pairs/<language>.jsonl holds `pairs` pairs; out/README.md says what it is.
    Guaranteed: no dev document equals a train document, and no sentence of a train or dev document equals the good or
    the bad sentence of a minimal pair. Dev and pairs still use the words and templates of the training text.
    Raises HyperLlamaError when a language is unknown or `out` already exists.
    """
    languages = list(languages)
    with atomic_folder(out) as folder:
        (folder / "minimal_pairs").mkdir()
        for language in languages:
            texts = folder / "text" / language
            texts.mkdir(parents=True)
            banned: set[str] = set()
            with open(folder / "minimal_pairs" / f"{language}.jsonl", "w", encoding="utf-8") as file:
                for pair in minimal_pairs(language, seed, pairs):
                    banned |= {pair["good"], pair["bad"]}
                    file.write(json.dumps(pair, ensure_ascii=False) + "\n")
            banned |= set(_write_documents(texts / "dev.jsonl", language, seed, DEV_START, dev_bytes, banned))
            for _ in _write_documents(texts / "train.jsonl", language, seed, 0, bytes_per_language, banned):
                pass
        readme = _README.format(languages=", ".join(languages), seed=seed)
        (folder / "README.md").write_text(readme, encoding="utf-8")
