"""Growing a Hugging Face folder into a new one: planned, grown tensor by tensor, verified, written. Operators are in operators.py.

One operator on weights in fp32 or bf16 is a call of csrc from the memory map to the tensor's place in a file, and needs neither
torch nor memory for a tensor. Operators in turn, new tokens, rows from the layer above and other dtypes take torch and a few of
the largest tensors.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperllama import __version__
from hyperllama.companions import ADAM_V, TOKEN_COUNTS, Companion, CompanionFile, token_counts
from hyperllama.dtypes import BYTES, common_dtype
from hyperllama.errors import HyperLlamaError
from hyperllama.files import check_free, check_room
from hyperllama.flops import Ledger, shared_quantum, window_flops
from hyperllama.grow.operators import Axis, GrowVocabulary, Operator, TensorMap, grown_config
from hyperllama.grow.verify import Gap, compare_logits, gap, report
from hyperllama.hub import (
    Folder,
    FolderWriter,
    check_weights,
    factor_is_folded,
    hf_config,
    model_config,
    open_folder,
    origin,
    stamps,
    streamed_folder,
)
from hyperllama.kernels import raw
from hyperllama.kernels.hashing import hash_bytes
from hyperllama.kernels.native import address, usable
from hyperllama.names import FINAL_NORM, logical_tensors
from hyperllama.weights import NewTensor, hex_hash, narrowed, widened

if TYPE_CHECKING:  # numpy and torch are imported by what computes with them: even tiles do not
    import numpy as np
    from torch import Tensor

    from hyperllama.kernels.hashing import Bytes
    from hyperllama.model import Llama

KERNEL_DTYPES = ("float32", "bfloat16")


def plan_growth(path: str | Path, operators: Sequence[Operator]) -> dict[str, Any]:
    """What growing a folder by `operators` in turn would give: shapes, parameters and FLOPs, as exact integers. Writes nothing.

    `shared_quantum`: both models can spend its multiples exactly (see flops.py).
    """
    for operator in operators:
        raw.check_noise(getattr(operator, "noise_db", None))
    folder = open_folder(path)
    small = model_config(folder.config, folder.path)
    large = grown_config(operators, small)
    seq_len = small.max_position_embeddings
    costs = {"before": window_flops(small, seq_len), "after": window_flops(large, seq_len)}
    quantum = shared_quantum(costs.values())
    return {
        "growth": [operator.describe() for operator in operators],
        "model": large.model_dump(),
        "parameters": {"before": small.num_parameters, "after": large.num_parameters},
        "bytes": sum(prod(tensor.shape) for tensor in logical_tensors(large)) * BYTES[_dtype(folder)],
        "seq_len": seq_len,
        "dense_flops_per_window": costs,
        "dense_flops_per_token": {key: cost // seq_len for key, cost in costs.items()},
        "shared_quantum": {
            "flops": quantum,
            "windows": quantum // costs["before"],
            "windows_grown": quantum // costs["after"],
        },
        "function": "preserved" if all(operator.preserves for operator in operators) else "not preserved",
        "reads": [str(file) for file in folder.files],
    }


def check_output(plan: dict[str, Any], out: str | Path) -> None:
    """Raise HyperLlamaError when something is at `out`, or its disk has no room for what is planned."""
    check_free(out)
    check_room(out, plan["bytes"])


def grow_folder(
    path: str | Path,
    out: str | Path,
    operators: Sequence[Operator],
    *,
    tokenizer: Path | None = None,
    logits: bool = False,
    sync: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Grow the model in a Hugging Face folder by `operators` in turn into a new folder, and verify the result.

    `tokenizer`: file or folder of a grown vocabulary's tokenizer; default: the old one's. `logits`: verify by logits too, which
    takes the memory of both models in fp32. `sync`: see files.atomic_folder. What a killed process left is gone on with.
    Growing costs no FLOPs; the new card's ledger inherits the small model's. Returns the plan with the verification's figures.
    Raises HyperLlamaError, with nothing written, when the input is not a Llama or not what its card says, when a weight is not
    finite, or when operators that keep the function without rounding a weight did not keep it. Where weights are rounded the
    figures say by how much that tells.
    """
    plan = plan_growth(path, operators)
    check_output(plan, out)
    folder = open_folder(path)
    config = model_config(folder.config, folder.path)
    check_weights(folder, config, {tensor.name: tensor.shape for tensor in logical_tensors(config)})
    growth = _Growth(folder, operators)
    gaps: list[Gap] = []
    with streamed_folder(out, growth.tensors, _job(folder, operators), sync=sync) as writer:
        for done, tensor in enumerate(growth.tensors):
            if tensor.name not in writer.done:
                growth.write(tensor, writer)
            note = writer.done[tensor.name]
            growth.hashes |= note["reads"]
            gaps += [Gap(*pair) for pair in note["gaps"]]
            if progress:
                progress(done + 1, len(growth.tensors))
        verified = report(gaps, operators, growth.dtype)
        if verified["claimed"] and not verified["rounded"] and not verified["preserved"]:
            raise _changed(
                path, f"sums of copies differ by up to {verified['max_difference']:.3g} of the largest weight"
            )
        card = _card(folder, plan["growth"], growth.hashes)
        companions = _companions(folder, growth, operators)
        writer.complete(hf_config(growth.config, growth.dtype), card, tokenizer or folder.path, companions)
        if logits:
            verified["logits"] = compare_logits(_load(folder), _load(open_folder(writer.folder)), operators)
            difference = verified["logits"]["max_logit_difference"]
            exact = verified["claimed"] and not verified["rounded"]
            if not isfinite(difference) or (exact and not verified["logits"]["preserved"]):
                raise _changed(path, f"logits differ by up to {difference:.3g}")
    return {**plan, "verified": verified}


