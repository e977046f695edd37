"""Growth operators: what each makes of a shape, and of every tensor. Plans only: nothing here touches a weight or imports torch.

An operator maps the units of an axis (residual stream, key-value groups with their query heads, FFN neurons, vocabulary) to
copies of old units. Copy j of unit index[j] carries share[j] of what its consumers read, the shares of a unit's copies summing
to one. Hence

    weights    W'[i, j] = W[rows[i], cols[j]] a_j         a_j = share of the input unit j (1 for the embedding, norms, rows)
    gradients  G'[i, j] = b_i G[rows[i], cols[j]]         b_i = share of the output unit i (the embedding's outputs are its columns)
    AdamW      m' = b m, v' = b^2 v, eps' = b eps, lr' = a lr, decay lr wd unchanged: the step in function space stays the same

(net2net, Chen et al. 2016, arXiv 1511.05641; the moments: Shen et al. 2022, arXiv 2203.06211.) RMSNorm's mean over the residual
stream is kept when all units have equally many copies, so they do under every operator here. Its backward mixes the copies; only
equal shares of 1/f keep the gradients' factor b, so unequal shares on the residual stream keep the function, not the dynamics.
A tied table can't carry shares as a head: the logits are divided by a factor, and the final norm's gains are multiplied by
factor times share: (2, 1, 1) and 4 for the dyadic x3.

    operator            new units are                                             function      dynamics (m, v, eps, lr as above)
    hyperclone          tiles, shared 1/f                                         kept          kept
      even x2, x4, ..   divisions exact in every binary format                    to the bit    kept
      dyadic            tiles, shared by powers of two: x3 is 1/2, 1/4, 1/4       to the bit    powers of two only (see RMSNorm)
      with noise        +- noise between pairs of copies                          kept          broken on purpose
    lemon               tiles; heads and neurons shared (f+1)/2f, 1/2f, ..        kept          kept
    net2wider           random neurons, permuted stream, tiled heads              kept          kept
    fpi                 random neurons and heads, permuted stream                 kept          kept
    aki                 as fpi, but rows of new units from the layer above        no            no
    stack, interleave   layers 1..L, 1..L / 1, 1, 2, 2, ..                        no            no
    solar               layers 1..L-m, m+1..L                                     no            no
    identity            layers followed by copies whose o and down are zero       to the bit    no (moments: zero)
    vocabulary          rows of new tokens: the mean of their pieces' rows        old logits    no (moments: zero)

("to the bit": the weights' sums; logits differ by the order of additions alone.) Sources: HyperCloning, Samragh et al. 2024,
arXiv 2409.12903; LEMON, Wang et al. 2023, arXiv 2310.07999; bert2BERT, Chen et al. 2021, arXiv 2110.07143; G_stack, Du et al. 2024,
arXiv 2405.15319; SOLAR, Kim et al. 2023, arXiv 2312.15166. AKI takes matrices from the layer above, norms from their own layer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from hyperllama.errors import HyperLlamaError, nearest
from hyperllama.names import EMBEDDING, FINAL_NORM, HEAD, logical_tensors
from hyperllama.settings import VOCAB_MULTIPLE, ModelConfig

if TYPE_CHECKING:  # numpy is imported by what computes with it: even tiles are a few integers
    import numpy as np

    Array = np.ndarray[Any, Any]

Split = Literal["even", "dyadic", "uneven"]


@dataclass(frozen=True, eq=False)
class Axis:
    """The units of one axis after growth: `copies` tiles of `size` old units, or the old units listed in `units`.

    shares: of each tile; None means 1/copies, or for `units` one over how often each old unit was copied.
    """

    size: int
    copies: int = 1
    shares: tuple[float, ...] | None = None
    units: "Array | None" = None

    @property
    def even_tiles(self) -> bool:
        """Whether this is tiling with shares of 1/copies, which needs no index."""
        return self.units is None and self.shares is None

    def __len__(self) -> int:
        return self.size * self.copies if self.units is None else len(self.units)

    def index(self) -> "Array":
        """Old unit of every new one, int64."""
        import numpy as np

        return np.tile(np.arange(self.size), self.copies) if self.units is None else self.units

    def share(self) -> "Array":
        """Share of every new unit among the copies of its old one, fp64."""
        import numpy as np

        if self.units is not None:
            return 1 / np.bincount(self.units, minlength=self.size)[self.units]
        return np.repeat(np.array(self.shares or [1 / self.copies] * self.copies), self.size)

    def spread(self, width: int) -> "Axis":
        """The axis whose units are the `width` elements of each of these units."""
        if self.units is None:
            return replace(self, size=self.size * width)
        import numpy as np

        return Axis(self.size * width, units=(self.units[:, None] * width + np.arange(width)).ravel())


@dataclass(frozen=True, eq=False)
class TensorMap:
    """How one logical tensor follows from old ones (see the module's formulas).

    source: name of the old tensor; upper: of the one that gives the rows behind the old tensor's; cols: None for vectors;
    outputs: the columns are outputs (the embedding); gain: the final norm's, times the row's share; noise_db and seed: of the
    paired noise; zero: only the shape is kept; fresh: moments start at zero; pieces: row i is the mean of the old rows pieces[i].
    """

    source: str
    rows: Axis
    cols: Axis | None = None
    upper: str | None = None
    outputs: bool = False
    gain: float | None = None
    noise_db: float | None = None
    seed: int = 0
    zero: bool = False
    fresh: bool = False
    pieces: tuple[tuple[int, ...], ...] | None = None

    def gradient_factors(self) -> "tuple[Array, Array | None]":
        """b of every row and every column (None for vectors), fp64: m' = b m, v' = b^2 v, eps' = b eps, b their product."""
        import numpy as np

        rows = self.rows.share() if self.gain is None else np.full(len(self.rows), 1 / self.gain)
        if self.cols is None:
            return rows, None
        return rows, self.cols.share() if self.outputs else np.ones(len(self.cols))

    def lr_factors(self) -> "Array | None":
        """a of every column (None for vectors: 1), fp64: lr' = a lr for the same step in function space."""
        if self.cols is None:
            return None
        import numpy as np

        return np.ones(len(self.cols)) if self.outputs else self.cols.share()


@dataclass(frozen=True)
class Operator:
    """One way to grow; its fields are its settings."""

    @property
    def method(self) -> str:
        """Its name on the command line and on cards."""
        raise NotImplementedError

    @property
    def preserves(self) -> bool:
        """Whether the function is kept, in exact arithmetic."""
        return True

    @property
    def exact(self) -> bool:
        """Whether binary formats hold the grown weights (or their sums over copies) without rounding."""
        return True

    def grown(self, config: ModelConfig) -> ModelConfig:
        """The new shape. Raises HyperLlamaError when the operator does not fit `config`."""
        raise NotImplementedError

    def tensors(self, config: ModelConfig) -> dict[str, TensorMap]:
        """The map of every tensor of the new model, by name, in its arena's order."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What a grown model's card says about it."""
        return {"method": self.method} | {key: value for key, value in asdict(self).items() if key != "rule"}


@dataclass(frozen=True)
class Widen(Operator):
    """Every width times an integer: hidden size and heads times `factor`, the FFN times `ffn_factor` (default: the same).

    head_dim stays; query heads grow with their key-value group.
    """

    factor: int = 2
    ffn_factor: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise HyperLlamaError(f"--factor is {self.factor}; growing needs an integer of at least 2")
        if self.ffn < 1:
            raise HyperLlamaError(f"--ffn-factor is {self.ffn_factor}; an integer of at least 1 was expected")

    @property
    def ffn(self) -> int:
        """The FFN's factor."""
        return self.factor if self.ffn_factor is None else self.ffn_factor

    def head_factor(self) -> int:
        """What a tied head's logits are divided by on top of before."""
        return self.factor

    def grown(self, config: ModelConfig) -> ModelConfig:
        return config.grown(self.factor, self.ffn, self.head_factor())

    def residual(self, config: ModelConfig) -> Axis:
        """The residual stream."""
        raise NotImplementedError

    def layer_axes(self, config: ModelConfig, layer: int) -> tuple[Axis, Axis]:
        """Key-value groups and neurons of a layer."""
        raise NotImplementedError

    def noise(self) -> float | None:
        """The noise on the layers' matrices, in dB."""
        return None

    def upper(self, name: str, layer: int, config: ModelConfig) -> str | None:
        """The tensor that gives the rows of new units, where it is another."""
        return None

    def tensors(self, config: ModelConfig) -> dict[str, TensorMap]:
        residual = self.residual(config)
        vocabulary, heads = Axis(config.vocab_size), config.num_heads // config.num_kv_heads * config.head_dim
        maps = {EMBEDDING: TensorMap(EMBEDDING, vocabulary, residual, outputs=True)}
        for layer in range(config.num_layers):
            groups, neurons = self.layer_axes(config, layer)
            query, key = groups.spread(heads), groups.spread(config.head_dim)
            matrices = {
                "self_attn.q_proj": (query, residual),
                "self_attn.k_proj": (key, residual),
                "self_attn.v_proj": (key, residual),
                "self_attn.o_proj": (residual, query),
                "mlp.gate_proj": (neurons, residual),
                "mlp.up_proj": (neurons, residual),
                "mlp.down_proj": (residual, neurons),
            }
            for norm in ("input_layernorm", "post_attention_layernorm"):
                name = f"model.layers.{layer}.{norm}.weight"
                maps[name] = TensorMap(name, residual)
            for part, (rows, cols) in matrices.items():
                name = f"model.layers.{layer}.{part}.weight"
                upper = self.upper(part, layer, config)
                maps[name] = TensorMap(name, rows, cols, upper=upper, noise_db=self.noise(), seed=self.seed)
        maps[FINAL_NORM] = TensorMap(FINAL_NORM, residual, gain=self.head_factor() if config.tie_embeddings else None)
        maps[HEAD] = TensorMap(HEAD, vocabulary, residual)
        return {tensor.name: maps[tensor.name] for tensor in logical_tensors(config)}


@dataclass(frozen=True)
class HyperClone(Widen):
    """Tiles. split: even shares of 1/factor; dyadic, exact in bf16 for any factor; uneven heads and neurons (LEMON)."""

    noise_db: float | None = None
    split: Split = "even"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_db is not None and self.split != "even":
            raise HyperLlamaError(f"--noise-db needs copies of equal shares; this clone's are {self.split}")

    @property
    def method(self) -> str:
        return "lemon" if self.split == "uneven" else "hyperclone"

    @property
    def exact(self) -> bool:
        return self.split == "dyadic" or (
            self.split == "even" and all(f & (f - 1) == 0 for f in (self.factor, self.ffn))
        )

    def head_factor(self) -> int:
        return 1 << (self.factor - 1).bit_length() if self.split == "dyadic" else self.factor

    def residual(self, config: ModelConfig) -> Axis:
        shares = _shares(self.factor, "dyadic") if self.split == "dyadic" else None
        return Axis(config.hidden_size, self.factor, shares)

    def layer_axes(self, config: ModelConfig, layer: int) -> tuple[Axis, Axis]:
        return (
            Axis(config.num_kv_heads, self.factor, _shares(self.factor, self.split)),
            Axis(config.intermediate_size, self.ffn, _shares(self.ffn, self.split)),
        )

    def noise(self) -> float | None:
        return self.noise_db


@dataclass(frozen=True)
class RandomCopies(Widen):
    """New units are copies of random old ones, drawn by (seed, axis, layer, unit). rule: net2wider, fpi or aki, see above.

    The residual stream's tiles are permuted instead: RMSNorm wants equally many copies of every unit.
    """

    rule: Literal["net2wider", "fpi", "aki"] = "net2wider"

    @property
    def method(self) -> str:
        return self.rule

    @property
    def preserves(self) -> bool:
        return self.rule != "aki"

    @property
    def exact(self) -> bool:
        return False  # a unit with three copies is divided by three

    def residual(self, config: ModelConfig) -> Axis:
        import numpy as np

        size = config.hidden_size
        tiles = [np.argsort(_draws(self.seed, f"residual {i}", size), kind="stable") for i in range(1, self.factor)]
        return Axis(size, units=np.concatenate([np.arange(size), *tiles]))

    def layer_axes(self, config: ModelConfig, layer: int) -> tuple[Axis, Axis]:
        groups = Axis(config.num_kv_heads, self.factor)
        if self.rule != "net2wider":
            groups = _random(self.seed, f"heads {layer}", config.num_kv_heads, self.factor)
        return groups, _random(self.seed, f"neurons {layer}", config.intermediate_size, self.ffn)

    def upper(self, name: str, layer: int, config: ModelConfig) -> str | None:
        if self.rule != "aki" or layer + 1 == config.num_layers:
            return None
        return f"model.layers.{layer + 1}.{name}.weight"


@dataclass(frozen=True)
class Deepen(Operator):
    """More layers. rule: stack, interleave, solar (two copies that leave `drop` layers out each) or identity, see above."""

    rule: Literal["stack", "interleave", "solar", "identity"] = "stack"
    factor: int = 2
    drop: int | None = None

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise HyperLlamaError(f"--depth-factor is {self.factor}; an integer of at least 2 was expected")
        if self.rule == "solar" and self.factor != 2:
            raise HyperLlamaError(f"--depth-factor is {self.factor}; solar joins exactly 2 copies")
        if self.rule != "solar" and self.drop is not None:
            raise HyperLlamaError(f"--drop is for solar alone, not for {self.rule}")

    @property
    def method(self) -> str:
        return self.rule

    @property
    def preserves(self) -> bool:
        return self.rule == "identity"

    def layers(self, config: ModelConfig) -> list[int]:
        """Old layer of every new one."""
        old = list(range(config.num_layers))
        if self.rule == "stack":
            return old * self.factor
        if self.rule != "solar":
            return [layer for layer in old for _ in range(self.factor)]
        drop = len(old) // 4 if self.drop is None else self.drop  # 8 of 32 in the paper
        if not 0 <= drop < len(old):
            raise HyperLlamaError(f"--drop is {drop}; a model of {len(old)} layers can leave out 0 to {len(old) - 1}")
        return old[: len(old) - drop] + old[drop:]

    def grown(self, config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"num_layers": len(self.layers(config))})

    def tensors(self, config: ModelConfig) -> dict[str, TensorMap]:
        layers, maps = self.layers(config), {}
        for tensor in logical_tensors(self.grown(config)):
            source, inserted, last = tensor.name, False, False
            if source.startswith("model.layers."):
                layer, part = source.removeprefix("model.layers.").split(".", 1)
                source = f"model.layers.{layers[int(layer)]}.{part}"
                inserted = self.rule == "identity" and int(layer) % self.factor > 0
                last = part in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            maps[tensor.name] = replace(_as_is(source, tensor.shape), zero=inserted and last, fresh=inserted)
        return maps


