"""The paper's loader: its counts (stages, steps, tokens, padded tails), and its order against a plain simulation of it."""

import numpy as np
import pytest
import torch

from hyperllama.config import DataSettings, TailSettings
from hyperllama.data.loader import Loader
from hyperllama.data.mixture import Mixture, Source
from hyperllama.data.shards import Shards
from hyperllama.data.stages import Blend, Stages, greedy_blend
from hyperllama.data.tail import Tail
from hyperllama.errors import HyperLlamaError
from hyperllama.settings import validated
from hyperllama.train.loop import train
from hyperllama.train.plan import make_plan
from tests.study import run_config

BATCH = 5120  # windows of the paper's step

# What the paper's run files say: samples by source of each stage, processes, steps, distinct-window tokens.
RUNS = {
    "base": ([[1628995], [1628995], [36571498, 36577281, 1628995]], 32, 15244, 159_817_244_672),
    "english": ([[18288305]], 32, 3572, 37_454_448_640),
    "estonian": ([[8005170, 124361, 14094]] * 4 + [[3635611, 56667, 6499]], 16, 7087, 74_287_671_296),
    "faroese": ([[112137, 7287, 801]] * 6, 16, 144, 1_477_324_800),
    "icelandic": ([[2100119, 36510, 4155]] * 6, 16, 2514, 26_305_953_792),
    "persian": ([[29543659, 722043, 80902]], 16, 5928, 62_149_844_992),
    "swedish": ([[31334642, 729355, 81680]], 16, 6279, 65_834_346_496),
    "multilingual": ([[112332045]], 32, 21940, 230_056_028_160),
}
# (run, stage) -> rows of the last step, then for micro-batches of 8 (180M) and 4 (572M): copies of the last sample, never seen.


@pytest.mark.parametrize("name", RUNS)
def test_steps_and_tokens_of_a_run_are_the_papers(name):
    stages, processes, steps, tokens = RUNS[name]
    assert sum(Tail(sum(sizes), BATCH, processes, 8).computed for sizes in stages) == steps * BATCH
    assert sum(map(sum, stages)) * 2048 == tokens  # the table agrees with itself


@pytest.mark.parametrize("sizes", [[112137, 7287, 801], [2100119, 36510, 4155]], ids=["faroese", "icelandic"])
def test_the_greedy_blend_takes_every_source_its_number_of_times(sizes):
    assert np.bincount(greedy_blend(sizes)).tolist() == sizes


def test_the_greedy_blend_takes_the_largest_deficit():
    for sizes in ([5, 3], [1, 1, 1], [40, 7, 1, 12], [1, 90]):
        share, taken = np.array(sizes) / sum(sizes), np.zeros(len(sizes))
        for i, source in enumerate(greedy_blend(sizes)):
            assert source == np.argmax(share * max(i, 1) - taken)
            taken[source] += 1


T, GLOBAL, TAIL = 3, 12, TailSettings(processes=3, micro_batch=2)


