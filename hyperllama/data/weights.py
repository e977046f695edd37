"""How much of each source: by its size, by temperature, by UniMax; and a table of what that means.

    size           p(source) ~ size
    temperature    p(source) ~ size ** exponent                     exponent = 1/T: 1 is by size, 0 is all alike
    UniMax         the same for all, but no more than max_epochs times what there is: unimax()

Sizes are characters or tokens. Weights of a mixture are shares of windows, so characters become tokens by each source's own
characters a token.
"""

import math
from collections.abc import Sequence
from typing import Any

from hyperllama.config import MixSettings
from hyperllama.data.shards import Shards
from hyperllama.errors import HyperLlamaError


def unimax(sizes: dict[str, int], budget: int, max_epochs: float) -> dict[str, int]:
    """Share `budget` tokens (or characters) among languages of such sizes as evenly as `max_epochs` repetitions allow.

    UniMax, algorithm 1 of Chung et al. 2023 (arXiv 2304.09151). The shares sum to `budget` exactly, or to every
    language's limit when the budget is larger than that.
    """
    left, shares = budget, dict.fromkeys(sizes, 0)
    for done, language in enumerate(sorted(sizes, key=lambda tag: (sizes[tag], tag))):
        shares[language] = min(left // (len(sizes) - done), math.floor(sizes[language] * max_epochs))
        left -= shares[language]
    return shares


def temperature(sizes: dict[str, int], exponent: float) -> dict[str, float]:
    """Shares that sum to 1 and are as size ** exponent (Conneau and Lample 2019, arXiv 1901.07291, section 3.1)."""
    raised = {name: size**exponent for name, size in sizes.items()}
    return {name: value / sum(raised.values()) for name, value in raised.items()}


def size_of(shards: Shards, unit: str) -> int:
    """Tokens or characters of a shard folder. Raises HyperLlamaError where characters were not counted."""
    size = shards.manifest.get(unit)
    if not size:
        raise HyperLlamaError(f"{shards.path} has no count of {unit}: build it again, or mix by tokens")
    return size


def mix_weights(shards: Sequence[Shards], mix: MixSettings) -> list[float]:
    """Weights of the sources in tokens of an endless run (UniMax: of the budget), any scale."""
    sizes = {str(i): size_of(folder, mix.unit) for i, folder in enumerate(shards)}
    if mix.by == "unimax":
        assert mix.budget is not None  # MixSettings requires it
        amounts: dict[str, float] = dict(unimax(sizes, int(mix.budget), mix.max_epochs))
    else:
        amounts = temperature(sizes, 1.0 if mix.by == "size" else mix.exponent)
    return [
        amount * folder.tokens / size_of(folder, mix.unit)
        for folder, amount in zip(shards, amounts.values(), strict=True)
    ]


def table(shards: Sequence[Shards], mix: MixSettings) -> list[dict[str, Any]]:
    """A row a language of each folder (size, fertility), with the folder's share and epochs when `mix.budget` is spent.

    fertility: tokens a word, EOS left out; words are what stands between white space.
    """
    weights = mix_weights(shards, mix)
    rows = []
    for folder, weight in zip(shards, weights, strict=True):
        share = weight / sum(weights)
        row: dict[str, Any] = {"share": share}
        if mix.budget is not None:
            in_tokens = weight if mix.by == "unimax" else share * _budget_tokens(shards, weights, mix)
            row |= {"taken_tokens": round(in_tokens), "epochs": in_tokens / folder.tokens}
        for tag in folder.languages:
            counts = folder.manifest["languages"][tag]
            text = counts["tokens"] - counts["documents"]
            sizes = {key: counts.get(key) or None for key in ("documents", "tokens", "characters", "bytes", "words")}
            per = {
                "tokens_per_word": text / counts["words"] if counts.get("words") else None,
                "characters_per_token": counts["characters"] / text if counts.get("characters") else None,
            }
            rows.append({"name": folder.path.name, "language": tag, **sizes, **per, **row})
    return rows


def _budget_tokens(shards: Sequence[Shards], weights: Sequence[float], mix: MixSettings) -> float:
    """The budget in tokens, when sources are drawn by `weights`."""
    assert mix.budget is not None
    per_token = sum(
        weight / sum(weights) * size_of(folder, mix.unit) / folder.tokens
        for folder, weight in zip(shards, weights, strict=True)
    )
    return mix.budget / per_token
