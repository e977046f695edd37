"""What travels with a model: counts of tokens against a slow count of the windows read, v against the trainer's, through growth."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from hyperllama.arena import Arena
from hyperllama.checkpoint import checkpoints, load, slices, verify
from hyperllama.companions import ADAM_V, TOKEN_COUNTS, CompanionFile, merged_counts
from hyperllama.config import load_run
from hyperllama.data.build import build_shards
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.grow.folder import grow_folder
from hyperllama.grow.operators import GrowVocabulary, HyperClone
from hyperllama.names import EMBEDDING, FINAL_NORM
from hyperllama.train.loop import train
from hyperllama.train.plan import make_plan
from tests.study import SEQ_LEN, make_study, run_config


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The tests' study, with a shard folder that holds both languages."""
    folder = make_study(tmp_path_factory.mktemp("companions"))
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    texts = [folder / "corpus" / "text" / tag / "dev.jsonl" for tag in ("eng", "swe")]
    build_shards(texts, tokenizer, folder / "shards" / "both")
    return folder


@pytest.fixture(scope="module")
def run(study, tmp_path_factory):
    """A finished run on both languages, exported with v, whose last checkpoint but one step is kept."""
    out = tmp_path_factory.mktemp("runs") / "run"
    sources = [{"path": str(study / "shards" / name)} for name in ("eng", "both")]
    data = {"sources": sources, "seq_len": SEQ_LEN}
    train(run_config(study, out, data=data, export={"adam_v": True}, checkpoint={"every_steps": 6}), quiet=True)
    return out


def test_counts_are_those_of_a_slow_count_over_the_windows_read(study, run):
    mixture = make_plan(load_run(run / "config.yaml")).mixture
    expected = {tag: np.zeros(512, dtype=np.int64) for tag in ("eng", "swe")}
    for source, window in zip(*mixture.locate(np.arange(50)), strict=True):
        shards = mixture.sources[source].shards
        for position in range(window * (SEQ_LEN + 1) + 1, (window + 1) * (SEQ_LEN + 1)):
            document = int(np.searchsorted(shards.document_ends, position, side="right"))
            tag = shards.languages[shards.document_languages[document]]
            expected[tag][shards.read(position, 1)[0]] += 1
    stored = load_file(run / "model" / TOKEN_COUNTS)
    assert sorted(stored) == ["eng", "swe"]
    for tag, counts in expected.items():
        assert stored[tag].dtype == np.int64 and np.array_equal(stored[tag], counts)
    card = json.loads((run / "model" / "hyperllama.json").read_text())
    assert {tag: int(counts.sum()) for tag, counts in stored.items()} == card["token_counts"]


def test_v_is_the_trainers(study, run, tmp_path):
    """A run stopped by its budget after the step whose state another run saved has the same v."""
    (checkpoint,) = checkpoints(run)
    out = tmp_path / "six"
    changes = {"budget": {"windows": 48}, "schedule": {"kind": "paper", "warmup_steps": 2, "decay_fraction": 0.0}}
    data = {"sources": [{"path": str(study / "shards" / name)} for name in ("eng", "both")], "seq_len": SEQ_LEN}
    train(run_config(study, out, data=data, export={"adam_v": True}, **changes), quiet=True)
    again = tmp_path / "seven"
    changes["budget"] = {"windows": 50}
    train(run_config(study, again, data=data, checkpoint={"every_steps": 6}, **changes), quiet=True)
    assert not (again / "model" / ADAM_V).exists()
    with safe_open(str(out / "model" / ADAM_V), framework="np") as file:
        assert file.metadata()["step"] == "6" and file.metadata()["beta2"] == "0.95"
    stored = load_file(out / "model" / ADAM_V)
    state = verify(checkpoints(again)[-1])
    assert checkpoint.name == checkpoints(again)[-1].name == "step-00000006"
    arena = Arena(make_plan(load_run(again / "config.yaml")).model, torch.float32, "cpu", training=True)
    load(checkpoints(again)[-1], state, arena, slices(arena))
    views = arena.logical("v")
    assert sorted(stored) == sorted(views)
    assert all(np.array_equal(array, views[name].numpy()) for name, array in stored.items())


def test_a_grown_folder_has_the_grown_files(run, tmp_path):
    grow_folder(run / "model", tmp_path / "grown", [HyperClone(2)])
    counts, grown = load_file(run / "model" / TOKEN_COUNTS), load_file(tmp_path / "grown" / TOKEN_COUNTS)
    assert grown.keys() == counts.keys() and all(np.array_equal(grown[tag], counts[tag]) for tag in counts)
    small, large = load_file(run / "model" / ADAM_V), load_file(tmp_path / "grown" / ADAM_V)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(large[EMBEDDING], np.tile(small[EMBEDDING], 2) / 4)
    assert np.array_equal(large[q], np.tile(small[q], (2, 2)) / 4)
    # the norm as stored is the weight over the head's factor 2: its gradient is twice, its v four times as large
    assert np.array_equal(large[FINAL_NORM], np.tile(small[FINAL_NORM], 2))
    assert CompanionFile(tmp_path / "grown", ADAM_V).metadata["step"] == "7"


def test_new_tokens_were_not_counted(run, tmp_path):
    pieces = (*((i,) for i in reversed(range(512))), (3, 4), (5,))
    grow_folder(run / "model", tmp_path / "grown", [GrowVocabulary(pieces)])
    counts, grown = (load_file(folder / TOKEN_COUNTS)["eng"] for folder in (run / "model", tmp_path / "grown"))
    assert np.array_equal(grown[:512], counts[::-1]) and grown[512] == 0 and grown[513] == counts[5]
    v, grown_v = (load_file(folder / ADAM_V)[EMBEDDING] for folder in (run / "model", tmp_path / "grown"))
    assert np.array_equal(grown_v[:512], v[::-1]) and not grown_v[512].any()


def test_the_counts_of_a_merge_are_the_sum(run, tmp_path):
    merged = merged_counts([run / "model", run / "model"], 512)[TOKEN_COUNTS].arrays
    counts = load_file(run / "model" / TOKEN_COUNTS)
    assert all(np.array_equal(merged[tag], 2 * counts[tag]) for tag in counts)
    assert merged_counts([run / "model", tmp_path], 512) == {}


def test_missing_damaged_and_foreign_files_are_named(run, tmp_path):
    with pytest.raises(HyperLlamaError, match=r"has no adam_v.safetensors, .* export.adam_v: true"):
        CompanionFile(tmp_path, ADAM_V)
    (tmp_path / TOKEN_COUNTS).write_bytes(b"\xff" * 16)
    with pytest.raises(HyperLlamaError, match=r"token_counts\.safetensors is damaged"):
        CompanionFile(tmp_path, TOKEN_COUNTS)
    with pytest.raises(HyperLlamaError, match=r"eng has shape \(512,\), the model asks for \(640,\)"):
        CompanionFile(run / "model", TOKEN_COUNTS).array("eng", (640,))
