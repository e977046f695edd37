"""Planning and running merges of folders and of live models: results, refusals, what is written and what never is."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hyperllama.errors import HyperLlamaError
from hyperllama.files import sha256_file
from hyperllama.kernels.hashing import hash_reference
from hyperllama.merge import Recipe, merge_tensors, parse_recipe, plan, run

MakeModel = Callable[..., Path]
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def recipe(**keys: Any) -> Recipe:
    """A recipe from Python values, through YAML's subset JSON."""
    return parse_recipe(json.dumps(keys), "recipe")


def linear(*models: str, **keys: Any) -> Recipe:
    """A plain mean of models."""
    listed = [{"model": model, "parameters": {"weight": 1}} for model in models]
    return recipe(**{"merge_method": "linear", "models": listed, **keys})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def steps_by_name(made: Recipe, cwd: Path) -> dict[str, list[float]]:
    """Tensor name -> weight per model."""
    return {step.name: [value["weight"] for value in step.values] for step in plan(made, cwd).steps}


class TestParameters:
    def test_gradient_over_layers_and_the_tensors_outside_them(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a", tie_word_embeddings=False)
        made = recipe(merge_method="linear", models=[{"model": "a", "parameters": {"weight": [1, 2, 5]}}])
        found = steps_by_name(made, tmp_path)
        assert [found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)] == [[1], [2], [5]]
        assert [found[name] for name in (EMBEDDING, NORM, HEAD)] == [[1], [1], [1]]

    def test_a_slice_of_one_layer_takes_the_last_value(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a")
        source = {"model": "a", "layer_range": [1, 2], "parameters": {"weight": [3, 9]}}
        found = steps_by_name(recipe(merge_method="linear", slices=[{"sources": [source]}]), tmp_path)
        assert found["model.layers.0.mlp.up_proj.weight"] == [9]
        assert found[EMBEDDING] == found[NORM] == [3]

    def test_source_then_slice_then_top_level(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a"), make_model("b")
        own = {"model": "a", "layer_range": [0, 1], "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}
        other = {"model": "b", "layer_range": [0, 1]}
        first = {"sources": [own, other], "parameters": {"weight": [{"filter": "self_attn", "value": 2}]}}
        made = recipe(merge_method="linear", slices=[first, {"sources": [other]}], parameters={"weight": 3})
        found = steps_by_name(made, tmp_path)
        assert found["model.layers.0.mlp.up_proj.weight"] == [1, 3]
        assert found["model.layers.0.self_attn.q_proj.weight"] == [2, 2]
        assert found["model.layers.0.input_layernorm.weight"] == [3, 3]
        assert found["model.layers.1.self_attn.q_proj.weight"] == [3]

    def test_an_unlisted_base_takes_part_in_linear(self, make_model: MakeModel, tmp_path: Path) -> None:
        a, base = weights(make_model("a", 1)), weights(make_model("base", 2))
        made = recipe(merge_method="linear", base_model="base", models=[{"model": "a"}], parameters={"weight": 1})
        run(plan(made, tmp_path), tmp_path / "out")
        torch.testing.assert_close(weights(tmp_path / "out")[NORM], (a[NORM] + base[NORM]) / 2)

    def test_all_weights_zero_keeps_the_base_tensor(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a", 1)
        base = weights(make_model("base", 2))
        only_mlp = [{"filter": "mlp", "value": 1}, {"value": 0}]
        models = [{"model": "a", "parameters": {"weight": only_mlp}}]
        top = {"normalize": True}
        run(
            plan(recipe(merge_method="task_arithmetic", base_model="base", models=models, parameters=top), tmp_path),
            tmp_path / "out",
        )
        assert torch.equal(weights(tmp_path / "out")[EMBEDDING], base[EMBEDDING])


class TestResults:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_mean_in_the_dtype_asked_for(self, make_model: MakeModel, tmp_path: Path, dtype: torch.dtype) -> None:
        a, b = weights(make_model("a", 1)), weights(make_model("b", 2))
        run(plan(linear("a", "b", out_dtype=str(dtype).removeprefix("torch.")), tmp_path), tmp_path / "out")
        out = weights(tmp_path / "out")
        assert out.keys() == a.keys()
        for name in a:
            truth = ((a[name].double() + b[name].double()) / 2).to(dtype)
            torch.testing.assert_close(out[name], truth, rtol=torch.finfo(dtype).eps, atol=1e-7)

    def test_slices_stack_layers(self, make_model: MakeModel, tmp_path: Path) -> None:
        a = weights(make_model("a", 1))
        parts = [{"model": "a", "layer_range": part, "parameters": {"weight": 1}} for part in ([1, 3], [0, 2])]
        run(
            plan(recipe(merge_method="linear", slices=[{"sources": [part]} for part in parts]), tmp_path),
            tmp_path / "out",
        )
        out = weights(tmp_path / "out")
        for layer, source in enumerate([1, 2, 0, 1]):
            name = "model.layers.{}.mlp.down_proj.weight"
            assert torch.equal(out[name.format(layer)], a[name.format(source)])
        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4

    def test_an_embedding_stands_in_for_a_tied_head(self, make_model: MakeModel, tmp_path: Path) -> None:
        tied = weights(make_model("tied", 1))
        untied = weights(make_model("untied", 2, tie_word_embeddings=False))
        made = plan(linear("tied", "untied"), tmp_path)
        assert any("the result has its own lm_head" in note and "tied" in note for note in made.notes)
        run(made, tmp_path / "out")
        torch.testing.assert_close(weights(tmp_path / "out")[HEAD], (tied[EMBEDDING] + untied[HEAD]) / 2)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False

    def test_a_head_stored_beside_a_tied_embedding_must_be_that_embedding(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        make_model("a", change=lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
        run(plan(linear("a"), tmp_path), tmp_path / "out")
        assert HEAD not in weights(tmp_path / "out")
        make_model("b", change=lambda tensors: tensors.update({HEAD: torch.ones(24, 8)}))
        with pytest.raises(HyperLlamaError, match=r"b: config.json says that the embeddings are tied, but lm_head"):
            plan(linear("b"), tmp_path)

    @pytest.mark.parametrize("tied", [True, False])
    def test_transformers_loads_the_result(self, make_model: MakeModel, tmp_path: Path, tied: bool) -> None:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        for seed, name in enumerate(("base", "a", "b")):
            make_model(name, seed, tie_word_embeddings=tied)
        models = [{"model": name, "parameters": {"weight": 1, "density": 0.5}} for name in ("a", "b")]
        run(plan(recipe(merge_method="ties", base_model="base", models=models), tmp_path), tmp_path / "out")
        loaded, info = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        out = weights(tmp_path / "out")
        state = loaded.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in out.items())
        assert loaded(torch.arange(5)[None]).logits.isfinite().all()


class TestLiveModels:
    def test_the_same_bits_as_on_disk(self, make_model: MakeModel, tmp_path: Path) -> None:
        models = {name: weights(make_model(name, i, torch.bfloat16)) for i, name in enumerate(("base", "a", "b"))}
        listed = [{"model": name, "parameters": {"weight": [0.3, 1], "density": 0.4}} for name in ("a", "b")]
        made = recipe(merge_method="ties", base_model="base", models=listed)
        run(plan(made, tmp_path), tmp_path / "out")
        live, disk = dict(merge_tensors(made, models)), weights(tmp_path / "out")
        assert live.keys() == disk.keys()
        assert all(torch.equal(live[name], disk[name]) for name in disk)

    def test_shapes_that_differ_are_refused_before_any_tensor_is_merged(self, make_model: MakeModel) -> None:
        small, large = weights(make_model("small")), weights(make_model("large", intermediate_size=16))
        with pytest.raises(
            HyperLlamaError, match=r"large: tensor model.layers.0.mlp.down_proj.weight has shape \(8, 16\)"
        ):
            merge_tensors(linear("small", "large"), {"small": small, "large": large})

    def test_a_tensor_that_one_model_lacks(self, make_model: MakeModel) -> None:
        a = weights(make_model("a"))
        b = {name: tensor for name, tensor in a.items() if "layers.1.mlp.up" not in name}
        for order in ("ab", "ba"):
            with pytest.raises(HyperLlamaError, match=r"b has no tensor model.layers.1.mlp.up_proj.weight, a has it"):
                merge_tensors(linear(*order), {"a": a, "b": b})

    def test_a_model_that_is_not_given(self, make_model: MakeModel) -> None:
        with pytest.raises(HyperLlamaError, match=r"the recipe names model b, given are a"):
            merge_tensors(linear("a", "b"), {"a": weights(make_model("a"))})


class TestRefusals:
    """Every one before any tensor is read and anything is written."""

    def refused(self, made: Recipe, cwd: Path, sentence: str) -> None:
        with pytest.raises(HyperLlamaError, match=sentence):
            plan(made, cwd)

    @pytest.mark.parametrize("name", ["nowhere", "meta-llama/Llama-3.2-1B", "a+lora", "a@main"])
    def test_what_is_no_folder(self, make_model: MakeModel, tmp_path: Path, name: str) -> None:
        make_model("a")
        self.refused(linear("a", name), tmp_path, r"is not a folder; models are read from local folders")

    @pytest.mark.parametrize(
        ("key", "value", "field"),
        [
            ("hidden_size", 16, "hidden_size 16, a has 8"),
            ("intermediate_size", 16, "intermediate_size 16, a has 12"),
            ("vocab_size", 32, "vocab_size 32, a has 24"),
            ("num_hidden_layers", 2, "num_layers 2, a has 3"),
            ("num_attention_heads", 4, "num_heads 4, a has 2"),
            ("num_key_value_heads", 2, "num_kv_heads 2, a has 1"),
            ("head_dim", 6, "head_dim 6, a has 4"),
            ("rope_theta", 5e5, "rope_theta 500000.0, a has 10000.0"),
            ("hidden_act", "gelu", "activation gelu, a has silu"),
            ("lm_head_normalization_factor", 2.0, "lm_head_normalization_factor 2.0, a has 1.0"),
        ],
    )
    def test_models_of_another_shape(
        self, make_model: MakeModel, tmp_path: Path, key: str, value: Any, field: str
    ) -> None:
        make_model("a"), make_model("b", **{key: value})
        self.refused(linear("a", "b"), tmp_path, f"b has {field}; only models of one shape")

    def test_a_head_factor_folded_in_only_one(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a", lm_head_normalization_factor=2.0), make_model("b", hyperllama_folded_factor=2.0)
        self.refused(linear("a", "b"), tmp_path, r"only one of a and b has its head factor in the norm")

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda t: t.pop(NORM), r"b has no tensor model.norm.weight"),
            (
                lambda t: t.update({NORM: torch.ones(9)}),
                r"b: tensor model.norm.weight has shape \(9,\), .* asks for \(8,\)",
            ),
            (lambda t: t.update(extra=torch.ones(1)), r"b has a tensor extra"),
        ],
    )
    def test_tensors_that_do_not_fit(
        self, make_model: MakeModel, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], sentence: str
    ) -> None:
        make_model("a"), make_model("b", change=change)
        self.refused(linear("a", "b"), tmp_path, sentence)

    def test_tokenizers_that_differ(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a", tokenizer="{}"), make_model("b", tokenizer="{ }"), make_model("c")
        self.refused(linear("a", "b"), tmp_path, r"b/tokenizer.json differs from a/tokenizer.json")
        assert plan(linear("c", "b"), tmp_path).tokenizer_from == tmp_path / "b"

    def test_a_weight_that_is_missing(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a")
        models = [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]
        made = recipe(merge_method="linear", models=models)
        self.refused(made, tmp_path, r"no weight is given for a, tensor model.embed_tokens.weight: linear needs one")

    @pytest.mark.parametrize("density", [-0.1, 1.1, [0.5, 2]])
    def test_a_density_that_is_no_share(self, make_model: MakeModel, tmp_path: Path, density: Any) -> None:
        make_model("a"), make_model("base")
        models = [{"model": "a", "parameters": {"weight": 1, "density": density}}]
        made = recipe(merge_method="ties", base_model="base", models=models)
        self.refused(made, tmp_path, r"density of a, tensor .* is .*, expected a share between 0 and 1")

    def test_values_of_another_kind(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a")
        self.refused(linear("a", parameters={"normalize": 0.5}), tmp_path, r"normalize of .* expected true or false")
        made = recipe(merge_method="linear", models=[{"model": "a"}], parameters={"weight": True})
        self.refused(made, tmp_path, r"weight of a, tensor .* is true, expected a number")

    @pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
    def test_weights_that_sum_to_zero(self, make_model: MakeModel, tmp_path: Path, method: str) -> None:
        make_model("a"), make_model("b"), make_model("c")
        models = [{"model": name, "parameters": {"weight": w}} for name, w in (("a", 1), ("b", -1), ("c", 0))]
        keys = {"base_model": "c", "models": models[: 3 if method == "linear" else 2]}
        made = recipe(merge_method=method, parameters={"normalize": True}, **keys)
        self.refused(made, tmp_path, r"tensor model.embed_tokens.weight: the weights .* sum to zero")

    def test_a_base_alone(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a")
        made = recipe(merge_method="ties", base_model="a", models=[{"model": "a"}])
        self.refused(made, tmp_path, r"ties needs a model besides its base_model a")

    def test_a_slice_without_its_base(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a"), make_model("base")
        source = {"model": "a", "layer_range": [0, 3], "parameters": {"weight": 1}}
        made = recipe(merge_method="ties", base_model="base", slices=[{"sources": [source]}])
        self.refused(made, tmp_path, r"a slice lacks a source with its base_model base, which ties needs")

    def test_layers_that_are_not_there(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a")
        source = {"model": "a", "layer_range": [1, 4], "parameters": {"weight": 1}}
        made = recipe(merge_method="linear", slices=[{"sources": [source]}])
        self.refused(made, tmp_path, r"a has 3 layers, layer_range is \[1, 4\]")

    def test_a_model_listed_twice(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a")
        self.refused(linear("a", "./a"), tmp_path, r"./a is listed twice")


class TestFiles:
    def test_an_existing_folder_is_kept_unless_told(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a"), make_model("out", 7)
        before = sha256_file(tmp_path / "out" / "model.safetensors")
        made = plan(linear("a"), tmp_path)
        with pytest.raises(HyperLlamaError, match="already exists"):
            run(made, tmp_path / "out")
        assert sha256_file(tmp_path / "out" / "model.safetensors") == before
        run(made, tmp_path / "out", overwrite=True)
        assert sha256_file(tmp_path / "out" / "model.safetensors") != before

    def test_a_model_is_never_overwritten_by_its_merge(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a")
        for out in (tmp_path / "a", tmp_path):
            with pytest.raises(HyperLlamaError, match="a model to merge from"):
                run(plan(linear("a"), tmp_path), out, overwrite=True)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_bad_weight_is_named_and_leaves_nothing(self, make_model: MakeModel, tmp_path: Path, bad: float) -> None:
        name = "model.layers.2.mlp.up_proj.weight"
        make_model("a"), make_model("b", change=lambda tensors: tensors[name][3, 4].fill_(bad))
        before = sorted(tmp_path.iterdir())
        with pytest.raises(HyperLlamaError, match=f"tensor {name} merged from a, b has NaN or infinity as float32"):
            run(plan(linear("a", "b"), tmp_path), tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before

    def test_overflow_of_the_output_dtype_is_an_error(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a", change=lambda tensors: tensors[NORM].fill_(1e5))
        with pytest.raises(HyperLlamaError, match=r"model.norm.weight .* infinity as float16"):
            run(plan(linear("a", dtype="float16"), tmp_path), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_progress_adds_up_to_the_bytes_written(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a", dtype=torch.bfloat16)
        steps: list[tuple[int, int]] = []
        made = plan(linear("a"), tmp_path)
        summary = run(made, tmp_path / "out", progress=lambda done, total: steps.append((done, total)))
        assert steps == sorted(set(steps)) and len(steps) == summary["tensors"]
        assert steps[-1] == (made.bytes_written, made.bytes_written)
        assert made.bytes_written == summary["bytes_written"] == summary["bytes_read"]
        assert made.bytes_written == sum(t.numel() * t.element_size() for t in weights(tmp_path / "out").values())

    def test_the_tokenizer_comes_along(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a", tokenizer="{}")
        run(plan(linear("a"), tmp_path), tmp_path / "out")
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"

    def test_the_card_counts_every_ancestor_once(self, make_model: MakeModel, tmp_path: Path) -> None:
        def card(run_id: str, spent: int, ancestors: dict[str, int], tokens: dict[str, int]) -> dict[str, Any]:
            return {"ledger": {"run": run_id, "spent": spent, "ancestors": ancestors}, "token_counts": tokens}

        big = 2**60 + 1
        make_model("base", card=card("english", big, {}, {"eng": 100}))
        make_model("a", card=card("icelandic", 5, {"english": big}, {"isl": 10}))
        make_model("b", card=card("faroese", 7, {"english": big - 1}, {"fao": 20, "isl": 1}))
        models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "b")]
        made = recipe(merge_method="ties", base_model="base", models=models)
        run(plan(made, tmp_path), tmp_path / "out")
        written = json.loads((tmp_path / "out" / "hyperllama.json").read_text())
        assert written["kind"] == "merge"
        assert written["ledger"]["spent"] == 0
        assert written["ledger"]["ancestors"] == {"english": big, "icelandic": 5, "faroese": 7}
        assert written["token_counts"] == {"eng": 100, "isl": 11, "fao": 20}
        assert written["token_counts_by_model"]["b"] == {"fao": 20, "isl": 1}
        assert written["recipe"] == made.source
        assert [entry["path"] for entry in written["made_from"]] == ["base", "a", "b"]
        assert written["made_from"][2]["config_sha256"] == sha256_file(tmp_path / "b" / "config.json")

    def test_the_card_names_the_weights_that_were_read_and_written(self, make_model: MakeModel, tmp_path: Path) -> None:
        def hashes(folder: str) -> dict[str, str]:
            stored = weights(tmp_path / folder).items()
            return {name: f"{hash_reference(tensor.view(torch.uint8).numpy().ravel()):016x}" for name, tensor in stored}

        def whole(folder: str) -> str:
            shapes = {name: list(tensor.shape) for name, tensor in weights(tmp_path / folder).items()}
            lines = [f"{name} float32 {shapes[name]} {value}" for name, value in sorted(hashes(folder).items())]
            return hashlib.sha256("\n".join(lines).encode()).hexdigest()

        def card(folder: str) -> dict[str, Any]:
            return json.loads((tmp_path / folder / "hyperllama.json").read_text())

        make_model("a", 1), make_model("b", 2), make_model("c", 3)
        merges = {"linear": {}, "multislerp": {}, "nearswap": {"t": 0.1}, "ties": {}}
        for method, parameters in merges.items():
            models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "b")[: 1 + (method != "nearswap")]]
            base = {} if method in ("linear", "multislerp") else {"base_model": "c", "parameters": parameters}
            run(plan(recipe(merge_method=method, models=models, **base), tmp_path), tmp_path / method)
            assert card(method)["weights"] == hashes(method)
            assert {e["path"]: e["weights"] for e in card(method)["made_from"]} == {
                name: whole(name) for name in [*[m["model"] for m in models], *(["c"] if base else [])]
            }
        run(plan(linear("linear", "ties"), tmp_path), tmp_path / "again")
        assert [entry["weights"] for entry in card("again")["made_from"]] == [whole("linear"), whole("ties")]

    def test_an_input_that_is_not_what_its_card_says_is_refused(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a")
        run(plan(linear("a"), tmp_path), tmp_path / "b")
        file = tmp_path / "b" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(HyperLlamaError, match=r"b: tensor .* has the hash .*: the file is damaged"):
            run(plan(linear("b"), tmp_path), tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]

    def test_a_run_is_named_by_its_inputs_and_recipe(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a", 1), make_model("b", 2)
        runs = [
            run(plan(made, tmp_path), tmp_path / f"out{i}")["ledger"]["run"]
            for i, made in enumerate([linear("a"), linear("a"), linear("b"), linear("a", dtype="float16")])
        ]
        assert runs[0] == runs[1]
        assert len(set(runs)) == 3

    def test_a_dry_run_says_what_would_happen(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model("a", dtype=torch.bfloat16)
        made = recipe(merge_method="linear", models=[{"model": "a", "parameters": {"weight": [1, 2], "density": 1}}])
        described = plan(made, tmp_path).describe()
        assert json.loads(json.dumps(described)) == described
        assert described["parameters"] == {"all models": {"normalize": True}, "a": {"weight": [1, 2]}}
        assert described["dtype"] == "bfloat16"
        assert described["tensors"] == 29
        assert described["notes"] == [
            "density has no effect under linear",
            "a has no hyperllama.json: its FLOPs are unknown and not counted",
        ]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
