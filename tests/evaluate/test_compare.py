"""Models side by side: the figures of each alone, paired changes, exact tests, CSV."""

import csv
import io
import json

import numpy as np
import pytest

from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate import evaluate_folder, measure_folder
from hyperllama.evaluate.compare import Comparison
from hyperllama.evaluate.statistics import mcnemar
from tests.evaluate.conftest import sentence


@pytest.fixture
def measured(make_folder, text_file, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"good": sentence(2 * i, 3), "bad": sentence(2 * i + 1, 3), "phenomenon": f"k{i % 2}"} for i in range(50)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    folders = [make_folder("base"), make_folder("adapted", num_layers=3)]
    return [measure_folder(folder, [text_file], [pairs]) for folder in folders], text_file, pairs


def test_cells_are_what_each_model_has_alone(measured):
    models, text, pairs = measured
    compared = Comparison.of(models)
    for model in models:
        alone = evaluate_folder(model.name, [text], [pairs])
        (row,) = [row for row in compared.text if row["model"] == model.name]
        assert row["bits_per_byte"] == alone["texts"][str(text)]["bits_per_byte"]
        assert row["low"] < row["bits_per_byte"] < row["high"]
        cells = {row["phenomenon"]: row["accuracy"] for row in compared.pairs if row["model"] == model.name}
        one = alone["pairs"][str(pairs)]
        assert cells == {"all": one["accuracy"]} | {k: v["accuracy"] for k, v in one["by_phenomenon"].items()}


def test_changes_are_to_the_first_model_and_tests_are_paired(measured):
    models, _, pairs = measured
    compared = Comparison.of(models)
    first, second = compared.text
    assert (first["change"], first["change_low"], first["change_high"]) == (0, 0, 0)
    assert second["change"] == second["bits_per_byte"] - first["bits_per_byte"]
    assert second["change_low"] <= second["change"] <= second["change_high"]
    a, b = (model.pairs[str(pairs)].points for model in models)
    p = mcnemar(int(np.sum((a == 1) & (b == 0))), int(np.sum((a == 0) & (b == 1))))
    assert [row["p"] for row in compared.pairs if row["phenomenon"] == "all"] == [1.0, p]
    (test,) = compared.tests
    assert test["p"] == p and (test["first"], test["second"]) == tuple(model.name for model in models)


def test_csv_holds_every_cell_and_grids_every_model(measured, tmp_path):
    compared = Comparison.of(measured[0])
    files = compared.write_csv(tmp_path / "out.csv")
    assert [file.name for file in files] == ["out.csv", "out-pairs.csv"]
    for file, rows in zip(files, (compared.text, compared.pairs), strict=True):
        read = list(csv.DictReader(io.StringIO(file.read_text())))
        assert read == [{key: str(value) for key, value in row.items()} for row in rows]
    grids = compared.grids()
    assert [len(rows) for rows in grids.values()] == [2, 2, 3]
    assert all(row.keys() == rows[0].keys() for rows in grids.values() for row in rows)


def test_a_model_named_twice_or_another_text_is_refused(measured, make_folder, text_file):
    models, text, _ = measured
    with pytest.raises(HyperLlamaError, match="is named twice"):
        Comparison.of([models[0], models[0]])
    text.write_text('{"text": "another"}')
    with pytest.raises(HyperLlamaError, match="changed between two models"):
        Comparison.of([models[0], measure_folder(make_folder("third"), [text], [])])
