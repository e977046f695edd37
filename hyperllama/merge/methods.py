"""The merge methods: which parameters each takes, and the op each comes down to. Nothing here needs torch.

`METHODS` is the one table of methods: recipe, plan and executor ask it and know no method by name.
    linear, task_arithmetic, ties, dare_*, breadcrumbs*, della*    ops of kernels/merge.py, with one kind of trim each
    slerp, nuslerp, multislerp, karcher, model_stock               the same ops, with weights from the Gram matrix (spherical.py)
    the rest                                                       a function of elementwise.py on whole tensors
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hyperllama.merge import spherical

REQUIRED = object()
"""The default of a parameter that every model must be given."""

SMALLEST_DIVISOR = 1e-8
"""A sum of weights below it can't be divided by: see kernels/merge.py."""

IGNORED = frozenset({"weight", "density", "int8_mask", "normalize", "rescale"})
"""Parameters of some methods that mergekit accepts, without effect, under every other."""

ModelValues = Sequence[dict[str, float]]
MergeValues = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of an op of kernels/merge.py, where its formula and the other fields are explained.

    coefficients: Gram matrix of the inputs (of their differences to the base, for an op that has one) -> weights.
    gammas: shares of the largest magnitudes that are dropped before the next `densities` are kept (breadcrumbs).
    epsilons: chances to be kept rise from density - epsilon to density + epsilon with the magnitude's rank (DELLA).
    working: the dtype in which every operation is rounded, as mergekit's are; None for fp32 and one rounding.
    """

    op: Literal["linear", "task_arithmetic", "ties"]
    weights: tuple[float, ...] = ()
    normalize: bool = False
    lam: float = 1.0
    densities: tuple[float, ...] = ()
    keys: tuple[int, ...] = ()
    rescale: Literal["none", "density", "norm"] = "none"
    coefficients: Callable[[spherical.Gram], Sequence[float]] | None = None
    gammas: tuple[float, ...] = ()
    epsilons: tuple[float, ...] = ()
    working: str | None = None

    def weighted(self, gram: spherical.Gram) -> "Call":
        """The call with its weights worked out."""
        assert self.coefficients is not None
        return replace(self, weights=tuple(self.coefficients(gram)), coefficients=None)


@dataclass(frozen=True)
class TensorCall:
    """One call of a function of elementwise.py: `function(base, tensors, **options)` in fp32."""

    function: str
    options: Mapping[str, Any] = field(default_factory=dict)


Lower = Callable[[ModelValues, MergeValues], Call | TensorCall]
Problem = Callable[[ModelValues, MergeValues], str | None]


@dataclass(frozen=True)
class Method:
    """A merge method.

    model_parameters: parameters that each model has, with default; merge_parameters: those of the merge as a whole.
    lower: (values per model, values of the merge) -> the op that makes the merged tensor.
    base: what a base model is to it: "input" one more input, "first" the first input (and required), else that from which
        differences are taken, and then not one of the inputs.
    inputs: the least and the largest number of inputs; a base that is no input does not count.
    problem: what is wrong with the values of a tensor, as the end of a sentence that begins with the method and the tensor.
    random: whether the op draws: it then gets a key per input from (seed, output tensor, model).
    weighable: whether its weights can be tensors, by row or element.
    """

    model_parameters: dict[str, Any]
    merge_parameters: dict[str, Any]
    lower: Lower
    base: Literal["input", "first", "optional", "required"] = "input"
    inputs: tuple[int, int] = (1, 1 << 16)
    problem: Problem = lambda values, merge: None
    random: bool = False
    weighable: bool = False

    @property
    def needs_base(self) -> bool:
        """Whether a recipe must name a base model."""
        return self.base in ("first", "required")

    @property
    def inert(self) -> frozenset[str]:
        """Parameters that are accepted and change nothing."""
        return IGNORED - self.model_parameters.keys() - self.merge_parameters.keys()


def _column(values: ModelValues, name: str) -> tuple[float, ...]:
    return tuple(float(value[name]) for value in values)


def _sum_is_zero(values: ModelValues, merge: MergeValues) -> str | None:
    weights = _column(values, "weight")
    if merge.get("normalize", merge.get("normalize_weights")) and abs(sum(weights)) < SMALLEST_DIVISOR:
        return f"the weights {list(weights)} sum to zero; normalize divides by the sum"
    return None


def _task_problem(values: ModelValues, merge: MergeValues) -> str | None:
    # all weights zero is a plain way to say: leave this tensor as the base has it
    return _sum_is_zero(values, merge) if any(_column(values, "weight")) else None


def _vote_problem(values: ModelValues, merge: MergeValues) -> str | None:
    return None  # the divisor is that of the models that agree, 1 where it is zero


def _with_epsilon(problem: Problem) -> Problem:
    def both(values: ModelValues, merge: MergeValues) -> str | None:
        for density, epsilon in zip(_column(values, "density"), _column(values, "epsilon"), strict=True):
            if 0 < density < 1 and not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
                return f"density {density} and epsilon {epsilon} give no chances between 0 and 1"
        return problem(values, merge)

    return both


def _linear(values: ModelValues, merge: MergeValues) -> Call:
    return Call("linear", _column(values, "weight"), bool(merge["normalize"]))


def _task_vectors(op: Literal["task_arithmetic", "ties"]) -> Lower:
    """Lowering of the task-vector methods; which trim it is follows from the parameters they have."""

    def lower(values: ModelValues, merge: MergeValues) -> Call:
        def trim(name: str) -> tuple[float, ...]:
            return _column(values, name) if name in values[0] else ()

        return Call(
            op,
            _column(values, "weight"),
            bool(merge["normalize"]),
            float(merge["lambda"]),
            trim("density"),
            rescale="norm" if merge.get("rescale") else "none",
            gammas=trim("gamma"),
            epsilons=trim("epsilon"),
        )

    return lower


def _trimmed(
    op: Literal["task_arithmetic", "ties"], normalize: bool, rescale: bool, random: bool = False, **trims: float
) -> Method:
    """A task-vector method: trim by density and `trims` (parameter -> default), then sum, with a vote under ties."""
    problem = _vote_problem if op == "ties" else _task_problem
    return Method(
        model_parameters={"weight": REQUIRED, "density": 1.0, **trims},
        merge_parameters={"normalize": normalize, "rescale": rescale, "lambda": 1.0},
        lower=_task_vectors(op),
        base="required",
        problem=_with_epsilon(problem) if "epsilon" in trims else problem,
        random=random,
    )


def _passthrough(values: ModelValues, merge: MergeValues) -> Call:
    return Call("linear", _column(values, "scale"))


def _slerp(values: ModelValues, merge: MergeValues) -> Call:
    return Call("linear", coefficients=lambda gram: spherical.slerp(gram, float(merge["t"])))


def _nuslerp(values: ModelValues, merge: MergeValues) -> Call | TensorCall:
    weights = _column(values, "weight")
    if merge["nuslerp_flatten"]:
        return Call("linear", coefficients=lambda gram: spherical.nuslerp(gram, weights))
    return TensorCall("nuslerp", {"t": spherical.share(weights), "dim": 0 if merge["nuslerp_row_wise"] else -1})


def _multislerp(values: ModelValues, merge: MergeValues) -> Call:
    weights = _column(values, "weight")
    total = sum(weights) if merge["normalize_weights"] else 1.0
    shares = [weight / total for weight in weights]
    return Call("linear", coefficients=lambda gram: spherical.multislerp(gram, shares, float(merge["eps"])))


def _karcher(values: ModelValues, merge: MergeValues) -> Call:
    steps, tol = int(merge["max_iter"]), float(merge["tol"])
    return Call("linear", coefficients=lambda gram: spherical.karcher(gram, steps, tol))


def _model_stock(values: ModelValues, merge: MergeValues) -> Call | TensorCall:
    if merge["filter_wise"]:
        return TensorCall("model_stock")
    return Call("task_arithmetic", coefficients=spherical.model_stock)


def _tensor_call(function: str) -> Lower:
    """Lowering to a function of elementwise.py that takes the parameters of the merge as they are."""
    return lambda values, merge: TensorCall(function, merge)


METHODS: dict[str, Method] = {
    "linear": Method({"weight": REQUIRED}, {"normalize": True}, _linear, problem=_sum_is_zero, weighable=True),
    "passthrough": Method({"scale": 1.0}, {}, _passthrough, inputs=(1, 1)),
    "task_arithmetic": Method(
        {"weight": REQUIRED},
        {"normalize": False, "lambda": 1.0},
        _task_vectors("task_arithmetic"),
        base="required",
        problem=_task_problem,
        weighable=True,
    ),
    "ties": _trimmed("ties", normalize=True, rescale=False),
    "dare_linear": _trimmed("task_arithmetic", normalize=False, rescale=True, random=True),
    "dare_ties": _trimmed("ties", normalize=False, rescale=True, random=True),
    "breadcrumbs": _trimmed("task_arithmetic", normalize=False, rescale=False, gamma=0.01),
    "breadcrumbs_ties": _trimmed("ties", normalize=False, rescale=False, gamma=0.01),
    "della_linear": _trimmed("task_arithmetic", normalize=False, rescale=True, random=True, epsilon=0.15),
    "della": _trimmed("ties", normalize=True, rescale=True, random=True, epsilon=0.15),
    "slerp": Method({}, {"t": REQUIRED}, _slerp, base="first", inputs=(2, 2)),
    "nuslerp": Method(
        {"weight": REQUIRED},
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        _nuslerp,
        base="optional",
        inputs=(2, 2),
    ),
    "multislerp": Method(
        {"weight": REQUIRED},
        {"normalize_weights": True, "eps": 1e-8},
        _multislerp,
        base="optional",
        problem=_sum_is_zero,
    ),
    "karcher": Method({}, {"max_iter": 10, "tol": 1e-5}, _karcher),
    "model_stock": Method({}, {"filter_wise": False}, _model_stock, base="required", inputs=(2, 1 << 16)),
    "sce": Method({}, {"select_topk": 1.0}, _tensor_call("sce"), base="required"),
    "ram": Method({}, {"epsilon": 1e-5}, _tensor_call("ram"), base="required"),
    "ramplus_tl": Method({}, {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}, _tensor_call("ram"), base="required"),
    "nearswap": Method({}, {"t": REQUIRED}, _tensor_call("nearswap"), base="required", inputs=(1, 1)),
    "arcee_fusion": Method({}, {}, _tensor_call("arcee_fusion"), base="required", inputs=(1, 1)),
}
