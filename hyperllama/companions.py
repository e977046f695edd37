"""Files that travel with a model's weights, for merges that ask how those weights came about.

    token_counts.safetensors    language -> (V,) int64: how often each token id was a target of the run, V the embedding's rows
    adam_v.safetensors          weight's name -> AdamW's second moment, fp32, of the weight as it is stored; metadata: step, beta2

Counts are the run's own, as `token_counts` on the card is, whose figures they sum to. v is not corrected for its start from zero:
divide it by 1 - beta2^step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperllama.errors import HyperLlamaError

if TYPE_CHECKING:  # imported by what has companions: most models have none
    import numpy as np

TOKEN_COUNTS = "token_counts.safetensors"
ADAM_V = "adam_v.safetensors"


@dataclass(frozen=True)
class Companion:
    """One such file: named arrays and what the file says of them."""

    arrays: "Mapping[str, np.ndarray]"
    metadata: Mapping[str, str] = field(default_factory=dict)


Companions = Mapping[str, Companion]  # by file name


def write_companions(folder: Path, companions: Companions) -> None:
    """Write the files into `folder`."""
    if not companions:
        return
    import numpy as np
    from safetensors.numpy import save_file

    for name, companion in companions.items():
        arrays = {key: np.ascontiguousarray(array) for key, array in companion.arrays.items()}
        save_file(arrays, str(folder / name), metadata={"format": "np", **companion.metadata})


def token_counts(by_language: "Mapping[str, np.ndarray]", rows: int) -> Companion:
    """Counts (tokenizer's tokens,) by language as a companion of a model with `rows` rows in its embedding."""
    import numpy as np

    return Companion({tag: np.pad(counts, (0, rows - len(counts))) for tag, counts in by_language.items()})


def merged_counts(folders: Sequence[Path], rows: int) -> dict[str, Companion]:
    """The token counts of a merge: the sum of its models', where all of them have some."""
    if not all((folder / TOKEN_COUNTS).is_file() for folder in folders):
        return {}
    total: dict[str, np.ndarray] = {}
    for folder in folders:
        file = CompanionFile(folder, TOKEN_COUNTS)
        for language in file.names:
            counts = file.array(language, (rows,))
            total[language] = total[language] + counts if language in total else counts
    return {TOKEN_COUNTS: Companion(total)}


class CompanionFile:
    """An open companion file; arrays are read when asked for.

    Raises HyperLlamaError naming the file when it is missing or damaged.
    """

    def __init__(self, folder: Path, name: str):
        from safetensors import SafetensorError, safe_open

        self.path = folder / name
        if not self.path.is_file():
            hint = "train with export.adam_v: true" if name == ADAM_V else "only models trained or grown here have one"
            raise HyperLlamaError(f"{folder} has no {name}, which this merge reads: {hint}")
        try:
            self._file = safe_open(str(self.path), framework="np")
        except (SafetensorError, OSError) as error:
            raise HyperLlamaError(f"{self.path} is damaged or not a safetensors file: {error}") from None
        self.names: list[str] = sorted(self._file.keys())
        self.metadata: dict[str, Any] = self._file.metadata() or {}

    def array(self, name: str, shape: tuple[int, ...]) -> "np.ndarray":
        """An array of the shape that belongs to the model. Raises HyperLlamaError when it is missing or of another shape."""
        if name not in self.names:
            raise HyperLlamaError(f"{self.path} has no {name}")
        array = self._file.get_tensor(name)
        if array.shape != shape:
            raise HyperLlamaError(f"{self.path}: {name} has shape {array.shape}, the model asks for {shape}")
        return array
