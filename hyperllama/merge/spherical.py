"""Merges that are one linear combination whose weights follow from the Gram matrix G of the tensors: G_ij = <x_i, x_j>.

Everything these methods ask of whole tensors (norms, angles, points on the sphere) is a quadratic form in G: a vector
sum_i c_i x_i is its coefficients c, with inner product <c, e> = c G e. So one pass gives G, a few numbers of fp64 are worked
out here, without torch, and a second pass makes the sum. With a base, x_i stands for the difference to it.

    slerp, nuslerp   (sin((1-t) a) x_0 + sin(t a) x_1) / sin a, a the angle between both, a right one when a tensor is zero;
                     (1-t) x_0 + t x_1 when they are nearly parallel: |cos a| > 0.9995 (slerp), sin a < 1e-4 (nuslerp)
    multislerp       u_i = x_i / (|x_i| + eps), m = unit(sum w_i u_i), v = sum w_i (u_i - <u_i, m> m):
                     (cos|v| m + sin|v| v / |v|) sum w_i |x_i|; sum w_i x_i when the weighted units cancel
    karcher          fixed point of m -> exp_m(mean_i log_m(u_i)) over unit tensors u_i, times the mean norm
    model_stock      t / N for each of the N differences, t = N c / (1 + (N-1) c), c the mean cosine of all pairs

Nothing here divides by less than it checked: every weight is finite for finite G. nuslerp's limit is what G resolves (2e-8 of the
norms): below it both formulas agree to 1e-8 for parallel tensors, and for antiparallel ones there is no shortest arc.
Sources: Shoemake 1985 (slerp); Goddard (nuslerp, multislerp: mergekit); Karcher 1977; Jang et al. 2024, "Model Stock".
"""

from collections.abc import Sequence
from itertools import combinations
from math import acos, cos, sin, sqrt

Gram = Sequence[Sequence[float]]
Vector = list[float]

SMALLEST_NORM = 1e-12
NEARLY_PARALLEL = 0.9995
SMALLEST_SINE = 1e-4
SMALLEST_NORM_PRODUCT = 1e-6


def _inner(gram: Gram, a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y * g for x, row in zip(a, gram, strict=True) for y, g in zip(b, row, strict=True))


def _norm(gram: Gram, a: Sequence[float]) -> float:
    return sqrt(max(_inner(gram, a, a), 0.0))


def _norms(gram: Gram) -> Vector:
    return [sqrt(max(row[i], 0.0)) for i, row in enumerate(gram)]


def _sum(terms: Sequence[tuple[float, Sequence[float]]]) -> Vector:
    """The linear combination of the vectors."""
    return [sum(factor * vector[i] for factor, vector in terms) for i in range(len(terms[0][1]))]


def _unit(size: int, i: int, length: float = 1.0) -> Vector:
    return [length if j == i else 0.0 for j in range(size)]


def _clamp(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))


def _arc(gram: Gram, t: float, largest_cosine: float, smallest_sine: float) -> Vector:
    norms = _norms(gram)
    cosine = _clamp(gram[0][1] / norms[0] / norms[1]) if min(norms) > SMALLEST_NORM else 0.0
    angle = acos(cosine)
    if abs(cosine) > largest_cosine or sin(angle) < smallest_sine:
        return [1 - t, t]
    return [sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)]


def slerp(gram: Gram, t: float) -> Vector:
    """Weights of the two tensors at the share `t` of the arc from the first to the second."""
    return _arc(gram, t, NEARLY_PARALLEL, 0.0)


def nuslerp(gram: Gram, weights: Sequence[float]) -> Vector:
    """Weights of two tensors on the arc between them, at t = w_1 / (w_0 + w_1)."""
    return _arc(gram, share(weights), 1.0, SMALLEST_SINE)


def share(weights: Sequence[float]) -> float:
    """nuslerp's position between two models; the middle when the weights sum to nothing."""
    total = sum(weights)
    return weights[1] / total if abs(total) >= 1e-6 else 0.5


def multislerp(gram: Gram, weights: Sequence[float], eps: float) -> Vector:
    """Weights of the N tensors; `weights` are normalized already where they should be. One tensor stays as it is."""
    size, norms = len(gram), _norms(gram)
    if size == 1:
        return [1.0]
    units = [_unit(size, i, 1 / max(norm + eps, SMALLEST_NORM)) for i, norm in enumerate(norms)]
    mean = _sum(list(zip(weights, units, strict=True)))
    length = _norm(gram, mean)
    if length < eps + SMALLEST_NORM:
        return list(weights)
    mean = [x / length for x in mean]
    along = sum(weight * _inner(gram, unit, mean) for weight, unit in zip(weights, units, strict=True))
    tangent = _sum([*zip(weights, units, strict=True), (-along, mean)])
    speed = _norm(gram, tangent)
    turn = sin(speed) / speed if speed > SMALLEST_NORM else 1.0
    scale = sum(weight * norm for weight, norm in zip(weights, norms, strict=True))
    return [scale * x for x in _sum([(cos(speed), mean), (turn, tangent)])]


def karcher(gram: Gram, max_iter: int, tol: float) -> Vector:
    """Weights of the N tensors that make their Riemannian mean on the sphere, with the mean of their norms."""
    size, norms = len(gram), _norms(gram)
    if size == 1:
        return [1.0]
    units = [_unit(size, i, 1 / norm) for i, norm in enumerate(norms) if norm > max(tol, SMALLEST_NORM)]
    if not units:
        return [0.0] * size
    alpha = 1 / len(units)
    mean = _sum([(alpha, unit) for unit in units])
    length = _norm(gram, mean)
    mean = units[0] if length < tol else [x / length for x in mean]
    for _ in range(max_iter):
        terms: list[tuple[float, Vector]] = [(0.0, mean)]
        for unit in units:
            cosine = _clamp(_inner(gram, mean, unit))
            angle = acos(cosine)
            if sin(angle) > tol:  # the logarithm of the point itself is zero, that of its antipode is not defined
                terms += [(alpha * angle / sin(angle), unit), (-alpha * angle / sin(angle) * cosine, mean)]
        tangent = _sum(terms)
        speed = _norm(gram, tangent)
        if speed < max(tol, SMALLEST_NORM):
            break
        mean = _sum([(cos(speed), mean), (sin(speed) / speed, tangent)])
        if (length := _norm(gram, mean)) > tol:
            mean = [x / length for x in mean]
    scale = sum(norm for norm in norms if norm > tol) / size
    return [scale * x for x in mean]


def model_stock(gram: Gram) -> Vector:
    """Weights of the N >= 2 differences; zero, so that the base stays, when they have no centre that is nearer."""
    norms = _norms(gram)
    pairs = list(combinations(range(len(gram)), 2))
    cosines = [_clamp(gram[i][j] / max(norms[i] * norms[j], SMALLEST_NORM_PRODUCT)) for i, j in pairs]
    mean = sum(cosines) / len(cosines)
    divisor = 1 + (len(gram) - 1) * mean
    return [mean / divisor if divisor > SMALLEST_NORM_PRODUCT else 0.0] * len(gram)
