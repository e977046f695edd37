"""Generation: the likeliest tokens are transformers', draws depend on the seed alone, the window slides."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate import generate, load_folder
from hyperllama.model import Llama
from tests.evaluate.conftest import WINDOW, sentence


def spell(model: Llama, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model say `tokens`."""
    script: Iterator[int] = iter(tokens)
    size = model.config.vocab_size
    monkeypatch.setattr(model, "logits", lambda hidden: torch.eye(size)[next(script)])


PROMPTS = {"empty": "", "short": "the old boat", "longer than the window": sentence(1, 60)}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_greedy_tokens_are_the_likeliest_of_transformers(prompt, make_folder, tokenizer):
    folder = make_folder()
    theirs = LlamaForCausalLM.from_pretrained(folder)
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    count = len(ids)
    for _ in range(30):
        with torch.no_grad():
            token = int(theirs(torch.tensor([ids[-WINDOW:]])).logits[0, -1].argmax())
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    assert len(ids) > count
    wanted = tokenizer.decode(ids[1:])[len(prompt) :]
    assert generate(*load_folder(folder), prompt, max_tokens=30) == wanted


def test_generation_stops_at_eos_and_at_max_tokens(make_folder, monkeypatch):
    model, tokenizer = load_folder(make_folder())
    words = tokenizer.encode(" boat lay on")
    spell(model, [*words, tokenizer.eos_id, *words], monkeypatch)
    assert generate(model, tokenizer, "the old", max_tokens=100) == " boat lay on"
    spell(model, [*words, tokenizer.eos_id], monkeypatch)
    assert generate(model, tokenizer, "the old", max_tokens=len(words) - 1) == tokenizer.decode(words[:-1])
    assert generate(model, tokenizer, "the old", max_tokens=0) == ""


def test_generation_stops_in_front_of_a_stop_text(make_folder, monkeypatch):
    model, tokenizer = load_folder(make_folder())
    words = tokenizer.encode(" boat lay on shore")
    for stop, expected in (([" on"], " boat lay"), (["shore", "lay"], " boat "), (["x"], " boat lay on shore")):
        spell(model, [*words, tokenizer.eos_id], monkeypatch)
        assert generate(model, tokenizer, "the old", stop=stop) == expected


def test_draws_depend_on_the_seed_alone(make_folder):
    model, tokenizer = load_folder(make_folder())
    texts = [generate(model, tokenizer, "the", max_tokens=20, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    torch.manual_seed(5)
    assert texts[0] == texts[1] == generate(model, tokenizer, "the", max_tokens=20, temperature=1.0, seed=0)
    assert texts[0] != texts[2]
    greedy = generate(model, tokenizer, "the", max_tokens=20)
    assert generate(model, tokenizer, "the", max_tokens=20, temperature=1e-6, seed=3) == greedy


def test_draws_follow_the_softmax_and_never_reach_the_padding(make_folder):
    model, tokenizer = load_folder(make_folder(vocab_size=512, unpadded_vocab_size=384, tie_embeddings=False))
    model.arena.logical("weights")["lm_head.weight"][384:] = 100.0
    for seed in range(20):
        generate(model, tokenizer, "the", max_tokens=5, temperature=5.0, seed=seed)  # decode refuses unknown tokens


def test_a_negative_temperature_is_refused(make_folder):
    with pytest.raises(HyperLlamaError, match=r"temperature is -0\.5"):
        generate(*load_folder(make_folder()), "the", temperature=-0.5)
