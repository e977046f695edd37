"""How work ends early: by a mistake a user can mend, or by a signal."""

import difflib
from collections.abc import Iterable


class HyperLlamaError(Exception):
    """A mistake a user can act on. The command line prints the sentence and exits with code 2.

    The message names what was wrong, where (file, key, tensor) and what was expected.
    """


class Stopped(Exception):
    """A signal stopped the work after its state was saved; the message says how to go on.

    The command line exits with 128 + `signal`: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signal: int, sentence: str):
        super().__init__(sentence)
        self.signal = signal


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the closest valid one, or all of them."""
    valid = sorted(valid)
    if close := difflib.get_close_matches(word, valid, n=1):
        return f"did you mean '{close[0]}'?"
    return f"valid are {', '.join(valid)}" if valid else "nothing may stand here"
