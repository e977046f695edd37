"""A recipe is valid or refused with a sentence that names the key."""

import itertools

import pytest
import yaml

from hyperllama.config import ModelSettings, load_run
from hyperllama.errors import HyperLlamaError
from hyperllama.names import logical_tensors, packed_shapes
from hyperllama.recipes import override, read_yaml
from hyperllama.settings import ModelConfig

RECIPE = {
    "name": "tiny",
    "out": "runs/tiny",
    "tokenizer": "tokenizer.model",
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2},
    "data": {"sources": [{"path": "shards/eng"}], "seq_len": 32},
    "budget": {"steps": 3},
    "global_batch": 4,
    "micro_batch": 2,
}


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(RECIPE | changes))
        return file

    return write


def test_a_valid_recipe_loads_with_defaults(recipe):
    config = load_run(recipe())
    assert (config.optimizer.beta2, config.schedule.kind, config.precision) == (0.95, "paper", "bf16")


def test_overrides_reach_nested_keys_and_list_elements(recipe):
    config = load_run(recipe(), ["optimizer.lr=1e-3", "data.sources.0.weight=2.0", "name=other"])
    assert (config.optimizer.lr, config.data.sources[0].weight, config.name) == (1e-3, 2.0, "other")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"optimiser": {}}, "unknown key optimiser; did you mean 'optimizer'?"),
        ({"optimizer": {"learning_rate": 1.0}}, "unknown key optimizer.learning_rate; valid are beta1, beta2"),
        (
            {"data": {"sources": [{"path": "a", "wieght": 1.0}], "seq_len": 8}},
            "data.sources.0.wieght; did you mean 'weight'?",
        ),
        ({"budget": {"steps": 3, "tokens": 9}}, "budget: give exactly one of"),
        ({"budget": {}}, "budget: give exactly one of"),
        ({"init_from": "folder"}, "give either model"),
        ({"global_batch": 1}, "micro_batch (2) is larger than global_batch (1)"),
        ({"precision": "fp8"}, "precision"),
        ({"global_batch": "4"}, "global_batch"),
        ({"name": "a b"}, "name"),
        ({"tokenizer": None}, "tokenizer"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_key(recipe, changes, sentence):
    with pytest.raises(HyperLlamaError) as error:
        load_run(recipe(**changes))
    assert sentence in str(error.value) and "recipe.yaml" in str(error.value)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "mapping of keys"),
        ("a: 1\na: 2", "given twice"),
        ("a: {{ x }}", "is not a key"),
        ("a: 2024-13-45", "not valid YAML"),
        ("!!python/name:os.system ''", "not valid YAML"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path, text, sentence):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(HyperLlamaError, match=sentence):
        read_yaml(file)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(HyperLlamaError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe5\xe4")
    with pytest.raises(HyperLlamaError, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


def test_exponents_without_a_dot_are_numbers(tmp_path):
    file = tmp_path / "numbers.yaml"
    file.write_text("a: 3e-3\nb: 1E6\nc: '3e-3'\nd: 12\ne: 2e\n")
    assert read_yaml(file) == {"a": 3e-3, "b": 1e6, "c": "3e-3", "d": 12, "e": "2e"}


@pytest.mark.parametrize("assignment", ["lr", "=3", "a.b=[1", "xs.7=1", "xs.y=1", "n.sub=1"])
def test_a_bad_override_is_refused(assignment):
    with pytest.raises(HyperLlamaError, match="override"):
        override({"xs": [1], "n": 3}, [assignment])


def test_vocabulary_and_ffn_are_padded_to_multiples():
    model = ModelSettings(hidden_size=100, num_layers=1, num_heads=2).resolve(1000, 32)
    assert (model.vocab_size, model.unpadded_vocab_size, model.intermediate_size % 64) == (1024, 1000, 0)


def test_a_model_smaller_than_its_tokenizer_is_refused():
    with pytest.raises(HyperLlamaError, match="tokenizer has 1000 tokens"):
        ModelSettings(hidden_size=64, num_layers=1, num_heads=2, vocab_size=512).resolve(1000, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_logical_tensors_tile_the_packed_ones(tied):
    config = ModelConfig(
        vocab_size=384,
        hidden_size=48,
        intermediate_size=64,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        head_dim=24,
        tie_embeddings=tied,
    )
    covered: dict[str, list[tuple[int, int]]] = {}
    for tensor in logical_tensors(config):
        covered.setdefault(tensor.packed, []).append((tensor.start, tensor.start + tensor.shape[0]))
    for name, shape in packed_shapes(config).items():
        rows = sorted(covered.pop(name))
        assert rows[0][0] == 0 and rows[-1][1] == shape[0]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(rows))
    assert not covered
