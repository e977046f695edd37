"""The merges a study can name: the methods of merge/methods.py, and task arithmetic or a mean that knows of languages.

    token_counts, adam_v, token_counts_adam_v    each row or element weighed by what a model knows of it (merge/importance.py)
    learnt_by_row                                and weights learnt on text of all languages (merge/learned.py)
    adam_v_learnt_by_tensor, adam_v_learnt_by_row
    regmean                                      linear layers by least squares on text of each language (merge/regmean.py)

Those that read text spend FLOPs of their own, which no joint run got: their ledgers are larger by exactly these.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperllama.merge.methods import METHODS

PAPERS = ("linear", "multislerp", "task_arithmetic", "ties", "dare_ties")
TRIMMED = ("ties", "dare_ties")  # by a density
AWARE: dict[str, dict[str, Any]] = {
    "token_counts": {"importance": ["token_counts"]},
    "adam_v": {"importance": ["adam_v"]},
    "token_counts_adam_v": {"importance": ["token_counts", "adam_v"]},
    "learnt_by_row": {"learn": "row"},
    "adam_v_learnt_by_tensor": {"importance": ["adam_v"], "learn": "tensor"},
    "adam_v_learnt_by_row": {"importance": ["adam_v"], "learn": "row"},
    "regmean": {"regmean": True},
}
NAMES = (*METHODS, *AWARE)
TITLES = {
    "adam_v": "Adam's v",
    "token_counts_adam_v": "token counts and Adam's v",
    "adam_v_learnt_by_tensor": "Adam's v, learnt by tensor",
    "adam_v_learnt_by_row": "Adam's v, learnt by row",
    "regmean": "RegMean",
}


def reads_text(name: str) -> bool:
    """Whether a merge learns from text, and spends FLOPs on it."""
    return bool(AWARE.get(name, {}).keys() & {"learn", "regmean"})


def merge_values(
    name: str,
    base: str,
    models: Mapping[str, str],
    texts: Mapping[str, Path],
    *,
    density: float,
    steps: int,
    windows: int,
) -> dict[str, Any]:
    """The named merge as values of a recipe: every model's weight is 1, and weights are divided by their sum.

    models: language -> folder; texts: language -> file, of these and of the base language; steps, windows: of learning.
    """
    aware = AWARE.get(name, {})
    method = name if name in METHODS else "linear" if "regmean" in aware else "task_arithmetic"
    parameters: dict[str, Any] = {"weight": 1.0} | ({"density": density} if method in TRIMMED else {})
    extensions: dict[str, Any] = {}
    if "importance" in aware:
        extensions["importance"] = [{"by": by} for by in aware["importance"]]
    if "learn" in aware:
        files = [str(file) for file in texts.values()]
        extensions["learn"] = {"texts": files, "by": aware["learn"], "steps": steps, "windows": windows}
    if "regmean" in aware:
        extensions["regmean"] = {"texts": [str(texts[tag]) for tag in models]}
    return (
        {"merge_method": method}
        | ({} if method == "linear" else {"base_model": base})
        | {"models": [{"model": folder, "parameters": dict(parameters)} for folder in models.values()]}
        | {"parameters": {"normalize": True}}
        | ({"hyperllama": extensions} if extensions else {})
    )
