"""Shares by size, temperature and UniMax: the paper's numbers, and a table of them."""

import pytest

from hyperllama.config import MixSettings
from hyperllama.data.shards import Shards
from hyperllama.data.weights import mix_weights, table, temperature, unimax
from hyperllama.errors import HyperLlamaError
from hyperllama.train.plan import make_plan
from tests.study import run_config


def test_unimax_gives_the_papers_epochs():
    """617.5e9 characters, at most 6 epochs. Published are each run's windows; at one number of characters a token they are
    617.5e9 characters in all, which gives the sizes of the three languages that are read whole."""
    windows = {"fao": 112137, "isl": 2100119, "est": 8005170}  # of 2049 tokens, one epoch
    read = 6 * windows["fao"] + 6 * windows["isl"] + 3 * (4 * windows["est"] + 3635611)  # Swedish, Persian: as Estonian
    sizes = {tag: round(count * 617.5e9 / read) for tag, count in windows.items()}
    sizes |= {"swe": 250_000_000_000, "fas": 200_000_000_000}  # more than there is need for: cut to what is taken
    shares = unimax(sizes, 617_500_000_000, 6)
    epochs = {tag: shares[tag] / sizes[tag] for tag in sizes}
    assert sum(shares.values()) == 617_500_000_000
    assert (epochs["fao"], epochs["isl"]) == (6, 6)
    assert epochs["est"] == pytest.approx(4.454, abs=5e-4)
    assert shares["swe"] == pytest.approx(shares["fas"], abs=1) and max(epochs["swe"], epochs["fas"]) < 1
    assert shares["swe"] == pytest.approx(183e9, rel=1e-3)  # recipes/data/swedish.yaml, persian.yaml


def test_temperature_goes_from_even_to_by_size():
    sizes = {"a": 900, "b": 100}
    assert temperature(sizes, 1) == {"a": 0.9, "b": 0.1}
    assert temperature(sizes, 0) == {"a": 0.5, "b": 0.5}
    assert temperature(sizes, 0.5)["b"] == pytest.approx(0.25)


@pytest.fixture
def folders(make_shards) -> list[Shards]:
    """300 and 100 characters of one word each, at 1 and 2 bytes (tokens) a character."""
    return [make_shards("a", [("eng", "x" * 50)] * 6), make_shards("b", [("fas", "ن" * 50)] * 2)]


def test_weights_are_shares_of_tokens_whatever_the_unit(folders):
    a, b = mix_weights(folders, MixSettings(by="size", unit="characters"))
    assert a / b == pytest.approx(folders[0].tokens / folders[1].tokens)  # both read once
    a, b = mix_weights(folders, MixSettings(by="unimax", unit="characters", budget=200.0, max_epochs=6.0))
    assert (a, b) == (pytest.approx(100 * 306 / 300), pytest.approx(100 * 202 / 100))
    a, b = mix_weights(folders, MixSettings(by="unimax", unit="tokens", budget=1800.0, max_epochs=2.0))
    assert (a, b) == (612, 404)
    a, b = mix_weights(folders, MixSettings(by="temperature", exponent=0.0))
    assert a == pytest.approx(b)


def test_the_table_shows_sizes_fertility_shares_and_epochs(folders):
    rows = table(folders, MixSettings(by="unimax", unit="characters", budget=300.0, max_epochs=1.2))
    assert [(row["language"], row["characters"], row["words"], row["tokens"]) for row in rows] == [
        ("eng", 300, 6, 306),
        ("fas", 100, 2, 202),
    ]
    assert [row["tokens_per_word"] for row in rows] == [50, 100]
    assert [row["characters_per_token"] for row in rows] == [1, 0.5]
    assert [row["epochs"] for row in rows] == [pytest.approx(180 / 300), pytest.approx(1.2)]
    by_size = table(folders, MixSettings(by="size", unit="characters", budget=800.0))
    assert [row["epochs"] for row in by_size] == [pytest.approx(2), pytest.approx(2)]


def test_a_folder_without_a_count_of_characters_is_named(folders):
    del folders[0].manifest["characters"]
    with pytest.raises(HyperLlamaError, match="has no count of characters"):
        mix_weights(folders, MixSettings(unit="characters"))


def test_a_recipe_can_mix_by_temperature(study, tmp_path):
    data = {
        "seq_len": 32,
        "sources": [{"path": str(study / "shards" / language)} for language in ("eng", "swe")],
        "mix": {"by": "temperature", "exponent": 0.0},
    }
    described = make_plan(run_config(study, tmp_path / "run", data=data)).describe()["data"]
    assert [row["share"] for row in described.values()] == [pytest.approx(0.5)] * 2
