"""RegMean: its least squares against numpy's solver on the models' inputs, taken by hooks of transformers; what is refused."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.folder import folder_start
from hyperllama.flops import window_flops
from hyperllama.hub import model_config
from hyperllama.merge import parse_recipe, plan, run
from hyperllama.merge.learned import read_texts
from hyperllama.merge.regmean import RIDGE
from tests.merge.test_learned import models  # noqa: F401
from tests.study import LANGUAGES, SEQ_LEN

LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def texts(folder) -> list[str]:
    return [str(folder / "corpus" / "text" / tag / "dev.jsonl") for tag in LANGUAGES]


def recipe(folder, method="linear", weights=(1.0, 2.0), extra=None, parameters=None, **keys):
    value = {
        "merge_method": method,
        "models": [
            {"model": f"{tag}/model", "parameters": {"weight": w}} for tag, w in zip(LANGUAGES, weights, strict=True)
        ],
        "parameters": {"normalize": True} | (parameters or {}),
        "hyperllama": {"regmean": {"texts": texts(folder), "windows": 9} | keys} | (extra or {}),
    }
    if method != "linear":
        value["base_model"] = "base/model"
    return parse_recipe(yaml.safe_dump(value), "r.yaml")


def inputs_of(folder, tag, name, file):
    """What a layer of a model reads on the windows of its text that the merge draws, (tokens, K) fp64."""
    model = LlamaForCausalLM.from_pretrained(folder / tag / "model", dtype=torch.float64)
    tokenizer = Tokenizer.load(folder / tag / "model")
    (text,) = read_texts([file], tokenizer, folder_start(folder / tag / "model", tokenizer), SEQ_LEN)
    order = torch.randperm(len(text.windows), generator=torch.Generator().manual_seed(0))[:9]
    seen = []
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(text.windows[order, :-1])
    return seen[0].numpy(), layer.weight.detach().numpy()


def test_it_is_the_least_squares_solution_on_the_models_own_inputs(models, tmp_path):  # noqa: F811
    """Stacked to numpy's lstsq: inputs, what the scaled off-diagonal adds to the diagonal, the ridge."""
    run(plan(recipe(models), models), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for layer in LAYERS:
        name = f"model.layers.1.{layer}"
        rows, outputs, plain = [], [], 0
        for tag, weight, file in zip(LANGUAGES, (1.0, 2.0), texts(models), strict=True):
            x, w = inputs_of(models, tag, name, file)
            power = np.square(x).mean(0)
            for part in (np.sqrt(0.9 / len(x)) * x, np.diag(np.sqrt(0.1 * power + RIDGE * power.mean()))):
                rows.append(np.sqrt(weight) * part)
                outputs.append(np.sqrt(weight) * part @ w.T)
            plain = plain + weight * w / 3
        expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(outputs), rcond=None)[0].T
        moved = np.abs(expected - plain).max()
        assert moved > 1e-4  # it is another merge than the mean
        assert (
            np.abs(found[f"{name}.weight"].numpy() - expected).max() < 1e-3 * moved
        )  # fp32 sums, a condition of some thousands
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        parts = [load_file(models / tag / "model" / "model.safetensors")[name] for tag in LANGUAGES]
        torch.testing.assert_close(found[name], (parts[0] + 2 * parts[1]) / 3)


