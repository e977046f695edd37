"""The four models that every kernel is judged at: the paper's two, and two larger ones."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model's shape, under the names of hyperllama.settings.ModelConfig, which needs more packages than a benchmark may."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    tie_embeddings: bool

    @property
    def qkv_width(self) -> int:
        """Columns of the packed projection of queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def settings(self, num_layers: int) -> dict[str, Any]:
        """Keywords for ModelConfig, with so many layers."""
        return asdict(self) | {"num_layers": num_layers}


SHAPES = {
    "180M": Shape(128256, 576, 1536, 30, 9, 3, 64, "gelu", True),
    "572M": Shape(128256, 1152, 3072, 30, 18, 6, 64, "gelu", True),
    "1.7B": Shape(128256, 2048, 8192, 24, 32, 32, 64, "silu", True),
    "8B": Shape(128256, 4096, 14336, 32, 32, 8, 128, "silu", False),
}
