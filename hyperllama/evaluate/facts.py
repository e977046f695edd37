"""Facts in mParaRel's form (Fierro and Søgaard 2022, arXiv 2203.11552): does a model rank the right object first, however asked?

    patterns/<language>/<relation>.jsonl    {"pattern": "The capital of [X] is [Y]"}         paraphrases of one relation
    tuples/<language>/<relation>.jsonl      {"sub_label": "Sweden", "obj_label": "Stockholm", "lineid": 0}

Every pattern is asked of every fact; candidates are all objects of the relation in that language. A candidate's score is the
log-probability of the whole sentence with it (per character, when by length). Figures:

    accuracy                the right object is strictly likelier than all others
    mrr                     mean of 1 / rank; a tie counts half a rank
    consistency             of all pairs of paraphrases of a fact, those with the same object first (Elazar et al. 2021)
    consistent_accuracy     facts that are right in every paraphrase
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.rows import read_rows
from hyperllama.evaluate.score import score, start_token, window_length
from hyperllama.evaluate.statistics import bootstrap
from hyperllama.model import Llama


@dataclass(frozen=True)
class Relation:
    """One relation in one language: paraphrases, and (subject, object) pairs."""

    language: str
    name: str
    patterns: list[str]
    facts: list[tuple[str, str]]

    @property
    def candidates(self) -> list[str]:
        """The objects, each once."""
        return list(dict.fromkeys(obj for _, obj in self.facts))


def read_facts(folder: str | Path) -> list[Relation]:
    """Read all relations of all languages.

    Raises HyperLlamaError naming the file (and line) that is missing, no such object, a pattern without [X] and [Y], or a
    relation with fewer than two objects.
    """
    folder = Path(folder)
    relations = []
    for patterns in sorted(folder.glob("patterns/*/*.jsonl")):
        language, name = patterns.parent.name, patterns.stem
        tuples = folder / "tuples" / language / patterns.name
        asked = [text for _, (text,) in read_rows(patterns, ("pattern",))]
        for pattern in asked:
            if "[X]" not in pattern or "[Y]" not in pattern:
                raise HyperLlamaError(f"{patterns}: the pattern {pattern!r} lacks [X] or [Y]")
        facts = [(subject, obj) for _, (subject, obj) in read_rows(tuples, ("sub_label", "obj_label"))]
        relation = Relation(language, name, asked, facts)
        if len(relation.candidates) < 2:
            raise HyperLlamaError(f"{tuples} has fewer than two different objects: there is nothing to rank")
        relations.append(relation)
    if not relations:
        raise HyperLlamaError(f"{folder} holds no patterns/<language>/<relation>.jsonl")
    return relations


def evaluate_facts(
    model: Llama,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    by: str = "sentence",
    start: int | None = None,
    seq_len: int | None = None,
) -> dict[str, Any]:
    """Ask all facts of a folder: {languages: {tag: figures}, relations: {tag/name: figures}, flops}.

    figures: {facts, patterns, accuracy, accuracy_interval (bootstrap over facts), mrr, consistency, consistent_accuracy}.
    by: sentence, or length (per character). Other arguments and errors as in score_text, and of read_facts.
    """
    if by not in ("sentence", "length"):
        raise HyperLlamaError(f"facts are ranked by sentence or by length, not by {by!r}")
    start = start_token(tokenizer) if start is None else start
    seq_len = window_length(model, seq_len)
    flops = 0
    found: dict[str, list[np.ndarray]] = {}
    relations = {}
    for relation in read_facts(folder):
        texts = [
            pattern.replace("[X]", subject).replace("[Y]", candidate)
            for subject, _ in relation.facts
            for pattern in relation.patterns
            for candidate in relation.candidates
        ]
        scored = score(model, tokenizer.encode_batch(texts), start=start, seq_len=seq_len)
        flops += scored.flops
        nll = np.array(scored.nll) / ([len(text) for text in texts] if by == "length" else 1)
        answers = _answers(nll.reshape(len(relation.facts), len(relation.patterns), -1), relation)
        found.setdefault(relation.language, []).append(answers)
        relations[f"{relation.language}/{relation.name}"] = {
            "facts": len(answers), "patterns": len(relation.patterns), **_figures(answers)
        }  # fmt: skip
    languages = {
        tag: {"facts": sum(map(len, parts)), "relations": len(parts), **_figures(np.concatenate(parts))}
        for tag, parts in sorted(found.items())
    }
    return {"languages": languages, "relations": relations, "flops": flops}


def _answers(nll: np.ndarray, relation: Relation) -> np.ndarray:
    """Of (facts, patterns, candidates) nll: accuracy, mrr, consistency, right everywhere, of each fact: (facts, 4)."""
    objects = relation.candidates
    right = np.array([objects.index(obj) for _, obj in relation.facts])
    own = np.take_along_axis(nll, right[:, None, None], axis=2)
    better, equal = (nll < own).sum(2), (nll == own).sum(2) - 1
    rank = 1 + better + equal / 2
    first = nll.argmin(2)
    pairs = list(combinations(range(len(relation.patterns)), 2))
    same = [first[:, a] == first[:, b] for a, b in pairs] or [np.ones(len(nll), dtype=bool)]
    hits = rank == 1
    return np.stack([hits.mean(1), (1 / rank).mean(1), np.mean(same, axis=0), hits.all(1)], axis=1)


def _figures(answers: np.ndarray) -> dict[str, Any]:
    accuracy, mrr, consistency, everywhere = answers.mean(0).tolist()
    (interval,), _ = bootstrap([answers[:, 0]], np.ones(len(answers)))
    return {
        "accuracy": accuracy,
        "accuracy_interval": list(interval),
        "mrr": mrr,
        "consistency": consistency,
        "consistent_accuracy": everywhere,
    }