@dataclass(frozen=True)
class GrowVocabulary(Operator):
    """A larger vocabulary: the row of token i is the mean of the old rows pieces[i] (see vocabulary.py for such a mapping).

    A token with one piece keeps its row and its moments. Rows are padded to a multiple of 128 with zeros.
    """

    pieces: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @property
    def method(self) -> str:
        return "vocabulary"

    def grown(self, config: ModelConfig) -> ModelConfig:
        old, new = config.unpadded_vocab_size or config.vocab_size, len(self.pieces)
        if new < old:
            raise HyperLlamaError(
                f"the new vocabulary has {new} tokens, fewer than the model's {old}: it can only grow"
            )
        wrong = next((i for i, ids in enumerate(self.pieces) if not ids or not 0 <= min(ids) <= max(ids) < old), None)
        if wrong is not None:
            raise HyperLlamaError(f"the pieces of new token {wrong} are not among the model's {old} tokens")
        rows = -(-new // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return config.model_copy(update={"vocab_size": rows, "unpadded_vocab_size": new if new < rows else None})

    def tensors(self, config: ModelConfig) -> dict[str, TensorMap]:
        maps = {}
        for tensor in logical_tensors(self.grown(config)):
            pieces = self.pieces if tensor.name in (EMBEDDING, HEAD) else None
            maps[tensor.name] = replace(_as_is(tensor.name, tensor.shape), pieces=pieces)
        return maps

    def describe(self) -> dict[str, Any]:
        return {"method": self.method, "tokens": len(self.pieces)}


METHODS = ("hyperclone", "lemon", "net2wider", "fpi", "aki", "stack", "interleave", "solar", "identity", "vocabulary")


def make_operators(
    methods: Sequence[str],
    *,
    factor: int | None = None,
    ffn_factor: int | None = None,
    depth_factor: int | None = None,
    drop: int | None = None,
    dyadic: bool = False,
    noise_db: float | None = None,
    seed: int = 0,
    pieces: tuple[tuple[int, ...], ...] | None = None,
) -> list[Operator]:
    """The operators called `methods`, to be applied in turn; None takes an operator's default.

    Raises HyperLlamaError for an unknown method, and for an option that none of the methods takes.
    """
    deep, random = ("stack", "interleave", "solar", "identity"), ("net2wider", "fpi", "aki")
    for name in methods:
        if name not in METHODS:
            raise HyperLlamaError(f"unknown growth method {name}; {nearest(name, METHODS)}")
    users = {
        "--factor": (factor, ("hyperclone", "lemon", *random)),
        "--ffn-factor": (ffn_factor, ("hyperclone", "lemon", *random)),
        "--depth-factor": (depth_factor, deep),
        "--drop": (drop, ("solar",)),
        "--dyadic": (dyadic or None, ("hyperclone",)),
        "--noise-db": (noise_db, ("hyperclone",)),
        "--tokenizer": (pieces, ("vocabulary",)),
    }
    for option, (value, takers) in users.items():
        if value is not None and not set(takers) & set(methods):
            raise HyperLlamaError(f"{option} is for {', '.join(takers)}, not for {', '.join(methods)}")
    if "vocabulary" in methods and pieces is None:
        raise HyperLlamaError("growing the vocabulary needs --tokenizer NEW")
    width, depth = factor if factor is not None else 2, depth_factor if depth_factor is not None else 2
    operators: list[Operator] = []
    for name in methods:
        if name == "hyperclone":
            split: Split = "dyadic" if dyadic else "even"
            operators.append(HyperClone(width, ffn_factor, seed, noise_db, split))
        elif name == "lemon":
            operators.append(HyperClone(width, ffn_factor, seed, None, "uneven"))
        elif name in random:
            operators.append(RandomCopies(width, ffn_factor, seed, name))  # type: ignore[arg-type]
        elif name in deep:
            operators.append(Deepen(name, depth, drop if name == "solar" else None))  # type: ignore[arg-type]
        else:
            operators.append(GrowVocabulary(pieces or ()))
    return operators


def grown_config(operators: Sequence[Operator], config: ModelConfig) -> ModelConfig:
    """The shape after all operators."""
    for operator in operators:
        config = operator.grown(config)
    return config


def _as_is(source: str, shape: tuple[int, ...]) -> TensorMap:
    """An old tensor as it is."""
    return TensorMap(source, Axis(shape[0]), Axis(shape[1]) if len(shape) == 2 else None)


def _shares(copies: int, split: str) -> tuple[float, ...] | None:
    """Shares of the copies; None: 1/copies each."""
    if split == "dyadic" and copies & (copies - 1):
        whole = 1 << (copies - 1).bit_length()
        return (2 / whole,) * (whole - copies) + (1 / whole,) * (2 * copies - whole)
    if split == "uneven" and copies > 1:
        return ((copies + 1) / (2 * copies), *[1 / (2 * copies)] * (copies - 1))
    return None


def _draws(seed: int, what: str, n: int) -> "Array":
    """`n` 64-bit random numbers, each a function of (seed, what, element) alone."""
    import numpy as np

    digests = (blake2b(f"{seed} {what} {i}".encode(), digest_size=8).digest() for i in range(n))
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _random(seed: int, what: str, size: int, factor: int) -> Axis:
    """All old units, then random ones."""
    import numpy as np

    new = _draws(seed, what, size * (factor - 1)) % np.uint64(size)
    return Axis(size, units=np.concatenate([np.arange(size), new.astype(np.int64)]))
