"""Recipes: what a mergekit YAML means, worked out by hand, and what is refused with which sentence."""

from pathlib import Path
from typing import Any

import pytest

from hyperllama.errors import HyperLlamaError
from hyperllama.merge import parse_recipe, read_recipe
from hyperllama.merge.recipe import evaluate, first_set

TWO = "models:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 1}}\n"


@pytest.mark.parametrize(
    ("setting", "t", "value"),
    [
        (0.3, 0.0, 0.3),
        (0.3, 1.0, 0.3),
        ([0.2, 0.9], 0.0, 0.2),
        ([0.2, 0.9], 0.5, 0.55),
        ([0.2, 0.9], 1.0, 0.9),
        ([0, 0.5, 0.3, 0.7, 1], 0.25, 0.5),
        ([0, 0.5, 0.3, 0.7, 1], 0.375, 0.4),
        ([0, 10], 1 / 3, 10 / 3),
        ([7], 1.0, 7),
        ([True, False, True], 0.4, True),
        ([True, False, True], 0.5, False),
    ],
)
def test_gradients_are_interpolated(setting: object, t: float, value: float) -> None:
    assert evaluate(setting, "any", t) == pytest.approx(value)


def test_the_first_matching_filter_wins() -> None:
    setting = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "norm", "value": 3}, {"filter": "*", "value": 4}]
    assert evaluate(setting, "model.layers.1.self_attn.q_proj.weight", 0.25) == 0.25
    assert evaluate(setting, "model.layers.1.post_attention_layernorm.weight", 0.25) == 3
    assert evaluate(setting, "model.embed_tokens.weight", 0.0) == 4
    assert evaluate(setting[:2], "model.embed_tokens.weight", 0.0) is None
    assert evaluate([{"value": 5}, {"filter": "embed", "value": 6}], "model.embed_tokens.weight", 0.0) == 5


def test_lookup_goes_outwards_past_filters_that_do_not_match() -> None:
    levels: list[dict[str, Any]] = [{"weight": [{"filter": "mlp", "value": 1}]}, {}, {"weight": 2, "density": 0.5}]
    assert first_set(levels, "weight", "x.mlp.y", 0.0) == 1
    assert first_set(levels, "weight", "x.self_attn.y", 0.0) == 2
    assert first_set(levels, "density", "x.mlp.y", 0.0) == 0.5
    assert first_set(levels, "lambda", "x.mlp.y", 0.0) is None


def test_the_source_is_kept_verbatim() -> None:
    text = f"# why we merge\nmerge_method: linear\n{TWO}"
    assert parse_recipe(text, "x").source == text


def test_keys_without_effect_are_noted() -> None:
    text = "merge_method: task_arithmetic\nbase_model: c\nchat_template: auto\nparameters: {int8_mask: true}\n"
    recipe = parse_recipe(text + "models: [{model: a, parameters: {weight: 1, density: 0.5}}]", "x")
    assert recipe.notes == [
        "density has no effect under task_arithmetic",
        "int8_mask has no effect under task_arithmetic",
        "chat_template has no effect: the tokenizer files are copied as they are",
    ]


def test_the_tokenizer_may_be_that_of_any_model() -> None:
    assert parse_recipe(f"merge_method: linear\ntokenizer_source: b\n{TWO}", "x").tokenizer_source == "b"


def test_what_may_be_empty() -> None:
    recipe = parse_recipe(f"merge_method: linear\nparameters:\nhyperllama:\ntokenizer_source:\n{TWO}", "x")
    assert recipe.parameters == {}
    assert recipe.notes == []


