"""FLOPs as exact integers: one definition for budgets, ledgers and speed.

A multiply-add is 2 FLOPs; only matrix products count (linears, head, attention scores and values); backward counts twice the
forward; optimizer, norms, activations, softmax, RoPE, look-ups and recomputation count zero. For a window of T tokens

    train FLOPs = 6 T (L P + V d) + 12 L (n h) pairs        P = d (n h) + 2 d (k h) + (n h) d + 3 d F

with pairs = T^2 (`dense`: budgets and matching) or the pairs a causal mask allows (`causal`: speed and MFU).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import Any, Literal

from hyperllama.errors import HyperLlamaError
from hyperllama.settings import ModelConfig

Convention = Literal["dense", "causal"]


def attended_pairs(seq_len: int, convention: Convention, document_lengths: Sequence[int] | None = None) -> int:
    """Query-key pairs that attention computes in a window of `seq_len` tokens."""
    if convention == "dense":
        return seq_len * seq_len
    return sum(length * (length + 1) // 2 for length in document_lengths or (seq_len,))


def window_flops(
    config: ModelConfig,
    seq_len: int,
    convention: Convention = "dense",
    document_lengths: Sequence[int] | None = None,
) -> int:
    """Training FLOPs (forward and backward) of one window of `seq_len` tokens; a forward alone is exactly a third."""
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    linear = (
        2 * width * heads + 2 * width * config.num_kv_heads * config.head_dim + 3 * width * config.intermediate_size
    )
    products = 6 * seq_len * (config.num_layers * linear + config.vocab_size * width)
    return products + 12 * config.num_layers * heads * attended_pairs(seq_len, convention, document_lengths)


def shared_quantum(costs: Iterable[int]) -> int:
    """The smallest budget that every model with one of these per-window costs can spend exactly."""
    return lcm(*costs)


def windows_for(budget: int, cost: int, others: Iterable[int] = ()) -> int:
    """Windows that spend exactly `budget` FLOPs at `cost` FLOPs a window.

    Raises HyperLlamaError when the budget is not a multiple of the cost, naming the nearest budgets below and above and,
    with the per-window costs of `others`, those that all of them share.
    """
    if budget % cost == 0:
        return budget // cost
    below = budget // cost * cost
    sentence = (
        f"a budget of {budget} FLOPs is not a whole number of windows at {cost} FLOPs each; "
        f"the nearest that are: {below} and {below + cost}"
    )
    quantum = shared_quantum([cost, *others])
    if quantum != cost:
        shared = budget // quantum * quantum
        sentence += f"; shared by all these models: {shared} and {shared + quantum}"
    raise HyperLlamaError(sentence)


@dataclass
class Ledger:
    """What a model cost: FLOPs this run spent, and those of every distinct ancestor run, each counted once."""

    run: str
    spent: int = 0
    ancestors: dict[str, int] = field(default_factory=dict)

    @property
    def inherited(self) -> int:
        """FLOPs of all ancestor runs."""
        return sum(self.ancestors.values())

    @property
    def total(self) -> int:
        """Inherited and spent."""
        return self.inherited + self.spent

    def to_json(self) -> dict[str, Any]:
        """As stored on a model's card."""
        return {"run": self.run, "spent": self.spent, "ancestors": dict(sorted(self.ancestors.items()))}

    @classmethod
    def from_json(cls, value: Any, where: str | Path) -> "Ledger":
        """The inverse of to_json; `where` names the file in errors. Raises HyperLlamaError when it is no ledger."""
        try:
            ledger = cls(value["run"], value["spent"], dict(value["ancestors"]))
        except (TypeError, KeyError, ValueError):
            ledger = cls("", -1)
        counts = [ledger.spent, *ledger.ancestors.values()]
        if not isinstance(ledger.run, str) or not all(type(count) is int and count >= 0 for count in counts):
            raise HyperLlamaError(
                f"{where}: ledger is not a run, the FLOPs it spent and those of its ancestors"
            ) from None
        return ledger

    @classmethod
    def child(cls, run: str, parents: Iterable["Ledger"]) -> "Ledger":
        """A new run that starts from `parents`: their ancestors and themselves, each run counted once.

        Where parents come from different moments of one run, the later moment counts: it contains the earlier.
        """
        ancestors: dict[str, int] = {}
        for parent in parents:
            for name, spent in [*parent.ancestors.items(), (parent.run, parent.spent)]:
                ancestors[name] = max(spent, ancestors.get(name, 0))
        return cls(run, 0, {name: spent for name, spent in ancestors.items() if spent})


def growth_quantum(config: ModelConfig, seq_len: int, factor: int, budget: int | None = None) -> dict[str, Any]:
    """The budgets that a model and its clone by `factor` can both spend exactly: multiples of `flops`.

    When that is over 5 % of `budget`, `suggestion` is the nearest vocabulary and FFN width (multiples of 128 and 64, the
    vocabulary never below the real tokens) for which it is not, or None.
    """
    small, large = (window_flops(shape, seq_len) for shape in (config, config.grown(factor)))
    quantum = lcm(small, large)
    result: dict[str, Any] = {
        "factor": factor,
        "flops": quantum,
        "windows": quantum // small,
        "windows_grown": quantum // large,
        "tokens": quantum // small * seq_len,
    }
    if budget is not None and 20 * quantum > budget:
        result["suggestion"] = _nearest_shape(config, seq_len, factor, budget)
    return result


def _nearest_shape(config: ModelConfig, seq_len: int, factor: int, budget: int) -> dict[str, int] | None:
    def near(value: int, multiple: int, least: int) -> list[int]:
        around = range(value // multiple - 8, value // multiple + 10)
        return [multiple * i for i in around if multiple * i >= max(least, multiple)]

    best: tuple[float, dict[str, int]] | None = None
    for vocab in near(config.vocab_size, 128, config.unpadded_vocab_size or config.vocab_size):
        for ffn in near(config.intermediate_size, 64, 64):
            shape = config.model_copy(update={"vocab_size": vocab, "intermediate_size": ffn})
            if 20 * lcm(window_flops(shape, seq_len), window_flops(shape.grown(factor), seq_len)) > budget:
                continue
            change = abs(vocab / config.vocab_size - 1) + abs(ffn / config.intermediate_size - 1)
            if best is None or change < best[0]:
                best = change, {"vocab_size": vocab, "intermediate_size": ffn}
    return best[1] if best else None
