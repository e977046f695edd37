"""Merging models of one shape by a mergekit recipe: `run(plan(read_recipe(path)), out)`; `merge_tensors` in memory."""

from hyperllama.merge.executor import merge_tensors, run
from hyperllama.merge.planner import Plan, plan
from hyperllama.merge.recipe import Recipe, parse_recipe, read_recipe

__all__ = ["Plan", "Recipe", "merge_tensors", "parse_recipe", "plan", "read_recipe", "run"]
