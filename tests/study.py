"""What several tests start from: a tiny tokenizer and shards of sample text, and recipes over them."""

from pathlib import Path
from typing import Any

from hyperllama.config import RunConfig
from hyperllama.data.build import build_shards
from hyperllama.data.sample import write_corpus
from hyperllama.data.tokenizer import train_tokenizer
from hyperllama.settings import validated

LANGUAGES = ("eng", "swe")
SEQ_LEN = 32


def make_study(folder: Path) -> Path:
    """Sample text in two languages, a tokenizer of 512 tokens, shards: everything a recipe of `settings` reads."""
    write_corpus(folder / "corpus", LANGUAGES, 60_000, seed=1, dev_bytes=5_000, pairs=20)
    files = {language: folder / "corpus" / "text" / language / "train.jsonl" for language in LANGUAGES}
    tokenizer = train_tokenizer(list(files.values()), folder / "tokenizer.model", 512, seed=0)
    for language, file in files.items():
        build_shards([file], tokenizer, folder / "shards" / language, language=language)
    return folder


def settings(study: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as plain values: a model of two layers, seven steps, the last of them partial."""
    return {
        "name": "tiny",
        "out": str(out),
        "tokenizer": str(study / "tokenizer.model"),
        "seed": 7,
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
        "data": {"sources": [{"path": str(study / "shards" / "eng")}], "seq_len": SEQ_LEN},
        "budget": {"windows": 50},
        "global_batch": 8,
        "micro_batch": 4,
        "precision": "fp32",
        "log_every": 2,
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
    } | changes


def run_config(study: Path, out: Path, **changes: Any) -> RunConfig:
    """The recipe of `settings`, validated."""
    return validated(RunConfig, settings(study, out, **changes), "the test's recipe")
