"""Merging models of one shape by a mergekit recipe: `run(plan(read_recipe(path)), out)`; `merge_tensors` in memory."""

from typing import Any

from hyperllama.merge.executor import run
from hyperllama.merge.planner import Plan, plan
from hyperllama.merge.recipe import Recipe, parse_recipe, read_recipe

__all__ = ["Plan", "Recipe", "merge_tensors", "parse_recipe", "plan", "read_recipe", "run"]


def __getattr__(name: str) -> Any:
    if name != "merge_tensors":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from hyperllama.merge.tensors import merge_tensors  # needs torch, which merging folders by csrc does not

    return merge_tensors
