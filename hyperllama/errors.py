"""The one exception that means: the user's input was wrong, and this sentence says how to mend it."""


class HyperLlamaError(Exception):
    """A mistake a user can act on. The command line prints the sentence and exits with code 2.

    The message names what was wrong, where (file, key, tensor) and what was expected.
    """
