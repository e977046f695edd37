"""The estimate's components are all of the FLOPs that MFU counts, and its sums what a reader adds up."""

import json

import pytest

from hyperllama.bench import estimate
from hyperllama.bench.shapes import SHAPES


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [2048, 32768])
def test_components_sum_to_the_flops_of_mfu_and_to_the_time(name, tokens):
    found = estimate.estimate(name, tokens)  # asserts the FLOPs
    json.dumps(found)
    for i, gap in enumerate(estimate.GAPS):
        assert found["ms"][i] == pytest.approx(gap * sum(row["ms"][i] for row in found["components"]))
        assert found["mfu"][i] < 0.8
    assert found["ms"][0] > found["ms"][1]
    assert found["tokens_per_second"][0] == pytest.approx(tokens / found["ms"][0] * 1e3)


def test_the_table_has_a_row_a_component(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["estimate", "--models", "180M"])
    assert estimate.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == len(estimate.estimate("180M", 32768)["components"]) + 4
