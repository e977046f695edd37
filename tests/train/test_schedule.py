"""Learning rates follow their formulas to the step."""

import math

import pytest

from hyperllama.config import ScheduleSettings
from hyperllama.train.schedule import decay_steps, lr_ratio


def test_the_papers_schedule_has_its_offset_by_one():
    """The Estonian 1x run: 7087 steps, 15 warm-up, decay from 5667 over 1420."""
    settings = ScheduleSettings(kind="paper", warmup_steps=15, decay_fraction=1420 / 7087)
    ratio = [lr_ratio(settings, step, 7087) for step in range(1, 7088)]
    assert decay_steps(settings, 7087) == 1420
    assert ratio[0] == 0 and ratio[15] == 1 and ratio[14] == pytest.approx(14 / 15)
    assert ratio[5667] == 1 and ratio[5668] == pytest.approx(1419 / 1420)
    assert ratio[-1] == pytest.approx(1 / 1420)


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
@pytest.mark.parametrize("warmup", [0, 1, 3, 200])
@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0])
def test_rates_stay_between_zero_and_the_peak(steps, warmup, decay):
    for kind in ("paper", "cosine"):
        settings = ScheduleSettings(kind=kind, warmup_steps=warmup, decay_fraction=decay)
        for step in range(1, steps + 1):
            assert 0 <= lr_ratio(settings, step, steps) <= 1


def test_cosine_warms_up_peaks_and_reaches_its_floor():
    settings = ScheduleSettings(kind="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert lr_ratio(settings, 5, 110) == 0.5 and lr_ratio(settings, 10, 110) == 1
    assert lr_ratio(settings, 60, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert lr_ratio(settings, 110, 110) == pytest.approx(0.1)
