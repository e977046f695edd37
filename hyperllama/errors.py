"""How work ends early: by a mistake a user can mend, by a signal, or because it can't go on."""

import difflib
from collections.abc import Iterable
from typing import Any


class HyperLlamaError(Exception):
    """A mistake a user can act on. The command line prints the sentence and exits with code 2.

    The message names what was wrong, where (file, key, tensor) and what was expected.
    """


class WrongIndex(HyperLlamaError, IndexError):
    """A token id, target or position outside its table; on a GPU told when the device is next waited for."""


class Stopped(Exception):
    """A signal stopped the work after its state was saved; the message says how to go on.

    The command line exits with 128 + `signal`: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signal: int, sentence: str):
        super().__init__(sentence)
        self.signal = signal

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.signal, str(self))  # from another process


class Diverged(Exception):
    """Training ended itself because it no longer gets anywhere; its last good checkpoint stays. Exit code 3."""

    code = 3


class Lost(Exception):
    """Another process of the run is gone or hangs; the message names it. Exit code 4."""

    code = 4


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the closest valid one, or all of them."""
    valid = sorted(valid)
    if close := difflib.get_close_matches(word, valid, n=1):
        return f"did you mean '{close[0]}'?"
    return f"valid are {', '.join(valid)}" if valid else "nothing may stand here"