def test_only_the_diagonal_is_a_mean_by_column(models, tmp_path):  # noqa: F811
    run(plan(recipe(models, off_diagonal=0.0), models), tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    x, w = zip(*(inputs_of(models, tag, name, f) for tag, f in zip(LANGUAGES, texts(models), strict=True)), strict=True)
    scales = [k * (np.square(each).mean(0) + RIDGE * np.square(each).mean()) for k, each in zip((1, 2), x, strict=True)]
    expected = (scales[0] * w[0] + scales[1] * w[1]) / (scales[0] + scales[1])
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_under_task_arithmetic_lambda_moves_from_the_base(models, tmp_path):  # noqa: F811
    for lam in (1.0, 0.25):
        made = plan(recipe(models, "task_arithmetic", parameters={"lambda": lam}), models)
        run(made, tmp_path / str(lam))
    run(plan(recipe(models), models), tmp_path / "linear")
    name = "model.layers.1.self_attn.q_proj.weight"
    whole, quarter, linear = (load_file(tmp_path / n / "model.safetensors")[name] for n in ("1.0", "0.25", "linear"))
    base = load_file(models / "base" / "model" / "model.safetensors")[name]
    torch.testing.assert_close(whole, linear, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(quarter, base + 0.25 * (linear - base), rtol=1e-5, atol=1e-6)


def test_the_card_says_what_it_cost_and_read(models, tmp_path):  # noqa: F811
    result = run(plan(recipe(models), models), tmp_path / "out")
    card = json.loads((tmp_path / "out" / "hyperllama.json").read_text())
    config = model_config(json.loads((tmp_path / "out" / "config.json").read_text()), tmp_path)
    d, f, h = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    shapes = [(h + 2 * kv, d), (d, h), (2 * f, d), (d, f)]  # packed: rows, inputs
    per_model = 9 * window_flops(config, SEQ_LEN) // 3
    per_model += config.num_layers * sum(2 * k * k * (9 * SEQ_LEN + n) for n, k in shapes)
    solving = config.num_layers * sum(4 * n * k * k + k**3 // 3 for n, k in shapes)
    assert result["ledger"]["spent"] == card["ledger"]["spent"] == 2 * per_model + solving
    assert card["regmean"]["windows"] == {f"{tag}/model": 9 for tag in LANGUAGES}
    assert [made["path"] for made in card["made_from"][-2:]] == texts(models)


def test_weights_by_tensor_have_sums_of_their_own(models, tmp_path):  # noqa: F811
    """A filter inside a packed tensor: k follows one model alone, q both."""
    value = yaml.safe_load(recipe(models).source)
    for i, entry in enumerate(value["models"]):
        entry["parameters"]["weight"] = [{"filter": "k_proj", "value": 1 - i}, {"value": 1}]
    run(plan(parse_recipe(yaml.safe_dump(value), "r"), models), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    alone = load_file(models / LANGUAGES[0] / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.{}_proj.weight"
    torch.testing.assert_close(found[name.format("k")], alone[name.format("k")])
    assert not torch.allclose(found[name.format("q")], alone[name.format("q")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ties"}, "regmean works with linear and task_arithmetic, not with ties"),
        ({"extra": {"importance": [{"by": "adam_v"}]}}, "regmean and hyperllama.importance can't be used together"),
        ({"extra": {"compat": "mergekit"}}, "not with compat: mergekit"),
        ({"texts": ["one.txt"]}, "has 1 files for 2 models"),
        ({"off_diagonal": 1.0}, "off_diagonal"),
        ({"parameters": {"normalize": False}}, "needs normalize: true"),
        ({"weights": (1.0, -0.5)}, r"weights of 0 or more, not all 0; they are \[1.0, -0.5\]"),
    ],
)
def test_bad_recipes_are_refused_before_any_work(models, changes, message):  # noqa: F811
    with pytest.raises(HyperLlamaError, match=message):
        plan(recipe(models, **changes), models)


def test_inputs_that_are_not_finite_are_an_error(models, tmp_path):  # noqa: F811
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (models / LANGUAGES[1] / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] *= float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    value = yaml.safe_load(recipe(models).source)
    value["models"][1]["model"] = str(broken)
    with pytest.raises(
        HyperLlamaError, match=r"broken on .*dev\.jsonl: the inputs of layers\.0\.qkv have NaN or infinity"
    ):
        run(plan(parse_recipe(yaml.safe_dump(value), "r"), models), tmp_path / "out")
    assert not (tmp_path / "out").exists()