@pytest.fixture
def sources(make_shards):
    """Two sources of several files: 31 and 8 windows of T + 1 tokens; every window's first tokens tell it from the others."""
    made = []
    for name, documents, files in (("a", 45, 4), ("b", 13, 2)):
        texts = [("fao", f"{name}{i:02d}" if i % 3 else f"{name}{i:02d}.") for i in range(documents)]
        tokens = sum(len(text) + 1 for _, text in texts)
        made.append(Source(name, make_shards(name, texts, shard_tokens=-(-tokens // files)), 1.0))
    return made


def simulate(sources: list[Source], seed: int, tail: TailSettings) -> list[list[tuple[int, list[int]]]]:
    """The rows (source, window as tokens) of every step of a stage, as nanotron's loader and sampler make them."""
    samples = []
    for source in sources:
        files = [np.fromfile(path, "<u2") for path in sorted(source.shards.path.glob("shard-*"))]
        rows = []
        for place in np.random.default_rng(seed).permutation(len(files)):
            file = files[place]
            rows += [file[i : i + T + 1].tolist() for i in range(0, len(file) // (T + 1) * (T + 1), T + 1)]
        samples.append(rows)
    total = sum(map(len, samples))
    taken, blended = [0] * len(samples), []
    for i in range(total):
        deficits = [len(rows) / total * max(i, 1) - taken[s] for s, rows in enumerate(samples)]
        best = deficits.index(max(deficits))
        blended.append((best, samples[best][taken[best]]))
        taken[best] += 1
    group = tail.processes * tail.micro_batch
    whole = total // group * group
    padded = -(-total // GLOBAL) * GLOBAL
    order = list(range(whole))
    for start in range(0, padded - whole, group):
        for rank in range(tail.processes):
            for i in range(start + rank, start + rank + tail.micro_batch):
                order.append(whole + i if i < total - whole else -1)
    return [[blended[i] for i in order[step : step + GLOBAL]] for step in range(0, padded, GLOBAL)]


def rows_of(order, first: int, count: int) -> list[list[int]]:
    source, window = order.locate(np.arange(first, first + count))
    return [order.sources[s].shards.window(int(w), order.seq_len).tolist() for s, w in zip(source, window, strict=True)]


@pytest.mark.parametrize("seed", [42, 137])
def test_every_row_of_every_step_is_that_of_the_papers_loader(sources, seed):
    blend = Blend(sources, T, seed, GLOBAL, TAIL)
    steps = simulate(sources, seed, TAIL)
    assert blend.length == len(steps) * GLOBAL > blend.samples
    for step, rows in enumerate(steps):
        assert rows_of(blend, step * GLOBAL, GLOBAL) == [row for _, row in rows]
    flat = [source for rows in steps for source, _ in rows]
    for total in (0, 1, GLOBAL, blend.samples, blend.length):
        assert blend.counts(total).tolist() == [flat[:total].count(0), flat[:total].count(1)]


def test_without_a_tail_every_window_is_read_once_and_no_more(sources):
    blend = Blend(sources, T, 1, GLOBAL)
    places = set(zip(*(array.tolist() for array in blend.locate(np.arange(blend.length))), strict=True))
    assert places == {(s, w) for s, windows in enumerate(blend.windows) for w in range(windows)}
    with pytest.raises(IndexError):
        blend.locate(np.array([blend.length]))
    blend.check(blend.length)
    with pytest.raises(HyperLlamaError, match="reads each window once"):
        blend.check(blend.length + 1)


def test_blocks_of_the_index_do_not_change_the_order(sources, monkeypatch):
    whole = Blend(sources, T, 1, GLOBAL).locate(np.arange(30))
    monkeypatch.setattr("hyperllama.data.stages._BLOCK", 7)
    cut = Blend(sources, T, 1, GLOBAL)
    assert all((a == b).all() for a, b in zip(cut.locate(np.arange(30)), whole, strict=True))
    assert [cut.counts(n).sum() for n in range(30)] == list(range(30))


def test_stages_follow_each_other_each_in_the_order_of_its_seed(sources):
    parts = [Mixture(sources, T, seed) for seed in (1, 2)] + [Blend(sources, T, 3, GLOBAL)]
    stages = Stages(parts, [0, 24, 48])
    rows = rows_of(stages, 0, 60)
    assert rows == rows_of(parts[0], 0, 24) + rows_of(parts[1], 0, 24) + rows_of(parts[2], 0, 12)
    assert stages.counts(60).sum() == 60 and stages.counts(30)[2:4].sum() == 6 and stages.counts(30)[4:].sum() == 0
    described = stages.describe(60)
    assert list(described) == [f"stage {k}: {name}" for k in (1, 2, 3) for name in "ab"]
    assert stages.tokens_by_language(0, 60) == {"fao": 60 * T}
    stages.check(60)
    with pytest.raises(HyperLlamaError, match="stage 3: order nanotron reads each window once"):
        stages.check(48 + parts[2].length + 1)
    with Loader(stages, 12) as loader:
        batches = [loader.batch(first) for first in range(0, 60, 12)]
    assert torch.cat([batch.ids for batch in batches]).tolist() == [row[:-1] for row in rows]
    assert Stages(parts, [0, 24, 47]).fingerprint != stages.fingerprint


def test_a_recipe_of_stages_becomes_a_plan(study, tmp_path):
    eng, swe = ({"path": str(study / "shards" / language)} for language in ("eng", "swe"))
    data = {
        "seq_len": 32,
        "order": "nanotron",
        "nanotron_tail": {"processes": 2, "micro_batch": 2},
        "stages": [{"start_step": 1, "seed": 42, "sources": [eng, swe]}, {"start_step": 3, "sources": [swe]}],
    }
    plan = make_plan(run_config(study, tmp_path / "run", data=data))
    assert isinstance(plan.mixture, Stages) and plan.mixture.firsts.tolist() == [0, 16]
    assert list(plan.describe()["data"]) == ["stage 1: eng", "stage 1: swe", "stage 2: swe"]
    other = {**data, "stages": [{**data["stages"][0], "seed": 43}, data["stages"][1]]}
    again, changed = (make_plan(run_config(study, tmp_path / "run", data=d)) for d in (data, other))
    assert again.ledger.run == plan.ledger.run != changed.ledger.run
    with pytest.raises(HyperLlamaError, match="stage 2: order nanotron reads each window once"):
        make_plan(run_config(study, tmp_path / "run", data=data, budget={"steps": 10**6}))


def test_a_run_trains_through_its_stages_and_counts_what_it_read(study, tmp_path):
    eng, swe = ({"path": str(study / "shards" / language)} for language in ("eng", "swe"))
    data = {"seq_len": 32, "order": "nanotron", "nanotron_tail": {"processes": 2, "micro_batch": 2}}
    stages = [{"start_step": 1, "seed": 42, "sources": [eng, swe]}, {"start_step": 3, "seed": 9, "sources": [swe]}]
    config = run_config(study, tmp_path / "run", data={**data, "stages": stages}, budget={"steps": 4})
    record, mixture = train(config, quiet=True), make_plan(config).mixture
    first, second = rows_of(mixture, 0, 16), rows_of(mixture, 16, 16)
    swedish = Shards.open(study / "shards" / "swe")
    assert rows_of(Blend([Source("swe", swedish, 1.0)], 32, 9, 8), 0, 16) == second != first
    counts = record["card"]["token_counts"]
    assert counts == mixture.tokens_by_language(0, 32)
    assert counts["swe"] > 16 * 32 and sum(counts.values()) == 32 * 32


def test_settings_that_contradict_each_other_are_refused():
    source = {"path": "a"}
    stage = {"start_step": 1, "sources": [source]}
    for data, message in (
        ({}, "either sources or stages"),
        ({"sources": [source], "stages": [stage]}, "either sources or stages"),
        ({"stages": [{**stage, "start_step": 2}]}, "must start at step 1"),
        ({"stages": [stage, stage]}, "must start at step 1 and at later ones"),
        ({"sources": [{**source, "weight": 1.0}], "order": "nanotron"}, "leave weight, mix and replay out"),
        ({"sources": [{**source, "weight": 1.0}], "mix": {"by": "size"}}, "leave the sources' own out"),
        ({"stages": [stage], "nanotron_tail": {"processes": 1, "micro_batch": 1}}, "in order nanotron only"),
        ({"sources": [source], "mix": {"by": "unimax"}}, "needs a budget"),
        ({"stages": [stage], "replay": {"path": "b", "fraction": 0.1}}, "into each of the stages"),
    ):
        with pytest.raises(HyperLlamaError, match=message):
            validated(DataSettings, {"seq_len": 8, **data}, "r")
