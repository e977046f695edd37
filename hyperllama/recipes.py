"""Recipes as mappings: YAML files, read strictly, and `a.b=c` assignments over them."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from hyperllama.errors import HyperLlamaError


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads 3e-3 as a number (YAML 1.1 wants a dot)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: the keys of another mapping, which these override
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is not a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    value = loader.construct_scalar(node)
    try:
        return float(value)
    except ValueError:
        return value


_RecipeLoader.add_implicit_resolver("!exponent", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
_RecipeLoader.add_constructor("!exponent", _construct_scalar)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises HyperLlamaError naming the file (and line) when it is missing, not YAML, or not a mapping.
    """
    return parse_yaml(read_text(path), path)


def read_text(path: str | Path) -> str:
    """Read a recipe's text.

    Raises HyperLlamaError naming the file when it is missing, a folder, or not UTF-8.
    """
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HyperLlamaError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise HyperLlamaError(f"{path} is a folder; a YAML recipe was expected") from None
    except UnicodeDecodeError as error:
        raise HyperLlamaError(f"{path} is not UTF-8 text: {error}") from None


def parse_yaml(text: str, where: str | Path) -> dict[str, Any]:
    """A YAML mapping from text; `where` names it in errors. Raises HyperLlamaError as read_yaml does."""
    try:
        values = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise HyperLlamaError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise HyperLlamaError(f"{where} is not a recipe: expected a mapping of keys to values")
    return values


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments (c is YAML) to nested `values`, in place, and return them.

    A number addresses a list element: `data.sources.0.weight=2`.
    Raises HyperLlamaError for a malformed assignment or an index outside its list.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise HyperLlamaError(f"{assignment!r} is not an override: write key.subkey=value")
        value = parse_yaml(f"value: {text}", f"the override {assignment!r}")["value"]
        *parents, last = key.split(".")
        node: Any = values
        for part in parents:
            if isinstance(node, list):
                node = node[_index(node, part, assignment)]
            elif isinstance(node, dict):
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
            else:
                raise HyperLlamaError(f"the override {assignment!r} goes through a value that is not a section")
        if isinstance(node, list):
            node[_index(node, last, assignment)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise HyperLlamaError(f"the override {assignment!r} goes through a value that is not a section")
    return values


def _index(values: list[Any], part: str, assignment: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise HyperLlamaError(f"the override {assignment!r}: {part!r} is not an index of a list of {len(values)}")
    return int(part)
