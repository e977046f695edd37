"""Which documents a recipe takes, and in which order: arithmetic on surveys, see recipe.py for what it means."""

import hashlib
import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from hyperllama.data.mixture import permute
from hyperllama.data.recipe import DataRecipe, TextSource
from hyperllama.data.survey import Input, Survey, id_hash
from hyperllama.errors import HyperLlamaError


def choose(
    recipe: DataRecipe, inputs: Sequence[Input], surveys: Sequence[Survey]
) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """Numbers of the documents to take in the order of the output, (N,) int64; and, by source, how many are left out and why.

    Documents are numbered through all files in turn.
    """
    counts = [len(survey.records) for survey in surveys]
    source_of = np.repeat([file.source for file in inputs], counts)
    characters = np.concatenate([survey.characters for survey in surveys]).astype(np.int64)
    candidates = [
        np.flatnonzero(source_of == number)[_by_ids(source, number, inputs, surveys)]
        for number, source in enumerate(recipe.sources)
    ]
    report: dict[str, dict[str, int]] = {source.label: {} for source in recipe.sources}
    for source, taken, number in zip(recipe.sources, candidates, itertools.count()):
        report[source.label]["other_ids"] = int((source_of == number).sum()) - len(taken)
    if recipe.deduplicate:
        digests = np.concatenate([survey.digests for survey in surveys])
        keep = _first_of_each(digests, np.concatenate(candidates))
        for source, number in zip(recipe.sources, itertools.count()):
            report[source.label]["duplicates"] = int((~keep[candidates[number]]).sum())
        candidates = [taken[keep[taken]] for taken in candidates]
    for number, source in enumerate(recipe.sources):
        if source.shuffle:
            taken = candidates[number]
            candidates[number] = taken[permute(np.arange(len(taken)), len(taken), _seed(recipe.seed, source.label))]
        if source.skip is not None:
            passed = int(Fraction(str(source.skip)) * len(candidates[number]))
            report[source.label]["passed_over"] = passed
            candidates[number] = candidates[number][passed:]
    shares = sum(source.share or 0.0 for source in recipe.sources)
    chosen = [
        taken if source.share is not None else taken[: _fitting(source, characters[taken], source.characters)]
        for source, taken in zip(recipe.sources, candidates, strict=True)
    ]
    fixed = sum(
        int(characters[taken].sum())
        for source, taken in zip(recipe.sources, chosen, strict=True)
        if source.share is None
    )
    for number, source in enumerate(recipe.sources):
        if source.share is not None:
            budget = int(source.share / (1 - shares) * fixed)
            chosen[number] = chosen[number][: _fitting(source, characters[chosen[number]], budget)]
        report[source.label] |= {
            "over_budget": len(candidates[number]) - len(chosen[number]),
            "taken": len(chosen[number]),
            "characters": int(characters[chosen[number]].sum()),
        }
    order = np.concatenate(chosen).astype(np.int64)
    if recipe.shuffle and len(order):
        order = order[permute(np.arange(len(order)), len(order), _seed(recipe.seed, ""))]
    return order, report


def _by_ids(source: TextSource, number: int, inputs: Sequence[Input], surveys: Sequence[Survey]) -> np.ndarray | slice:
    """Which of the source's documents its list of ids leaves: a mask over them, or all."""
    listed = source.keep_ids or source.drop_ids
    if listed is None:
        return slice(None)
    try:
        with open(listed, encoding="utf-8") as file:
            wanted = b"".join(id_hash(line.strip()) for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise HyperLlamaError(f"the list of ids {listed} cannot be read: {error}") from None
    ids = [survey.ids for file, survey in zip(inputs, surveys, strict=True) if file.source == number]
    found = np.isin(np.concatenate(ids), np.frombuffer(wanted, dtype="<u8"))
    return found if source.keep_ids else ~found


def _first_of_each(digests: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Mask over all documents: the candidates of which no earlier candidate has the digest."""
    keep = np.zeros(len(digests), dtype=bool)
    low, high = digests[candidates].T
    by_digest = np.lexsort((np.arange(len(candidates)), low, high))
    first = np.ones(len(candidates), dtype=bool)
    first[1:] = (low[by_digest][1:] != low[by_digest][:-1]) | (high[by_digest][1:] != high[by_digest][:-1])
    keep[candidates[by_digest[first]]] = True
    return keep


def _fitting(source: TextSource, characters: np.ndarray, budget: int | None) -> int:
    """How many documents of these lengths the source's budget lets in."""
    if budget is not None:
        return int(np.searchsorted(np.cumsum(characters), budget, side="left"))
    if source.fraction is not None:
        return int(Fraction(str(source.fraction)) * len(characters))
    return len(characters) if source.documents is None else min(source.documents, len(characters))


def _seed(seed: int, label: str) -> int:
    return int.from_bytes(hashlib.sha256(f"shuffle {seed}/{label}".encode()).digest()[:8], "little")