def model(parameters: str, more: str = "") -> str:
    return f"merge_method: ties\nbase_model: c\nmodels:\n- model: a\n  parameters: {parameters}\n{more}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", r"r.yaml is not valid YAML: .*line 1"),
        ("- 1", r"r.yaml is not a recipe: expected a mapping"),
        (f"merge_methd: linear\n{TWO}", r"unknown key 'merge_methd'; did you mean 'merge_method'\?"),
        (TWO, r"merge_method: Field required"),
        (f"merge_method: lineer\n{TWO}", r"merge_method 'lineer' is unknown; did you mean 'linear'\?"),
        (f"merge_method: frankenmerge\n{TWO}", r"valid are arcee_fusion, breadcrumbs, .*, ties"),
        ("merge_method: linear\nmodels: [{model: a, paramters: {}}]", r"models\[0\]: .*did you mean 'parameters'\?"),
        (model("{wieght: 1}"), r"models\[0\].parameters.wieght is no parameter of ties; did you mean 'weight'\?"),
        (model("{t: 1}"), r"parameters.t is no parameter of ties; valid are density, weight"),
        (model("{weight: 1, lambda: 1}"), r"lambda is not a parameter of one model; move it to the top level"),
        (model("{weight: heavy}"), r"'heavy' is text, expected a number"),
        ("merge_method: linear\nmerge_method: ties", r"given twice"),
        (model("{weight: .nan}"), r"nan is not a finite number"),
        (model("{weight: []}"), r"an empty list"),
        (model("{weight: {filter: mlp, value: 1}}"), r"a filter must be an item of a list"),
        (model("{weight: [{filter: mlp}]}"), r"needs a 'value'"),
        (model("{weight: [{filter: mlp, val: 1, value: 1}]}"), r"unknown key 'val' beside a filter"),
        (model("{weight: [{value: 1}, 2]}"), r"every item of a list of filters"),
        (f"merge_method: ties\n{TWO}", r"ties needs a base_model"),
        ("merge_method: linear", r"exactly one of 'models' and 'slices'"),
        (f"merge_method: linear\nslices: []\nmodules: {{x: 1}}\n{TWO}", r"modules is not supported"),
        (f"merge_method: linear\ndtype: float8\n{TWO}", r"dtype 'float8' is not supported; did you mean 'float"),
        (f"merge_method: linear\ntokenizer_source: union\n{TWO}", r"tokenizer_source is not supported beyond"),
        (f"merge_method: linear\ntokenizer: {{source: base}}\n{TWO}", r"tokenizer is not supported beyond"),
        (f"merge_method: linear\ntokenizer_source: base\n{TWO}", r"there is no base_model"),
        (
            f"merge_method: linear\nhyperllama: {{sed: 1}}\n{TWO}",
            r"hyperllama: unknown key 'sed'; did you mean 'seed'\?",
        ),
        (f"merge_method: linear\nhyperllama: {{seed: x}}\n{TWO}", r"hyperllama.seed: .*integer"),
        (f"merge_method: linear\nhyperllama: {{compat: x}}\n{TWO}", r"hyperllama.compat: .*'mergekit'"),
        (f"merge_method: linear\nsource: x\n{TWO}", r"unknown key 'source'"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]", r"holds no layer"),
        (
            "merge_method: linear\n"
            "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 1]}]}]",
            r"slices\[0\]: the sources of a slice must have equally many layers: a \[0, 2\], b \[0, 1\]",
        ),
    ],
)
def test_mistakes_are_named(text: str, sentence: str) -> None:
    with pytest.raises(HyperLlamaError, match=sentence) as error:
        parse_recipe(text, "r.yaml")
    assert "r.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(HyperLlamaError, match=r"none.yaml does not exist"):
        read_recipe(tmp_path / "none.yaml")


def test_merge_keys_of_yaml_are_followed() -> None:
    text = "merge_method: linear\nx: &p {weight: 0.5}\nmodels: [{model: a, parameters: {<<: *p, density: 1}}]"
    with pytest.raises(HyperLlamaError, match="unknown key 'x'"):
        parse_recipe(text, "r.yaml")
    text = "merge_method: linear\nmodels: [{model: a, parameters: &p {weight: 0.5}}, {model: b, parameters: {<<: *p}}]"
    assert parse_recipe(text, "r.yaml").models[1].parameters == {"weight": 0.5}
