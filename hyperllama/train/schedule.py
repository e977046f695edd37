"""The learning rate as a pure function of the step."""

from math import cos, pi

from hyperllama.config import ScheduleSettings


def decay_steps(settings: ScheduleSettings, steps: int) -> int:
    """Steps of linear decay at the end of a `paper` schedule."""
    return round(settings.decay_fraction * steps)


def lr_ratio(settings: ScheduleSettings, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 1) of `steps`, as a share of the peak.

    `paper` is the schedule of the paper's runs: step n uses f(n - offset) with f(t) = t / warm-up, then 1, then
    (D - (t - start)) / D. With their offset of 1, step 1 has rate 0 and the last step 1 / D; with 0, 1 / warm-up and 0.
    `cosine`: step n of the warm-up uses n / warm-up; after it half a cosine to `min_lr_ratio`, reached at the last step.
    """
    warmup = settings.warmup_steps
    if settings.kind == "paper":
        t, decay = step - settings.offset, decay_steps(settings, steps)
        start = steps - decay
        if t < warmup and t <= start:
            return t / warmup
        return 1.0 if t <= start else (decay - (t - start)) / decay
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (1 + cos(pi * progress))


def rewarm_ratio(warmup: int, step: int) -> float:
    """Share of the scheduled rate at step `step` (from 1) after a growth, for a warm-up of `warmup` steps."""
    return min(1.0, step / warmup) if warmup else 1.0
