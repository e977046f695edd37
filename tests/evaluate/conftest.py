"""A tiny tokenizer, text in three languages, and a maker of model folders."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from hyperllama.data.tokenizer import Tokenizer, train_tokenizer
from hyperllama.hub import folded, hf_config, write_folder
from hyperllama.settings import ModelConfig
from tests.reference import random_model, shape

TEXT = (
    "the old boat lay on shore and nobody knew who had left it there gamli báturinn lá í fjörunni og enginn vissi "
    "hver hafði skilið hann þar eftir قایق کهنه کنار ساحل بود و هیچ کس نمی‌دانست"
)
WORDS = TEXT.split()
WINDOW = 24


def sentence(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(sentence(i, 12) for i in range(300)))
    return train_tokenizer([folder / "text.txt"], folder / "tokenizer.model", 384)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Documents of 1 to 12 words, all shorter than the window, one of them twice."""
    texts = [sentence(i, 1 + i % 5) for i in range(17)] + [sentence(3, 4), "línur\ntvær\n", "é"]
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    """Documents around and over the window, up to many windows."""
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps({"text": sentence(i, n)}) for i, n in enumerate((4, 10, 13, 30, 60))))
    return file


@pytest.fixture
def config(tokenizer: Tokenizer) -> ModelConfig:
    return shape(vocab_size=tokenizer.vocab_size, max_position_embeddings=WINDOW)


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path, tokenizer: Tokenizer, config: ModelConfig) -> MakeFolder:
    """make_folder(name, dtype, **changes of the shape) -> a random model's folder with the tokenizer in it."""

    def make(name: str = "model", dtype: torch.dtype = torch.float32, **changes) -> Path:
        model = random_model(config.model_copy(update=changes), dtype)
        tensors = folded(model.config, model.arena.logical("weights").items(), dtype)
        write_folder(tmp_path / name, hf_config(model.config, dtype), tensors, {}, tokenizer_from=tokenizer.path)
        return tmp_path / name

    return make


@torch.no_grad()
def log_probability(theirs: LlamaForCausalLM, ids: list[int]) -> float:
    """Of all tokens after the first, by transformers."""
    shares = theirs(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return float(shares[range(len(ids) - 1), ids[1:]].sum())
