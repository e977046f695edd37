"""The dtypes weights are stored in, by name: what files, plans and recipes know of them without torch."""

from collections.abc import Iterable

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
SAFETENSORS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def common_dtype(names: Iterable[str]) -> str:
    """The narrowest dtype that holds all of `names`: bfloat16 and float16 together need float32."""
    found = set(names)
    if len(found) == 1:
        return found.pop()
    return "float64" if "float64" in found else "float32"
