"""Text from a prompt, one token at a time; the whole window is computed anew for each, so it can slide."""

from collections.abc import Sequence

import torch

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.score import start_token
from hyperllama.model import Llama


@torch.no_grad()
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    start: int | None = None,
    stop: Sequence[str] = (),
    begin: bool = True,
) -> str:
    """Continue `prompt` by up to `max_tokens` tokens, or until EOS or a text of `stop`; returns the continuation alone, in
    front of that text.

    `temperature` 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature) in fp64 with
    `seed`. `start` stands before the prompt (default: see start_token; nothing where `begin` is false and there is a
    prompt); what is further back than the model's window is forgotten. Raises HyperLlamaError for a negative temperature.
    """
    if not temperature >= 0:
        raise HyperLlamaError(f"temperature is {temperature}; a number of at least 0 was expected")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise HyperLlamaError("the prompt is not UTF-8 text") from None
    generator = torch.Generator().manual_seed(seed)
    window, device = model.config.max_position_embeddings, model.arena.weights.device
    before = tokenizer.encode(prompt)
    first = [start_token(tokenizer) if start is None else start] if begin or not before else []
    ids = [*first, *before]

    def text() -> str:
        # some tokenizers decode the first word without its space: decode the whole and cut the prompt off
        return tokenizer.decode(ids[len(first) :])[len(tokenizer.decode(before)) :]

    for _ in range(max_tokens):
        hidden = model(torch.tensor([ids[-window:]], device=device))
        logits = model.logits(hidden[0, -1]).double().cpu()[: tokenizer.vocab_size]
        if not torch.isfinite(logits).all():
            raise HyperLlamaError("the model's logits are not finite: its weights are damaged")
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(((logits - logits.max()) / temperature).softmax(-1), 1, generator=generator))
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        found = [at for at in map(text().find, stop) if at >= 0] if stop else []
        if found:
            return text()[: min(found)]
    return text()
