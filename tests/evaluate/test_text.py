"""Bits per byte and perplexity equal a slow computation through transformers, token by token where windows slide."""

import json
from math import exp, log
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import LlamaForCausalLM

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate import evaluate_folder, evaluate_text, load_folder, text
from hyperllama.flops import window_flops
from hyperllama.grow.folder import grow_folder
from hyperllama.grow.operators import HyperClone
from tests.evaluate.conftest import WINDOW, WORDS, sentence

REAL_TOKENS = 384


def documents(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().split("\n")]


@torch.no_grad()
def slow_nll(folder: Path, tokenizer: Tokenizer, texts: list[str], start: int, window: int = WINDOW) -> float:
    """One forward pass per token, over exactly the context that the definition gives it."""
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    for content in texts:
        ids = [start, *tokenizer.encode(content)]
        for target in range(1, len(ids)):
            stride = window - window // 2
            block = max(0, -(-(target - window) // stride))  # 0: in the first window
            begin = 0 if block == 0 else window + (block - 1) * stride - window // 2
            logits = theirs(torch.tensor([ids[begin:target]])).logits[0, -1, :REAL_TOKENS].double()
            total -= float(logits.log_softmax(-1)[ids[target]])
    return total


MODELS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "padded vocabulary": {"vocab_size": 512, "unpadded_vocab_size": REAL_TOKENS},
    "bf16": {"dtype": torch.bfloat16},
    "head factor": {"lm_head_normalization_factor": 2.0},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_text_equals_a_slow_computation_through_transformers(options, make_folder, tokenizer, text_file):
    folder = make_folder(**options)
    model, loaded = load_folder(folder)
    got = evaluate_text(model, loaded, text_file)
    texts = documents(text_file)
    nll = slow_nll(folder, tokenizer, texts, tokenizer.eos_id)
    tokens, n_bytes = sum(len(tokenizer.encode(t)) for t in texts), sum(len(t.encode()) for t in texts)
    assert (got["documents"], got["tokens"], got["bytes"]) == (len(texts), tokens, n_bytes)
    assert got["nll_nats"] == pytest.approx(nll, rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nll / log(2) / n_bytes, rel=1e-5)
    assert got["bits_per_character"] == pytest.approx(nll / log(2) / sum(map(len, texts)), rel=1e-5)
    assert got["perplexity"] == pytest.approx(exp(nll / tokens), rel=1e-4)


@pytest.mark.parametrize("seq_len", [WINDOW, 9])
def test_documents_over_the_window_equal_it_too(seq_len, make_folder, tokenizer, long_file):
    folder = make_folder()
    got = evaluate_text(*load_folder(folder), long_file, seq_len=seq_len)
    nll = slow_nll(folder, tokenizer, documents(long_file), tokenizer.eos_id, seq_len)
    assert max(len(tokenizer.encode(t)) for t in documents(long_file)) > 3 * seq_len
    assert got["nll_nats"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_folder_measures_the_same(tied, make_folder, tmp_path, tokenizer, long_file):
    folder = make_folder(tie_embeddings=tied, vocab_size=512, unpadded_vocab_size=REAL_TOKENS)
    grow_folder(folder, tmp_path / "grown", [HyperClone(2, noise_db=10.0)])
    small, large = (evaluate_text(*load_folder(path), long_file) for path in (folder, tmp_path / "grown"))
    assert large["nll_nats"] == pytest.approx(small["nll_nats"], rel=1e-5)
    nll = slow_nll(tmp_path / "grown", tokenizer, documents(long_file), tokenizer.eos_id)
    assert large["nll_nats"] == pytest.approx(nll, rel=1e-5)


def test_text_is_read_in_pieces_with_the_same_result(make_folder, text_file, monkeypatch):
    model, tokenizer = load_folder(make_folder())
    whole = evaluate_text(model, tokenizer, text_file)
    monkeypatch.setattr(text, "CHUNK_BYTES", 40)
    pieces = evaluate_text(model, tokenizer, text_file)
    assert pieces["nll_nats"] == pytest.approx(whole["nll_nats"], rel=1e-6)
    assert all(pieces[key] == whole[key] for key in ("documents", "bytes", "tokens"))


def test_a_piece_that_ends_with_the_file_leaves_nothing_over(make_folder, text_file, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_BYTES", 1)
    assert evaluate_text(*load_folder(make_folder()), text_file)["documents"] == len(documents(text_file))


def test_the_same_text_gives_the_same_bits(make_folder, text_file, long_file):
    folder = make_folder()
    assert evaluate_folder(folder, [text_file, long_file], []) == evaluate_folder(folder, [text_file, long_file], [])


def test_a_bos_named_by_the_model_is_the_start(make_folder, tokenizer, text_file):
    folder = make_folder()
    config = json.loads((folder / "config.json").read_text())
    assert config["bos_token_id"] is None
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": tokenizer.bos_id}))
    got = evaluate_folder(folder, [text_file], [])["texts"][str(text_file)]
    with_bos = slow_nll(folder, tokenizer, documents(text_file), tokenizer.bos_id)
    assert got["nll_nats"] == pytest.approx(with_bos, rel=1e-5)
    assert with_bos != pytest.approx(slow_nll(folder, tokenizer, documents(text_file), tokenizer.eos_id), rel=1e-3)


def test_a_folder_written_by_transformers_with_its_own_tokenizer_is_measured(make_folder, tmp_path, long_file):
    theirs = LlamaForCausalLM.from_pretrained(make_folder())
    theirs.save_pretrained(tmp_path / "foreign")
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: i + 2 for i, word in enumerate(dict.fromkeys(WORDS))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "foreign" / "tokenizer.json"))
    got = evaluate_folder(tmp_path / "foreign", [long_file], [])["texts"][str(long_file)]
    foreign = Tokenizer.load(tmp_path / "foreign")
    nll = slow_nll(tmp_path / "foreign", foreign, documents(long_file), 1)
    assert got["tokens"] == sum(len(t.split()) for t in documents(long_file))
    assert got["nll_nats"] == pytest.approx(nll, rel=1e-5)


def test_a_folder_is_measured_on_all_its_files(make_folder, config, tokenizer, text_file, long_file, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"good": sentence(101, 3), "bad": sentence(102, 3), "phenomenon": "order"}))
    folder, calls = make_folder(), []
    got = evaluate_folder(folder, [text_file, long_file], [pairs], progress=lambda *at: calls.append(at))
    model, _ = load_folder(folder)
    assert got.keys() == {"model", "texts", "pairs", "flops"}
    assert got["model"] == str(folder)
    assert list(got["texts"]) == [str(text_file), str(long_file)]
    assert got["texts"][str(text_file)].keys() == {
        "documents", "bytes", "characters", "tokens", "nll_nats", "bits_per_byte", "bits_per_character", "perplexity"
    }  # fmt: skip
    assert got["pairs"][str(pairs)].keys() == {"pairs", "accuracy", "interval", "by_phenomenon"}
    short = {tuple(tokenizer.encode(t)) for t in [*documents(text_file), sentence(101, 3), sentence(102, 3)]}
    separate = evaluate_text(model, tokenizer, long_file)["flops"]
    assert got["flops"] == separate + sum(window_flops(config, len(ids), "causal") // 3 for ids in short)
    total = sum(file.stat().st_size for file in (text_file, long_file, pairs))
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_tokenizer_that_does_not_fit_is_refused(make_folder, tokenizer):
    for name, shape in {"a": {"vocab_size": 383}, "b": {"vocab_size": 512, "unpadded_vocab_size": 383}}.items():
        with pytest.raises(HyperLlamaError, match=r"tokenizer\.model has 384 tokens.* knows 383"):
            load_folder(make_folder(name, **shape))


def test_a_folder_without_a_tokenizer_and_a_missing_text_are_refused(make_folder, tmp_path):
    folder = make_folder()
    with pytest.raises(HyperLlamaError, match=r"nothing\.txt does not exist"):
        evaluate_folder(folder, [tmp_path / "nothing.txt"], [])
    (folder / "tokenizer.model").unlink()
    with pytest.raises(HyperLlamaError, match="tokenizer"):
        load_folder(folder)


def test_the_compute_dtype_is_a_choice(make_folder, text_file):
    folder = make_folder(dtype=torch.bfloat16)
    exact = evaluate_folder(folder, [text_file], [], dtype=torch.float64)["texts"][str(text_file)]["nll_nats"]
    errors = [
        abs(evaluate_folder(folder, [text_file], [], dtype=dtype)["texts"][str(text_file)]["nll_nats"] / exact - 1)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert errors[0] < 1e-6 < errors[1] < 0.02
