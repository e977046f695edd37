"""Which old tokens spell each token of a new tokenizer: what the growth of a vocabulary is made from."""

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError


def token_pieces(old: Tokenizer, new: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """For every id of `new` the ids of `old` that spell it: its own id where both have the token.

    A new token without text (a control token) is spelt by all old tokens: its row is their mean.
    Raises HyperLlamaError when `new` lacks a token of `old`, which a model could no longer read or write.
    """
    before, after = old.tokens(), new.tokens()
    known = {token: i for i, token in enumerate(before) if token is not None}
    lost = known.keys() - set(after)
    if lost:
        raise HyperLlamaError(
            f"{new.path} lacks {len(lost)} tokens of {old.path}, for example {min(lost)!r}: it can only grow"
        )
    everything = tuple(known.values())
    return tuple(
        (known[token],) if token in known else tuple(old.encode(new.text_of(i))) or everything
        for i, token in enumerate(after)
    )
