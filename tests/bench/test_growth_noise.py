"""The comparison of growths in small: arms do what they are called, and differences are paired by seed."""

import pytest

from bench.growth_noise import ARMS, BASE, compared, prepare, table, trained


def test_arms_of_a_seed_cost_the_same_and_grow_as_they_are_called(tmp_path):
    prepare(tmp_path, 96)
    arms = {arm: trained(tmp_path, 1, 96, arm) for arm in ("exact, carry, plain", BASE, "none, carry, uneven")}
    assert len({row["spent_flops"] for row in arms.values()}) == 1
    assert arms["exact, carry, plain"]["asymmetry"] == 0 < arms[BASE]["asymmetry"]
    assert arms["none, carry, uneven"]["asymmetry"] > 0
    assert len({row["end"] for row in arms.values()}) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "tokenizer.model", "shards"}  # no run is left


def test_differences_are_paired_over_the_seeds_that_both_have():
    def row(end, after):
        return {"end": end, "after": after, "asymmetry": 0.1, "spent_flops": 1}

    rows = {BASE: {"1": row(1.0, 2.0), "2": row(1.1, 2.2)}, "none, carry, plain": {"2": row(1.2, 2.1)}}
    found = compared(rows)
    assert found[BASE]["end"] == pytest.approx(1.05) and found[BASE]["end_difference"] == (0, 0)
    assert found["none, carry, plain"]["end_difference"] == (pytest.approx(0.1), None)
    assert "| none, carry, plain | 1.2000 | +100.00 | 2.1000 | -100.00 | 0.100 |" in table(found)


def test_every_arm_has_a_name_of_its_own():
    assert len(set(ARMS)) == len(set(ARMS.values())) == 12 and BASE in ARMS
