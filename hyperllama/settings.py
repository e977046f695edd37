"""Groups of settings that refuse what they do not know, in sentences; and the one that every command meets: a model's shape."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hyperllama.errors import HyperLlamaError, nearest

VOCAB_MULTIPLE = 128  # embedding rows are padded to this, so that shapes share small FLOP quanta and GEMMs stay aligned

T = TypeVar("T", bound=BaseModel)


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Settings):
    """The shape of a Llama. Names follow the field; `names.py` and `hub.py` translate to Hugging Face."""

    vocab_size: int = Field(gt=0, description="embedding rows, padding included")
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    rope_theta: float = Field(10000.0, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    tie_embeddings: bool = True
    lm_head_normalization_factor: float = Field(1.0, gt=0, description="logits are divided by it (grown tied models)")
    max_position_embeddings: int = Field(2048, gt=0, description="tokens")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    unpadded_vocab_size: int | None = Field(None, gt=0, description="real tokens; logits of later rows are masked")

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        if self.unpadded_vocab_size is not None and self.unpadded_vocab_size > self.vocab_size:
            raise ValueError(f"unpadded_vocab_size ({self.unpadded_vocab_size}) exceeds vocab_size ({self.vocab_size})")
        return self

    @property
    def num_parameters(self) -> int:
        """Weights in the model; a tied table counts once."""
        from hyperllama.names import logical_tensors

        return sum(tensor.size for tensor in logical_tensors(self))

    def grown(self, factor: int, ffn_factor: int | None = None, head_factor: int | None = None) -> "ModelConfig":
        """The shape after HyperCloning by `factor`: widths and heads times factor, head_dim kept.

        `ffn_factor` is the FFN's where it differs. A tied head's factor is multiplied along (its input grew, its shared table
        can't be divided): by `head_factor` where the copies do not share by 1/factor.
        """
        head = (factor if head_factor is None else head_factor) if self.tie_embeddings else 1
        return self.model_copy(
            update={
                "hidden_size": self.hidden_size * factor,
                "intermediate_size": self.intermediate_size * (factor if ffn_factor is None else ffn_factor),
                "num_heads": self.num_heads * factor,
                "num_kv_heads": self.num_kv_heads * factor,
                "lm_head_normalization_factor": self.lm_head_normalization_factor * head,
            }
        )


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The valid keys of the settings group that holds the last element of `location`."""
    current: Any = model
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            inner = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
            if not inner:
                return []
            annotation = inner[0]
        current = annotation
    return list(current.model_fields)


def validated(model: type[T], values: Any, where: str) -> T:
    """Validate `values` as `model`.

    Raises HyperLlamaError with one sentence per problem: the key, what is wrong and, for an unknown key, the nearest valid one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        sentences = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "the file"
            if problem["type"] == "extra_forbidden":
                valid = _fields_at(model, problem["loc"])
                sentences.append(f"unknown key {key}; {nearest(str(problem['loc'][-1]), valid)}")
            elif problem["type"] == "missing":
                sentences.append(f"key {key} is missing")
            else:
                got = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
                sentences.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}{got}")
        raise HyperLlamaError(f"{where}: " + "; ".join(sentences)) from None
