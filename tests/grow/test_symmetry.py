"""How far a clone's copies have diverged: zero when fresh, the definition's figure otherwise."""

import pytest
import torch

from hyperllama.errors import HyperLlamaError
from hyperllama.grow.folder import grow_folder
from hyperllama.grow.operators import HyperClone
from hyperllama.grow.symmetry import symmetry
from tests.reference import random_model, read, shape, write

KEYS = ("row_asymmetry", "column_asymmetry")


@pytest.mark.parametrize("config", [shape(), shape(tie_embeddings=False)], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factors", [(2, 2), (3, 2), (2, 1)], ids=str)
def test_a_fresh_clone_has_equal_copies(config, dtype, factors, tmp_path):
    path = write(random_model(config, dtype), tmp_path / "small")
    grow_folder(path, tmp_path / "grown", [HyperClone(*factors)])
    rows = symmetry(tmp_path / "grown")
    assert [row["name"] for row in rows[:-1]] == list(HyperClone(2).tensors(config))
    assert all(row[key] in (None, 0.0) for row in rows for key in KEYS)


def test_factors_of_clones_of_clones_multiply(tmp_path):
    path = write(random_model(shape(), torch.float32), tmp_path / "small")
    grow_folder(path, tmp_path / "grown", [HyperClone(2), HyperClone(3, 1)])
    rows = {row["name"]: row for row in symmetry(tmp_path / "grown")}
    down = rows["model.layers.0.mlp.down_proj.weight"]
    assert (down["row_copies"], down["column_copies"]) == (6, 2)
    assert rows["all"]["row_asymmetry"] == rows["all"]["column_asymmetry"] == 0


def test_the_figure_is_the_share_of_the_energy_that_copies_do_not_share(tmp_path):
    path = write(random_model(shape(), torch.float32), tmp_path / "big")
    rows = {row["name"]: row for row in symmetry(path, 2)}
    weights = read(path, torch.float64).arena.logical("weights")
    for name, weight in weights.items():
        halves = weight.chunk(2)
        apart = (halves[0] - halves[1]).square().sum() / 2  # around the mean of two: half the squared difference
        if rows[name]["row_copies"] == 2:
            assert rows[name]["row_asymmetry"] == pytest.approx(float(apart / weight.square().sum()), rel=1e-9)
        if rows[name]["column_copies"] == 2:
            left, right = weight.chunk(2, 1)
            apart = (left - right).square().sum() / 2
            assert rows[name]["column_asymmetry"] == pytest.approx(float(apart / weight.square().sum()), rel=1e-9)


def test_noise_shows_by_its_ratio(tmp_path):
    path = write(random_model(shape(hidden_size=64, intermediate_size=128), torch.float32), tmp_path / "small")
    grow_folder(path, tmp_path / "grown", [HyperClone(2, noise_db=10.0)])
    rows = {row["name"]: row for row in symmetry(tmp_path / "grown")}
    noise = 10**-1 / (1 + 10**-1)
    assert rows["model.layers.0.mlp.up_proj.weight"]["column_asymmetry"] == pytest.approx(noise, rel=0.1)
    assert rows["model.embed_tokens.weight"]["column_asymmetry"] == 0


def test_what_is_no_clone_is_refused(tmp_path):
    path = write(random_model(shape(), torch.float32), tmp_path / "small")
    with pytest.raises(HyperLlamaError, match="give --factor"):
        symmetry(path)
    with pytest.raises(HyperLlamaError, match="no multiple of the factor 3"):
        symmetry(path, 3)
    with pytest.raises(HyperLlamaError, match="needs --factor"):
        symmetry(path, None, 2)