def _changed(path: str | Path, how: str) -> HyperLlamaError:
    return HyperLlamaError(f"growing {path} changed its function: {how}; nothing was written")


def _dtype(folder: Folder) -> str:
    """The dtype that holds all of a folder's weights."""
    return common_dtype(folder.dtype(name) for name in folder.names)


def _job(folder: Folder, operators: Sequence[Operator]) -> str:
    """What names this work: one that a killed process left is gone on with when all of it is still the same."""
    settings = [[type(operator).__name__, asdict(operator)] for operator in operators]
    text = json.dumps([__version__, str(folder.path), stamps(folder), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Growth:
    """A folder's weights, in the dtype that holds all of them and without a folded head factor, and how they grow."""

    def __init__(self, folder: Folder, operators: Sequence[Operator]):
        self.folder, self.dtype = folder, _dtype(folder)
        self.config = small = model_config(folder.config, folder.path)
        self.factor = small.lm_head_normalization_factor if factor_is_folded(folder.config) else 1.0
        self.maps: list[dict[str, TensorMap]] = []
        for operator in operators:
            self.maps.append(operator.tensors(self.config))
            self.config = operator.grown(self.config)
        self.tensors = [NewTensor(tensor.name, self.dtype, tensor.shape) for tensor in logical_tensors(self.config)]
        self.hashes: dict[str, str] = {}

    def write(self, tensor: NewTensor, writer: FolderWriter) -> None:
        """Grow one tensor into its place, and note what was read and its gap."""
        name, how = tensor.name, self.maps[-1][tensor.name]
        read = [how.source, *([how.upper] if how.upper else [])] if len(self.maps) == 1 else []
        if len(self.maps) > 1 or how.pieces is not None or how.upper is not None:
            digest, gaps, read = self._by_torch(name, writer)
        elif how.zero:
            import numpy as np

            read, gaps, digest = [], [], writer.write(name, np.zeros(tensor.n_bytes, np.uint8))
        elif self._fits_csrc(name, how):
            digest, gaps = self._matrix(name, how, writer)
        elif how.cols is None:
            digest, gaps = self._vector(name, how, writer)
        else:
            digest, gaps, read = self._by_torch(name, writer)
        for source in read:
            self.hashes.setdefault(source, hex_hash(hash_bytes(self.folder.bytes(source))))
            self.folder.check_hash(source, self.hashes[source])
        writer.finish(name, digest, gaps=gaps, reads={source: self.hashes[source] for source in read})

    def _finite(self, name: str, finite: bool) -> None:
        if not finite:
            raise HyperLlamaError(f"growing {self.folder.path}: tensor {name} has NaN or infinity; nothing was written")

    def _fits_csrc(self, name: str, how: TensorMap) -> bool:
        """Whether csrc grows it, from map to file: a matrix, or a norm of even tiles with no head factor but the copies' own."""
        if self.dtype not in KERNEL_DTYPES or self.folder.dtype(how.source) != self.dtype or not usable():
            return False
        factor = self.config.lm_head_normalization_factor
        unfolded = name != FINAL_NORM or (self.factor == 1 and factor == (how.gain or 1))
        return how.cols is not None or (how.rows.even_tiles and unfolded)

    def _values(self, name: str) -> "np.ndarray[Any, Any]":
        """An old tensor, flat, in fp32 or fp64, with the values it has in the common dtype."""
        import numpy as np

        stored = self.folder.dtype(name)
        values = widened(self.folder.bytes(name), stored)
        if name == FINAL_NORM and self.factor != 1.0:
            values = values * np.float32(self.factor)
        return widened(narrowed(values, self.dtype), self.dtype)

    def _vector(self, name: str, how: TensorMap, writer: FolderWriter) -> tuple[str, list[Gap]]:
        """Norms: gathered, times their gain."""
        import numpy as np

        source = self._values(how.source)
        grown = source[how.rows.index()]
        if how.gain is not None:
            grown = grown * (how.gain * how.rows.share()).astype(grown.dtype)
        grown = widened(narrowed(grown, self.dtype), self.dtype)
        self._finite(name, bool(np.isfinite(grown).all()))
        return writer.write(name, self._stored(name, grown)), [gap(how, source, grown)]

    def _stored(self, name: str, values: "np.ndarray[Any, Any]") -> "Bytes":
        """What goes to the file: a head factor folded into the final norm."""
        factor = self.config.lm_head_normalization_factor
        return narrowed(
            values / values.dtype.type(factor) if name == FINAL_NORM and factor != 1.0 else values, self.dtype
        )

    def _matrix(self, name: str, how: TensorMap, writer: FolderWriter) -> tuple[str, list[Gap]]:
        """Tiles and gathers, from map to file; then the file's own bytes against the sums that they should have.

        A norm is a row whose columns are outputs; the final one's, where logits are divided by the number of copies, are inputs.
        """
        rows, cols = (Axis(1), how.rows) if how.cols is None else (how.rows, how.cols)
        outputs = how.outputs or (how.cols is None and how.gain is None)
        source, target = self.folder.raw(how.source), writer.target(name)
        width = self.folder.shape(how.source)[-1]
        row_index: Any
        col_index: Any = None
        if rows.even_tiles and cols.even_tiles:
            half = None if how.noise_db is None or outputs or cols.copies < 2 else raw.half_range(how.noise_db)
            divisor, key = 1 if outputs else cols.copies, raw.noise_key(how.seed, name)
            raw.grow(source, target, rows.size, width, rows.copies, cols.copies, divisor, half, key)
            row_index = _tiled(rows.size, rows.copies, cols.copies if outputs else 1)
        else:
            import numpy as np

            row_index, col_index = rows.index(), cols.index()
            scale = np.ascontiguousarray(np.ones(len(cols)) if outputs else cols.share(), np.float32)
            raw.remap(
                source, target, width, address(row_index), len(rows), address(col_index), len(cols), address(scale)
            )
        self._finite(name, bool(target.finite))
        content, digest = writer.content(name)
        if digest != hex_hash(target.hash):
            raise HyperLlamaError(f"tensor {name} was not written as it was grown: the disk or its memory is at fault")
        if outputs and col_index is not None:
            before, after = (widened(data, self.dtype) for data in (self.folder.bytes(how.source), content))
            return digest, [gap(how, before.reshape(-1, width), after.reshape(len(rows), -1))]
        grown = raw.Raw(address(content), self.dtype, len(content) // BYTES[self.dtype])
        difference = raw.unfold(
            source, grown, width, address(row_index), len(row_index), None if col_index is None else address(col_index),
            width if outputs else len(cols),
        )  # fmt: skip
        return digest, [Gap(*difference)]

    def _by_torch(self, name: str, writer: FolderWriter) -> tuple[str, list[Gap], list[str]]:
        """Any operators in turn, on tensors in memory."""
        import torch

        from hyperllama.grow.tensors import grow_through

        gaps: list[Gap] = []
        read: list[str] = []

        def check(how: TensorMap, source: "Tensor", grown: "Tensor") -> None:
            if how.upper is None:
                gaps.append(gap(how, source.to(torch.float64).numpy(), grown.to(torch.float64).numpy()))

        def old(source: str) -> "Tensor":
            read.append(source)
            values = torch.from_numpy(self._values(source)).reshape(self.folder.shape(source))
            return values.to(getattr(torch, self.dtype))

        grown = grow_through(self.maps, name, old, check)
        self._finite(name, bool(torch.isfinite(grown).all()))
        if name == FINAL_NORM:
            wide = torch.promote_types(grown.dtype, torch.float32)
            grown = (grown.to(wide) / self.config.lm_head_normalization_factor).to(grown.dtype)
        content = grown.contiguous().reshape(-1).view(torch.uint8).numpy()
        return writer.write(name, content), gaps, sorted(set(read))


@cache
def _tiled(size: int, copies: int, times: int) -> "array[int]":
    """The old row of every new one, int64: `copies` tiles of `size` rows, each row `times` times."""
    rows = array("q", bytes(8 * size * times))
    for i in range(times):
        rows[i::times] = array("q", range(size))
    return rows * copies


def _load(folder: Folder) -> "Llama":
    """The folder's model in the dtype that holds all of its weights, on the CPU."""
    import torch

    from hyperllama.arena import Arena
    from hyperllama.hub import read_weights
    from hyperllama.model import Llama

    config = model_config(folder.config, folder.path)
    arena = Arena(config, getattr(torch, _dtype(folder)), "cpu", training=False)
    read_weights(folder, config, arena.logical("weights"))
    return Llama(config, arena)


def _companions(folder: Folder, growth: _Growth, operators: Sequence[Operator]) -> dict[str, Companion]:
    """What travels with the grown model: counts by its token ids, and AdamW's second moment grown like the trainer's."""
    found: dict[str, Companion] = {}
    small, large = model_config(folder.config, folder.path), growth.config
    if (folder.path / TOKEN_COUNTS).is_file():
        file = CompanionFile(folder.path, TOKEN_COUNTS)
        counts = {language: file.array(language, (small.vocab_size,)) for language in file.names}
        for operator in operators:
            if isinstance(operator, GrowVocabulary):  # a token that the run did not know was not counted
                import numpy as np

                ids = [pieces[0] if len(pieces) == 1 else -1 for pieces in operator.pieces]
                counts = {language: np.append(old, 0)[ids] for language, old in counts.items()}
        found[TOKEN_COUNTS] = token_counts(counts, large.vocab_size)
    if (folder.path / ADAM_V).is_file():
        import torch

        from hyperllama.grow.tensors import grow_through

        file = CompanionFile(folder.path, ADAM_V)
        shapes = {tensor.name: tensor.shape for tensor in logical_tensors(small)}

        def read(name: str) -> "Tensor":
            v = torch.from_numpy(file.array(name, shapes[name]))
            return v / growth.factor**2 if name == FINAL_NORM else v

        grown = {t.name: grow_through(growth.maps, t.name, read, kind="v").numpy() for t in logical_tensors(large)}
        grown[FINAL_NORM] = grown[FINAL_NORM] * large.lm_head_normalization_factor**2
        metadata = {key: value for key, value in file.metadata.items() if key != "format"}
        found[ADAM_V] = Companion(grown, metadata)
    return found


def _card(folder: Folder, growth: list[dict[str, Any]], hashes: dict[str, str]) -> dict[str, Any]:
    parent = folder.card
    made_from = [origin(str(folder.path), folder, hashes)]
    digest = hashlib.sha256(json.dumps([growth, made_from[0]], sort_keys=True).encode()).hexdigest()
    ledger = Ledger.child(f"grow-{digest[:12]}", folder.ledgers)
    return {
        "kind": "grow",
        "ledger": ledger.to_json(),
        "token_counts": parent.get("token_counts", {}),
        "made_from": made_from,
        "growth": [*parent.get("growth", []), *growth],
    }
