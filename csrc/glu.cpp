// glu: see kernels/glu.py for the formulas. Rows are contiguous; arithmetic is fp32, rounded once.
#include "vector.h"

#include <limits>

namespace hyperllama {

enum class Activation { silu, gelu, gelu_tanh };

struct Value {
    Vector act, slope;  // of the gate: act(g), act'(g)
};

constexpr float kLeast = -88.7f;  // whose sigmoid, and those of all below, is taken for 0

struct Sigmoid {
    Vector value, rest;  // of x >= kLeast; rest = 1 - value, without cancellation where value is next to one, or 0 where value is 0
};

template <class T>
inline Sigmoid sigmoid(Vector x) {
    const Vector e = exponential<T>(-x), value = inverse<T>(1.0f + e);
    return {value, at_most(std::numeric_limits<float>::max(), e) * value};
}

template <class T, Activation kind>
inline Value activate(Vector g) {
    if constexpr (kind == Activation::silu) {
        const Vector x = at_least(kLeast, g);
        const Sigmoid s = sigmoid<T>(x);
        const Vector act = x * s.value;
        return {act, s.value + act * s.rest};
    } else if constexpr (kind == Activation::gelu) {
        // Phi(g) = erfc(-g / sqrt 2) / 2; for z >= 0, erfc(z) = e^(-z^2) P(1 / (1 + z / 2)), fitted on [0, 10] (7e-9 relative)
        Vector z = absolute(g) * 0.707106781f;
        z = select(z > 14.5f, Vector{} + 14.5f, z);
        const Vector e = exponential<T>(-z * z), t = inverse<T>(1.0f + 0.5f * z);
        Vector p = Vector{} + 0.0291604667873f;
        for (float c : {-0.217605434492f, 0.658977958645f, -0.991349185429f, 0.705255105748f, -0.26381043664f, 0.289785350497f,
                        0.222276660347f, 0.285472218854f, 0.281828112907f, 9.17899469624e-6f})
            p = p * t + c;
        const Vector tail = 0.5f * e * p, share = select(g < 0.0f, tail, 1.0f - tail);
        return {g * share, share + g * e * 0.398942280f};
    } else {
        // (1 + tanh u) / 2 = 1 / (1 + e^(-2u)): nothing cancels; beyond +-100 nothing changes any more
        constexpr float a = 1.59576912f, b = 0.0713548163f;  // 2u = a g + b g^3: 2 sqrt(2 / pi), and that times 0.044715
        const Vector low = select(g < -100.0f, Vector{} - 100.0f, g), x = select(low > 100.0f, Vector{} + 100.0f, low), square = x * x;
        const Sigmoid s = sigmoid<T>(at_least(kLeast, x * (a + b * square)));
        return {low * s.value, s.value + x * (a + 3.0f * b * square) * (s.value * s.rest)};
    }
}

// Calls pairs(c) for twice as many numbers as a vector has, and vectors(c, n) for what is left over.
template <class F, class G>
static inline void each_twin(int64_t width, F pairs, G vectors) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) pairs(c);
    each_vector(width - c, [=](int64_t i, auto n) { vectors(c + i, n); });
}

template <class T, Activation kind>
static void row_forward(const T* gate, const T* up, T* y, int64_t width) {
    auto of = [](Vector g, Vector u) { return activate<T, kind>(g).act * u; };
    each_twin(
        width,
        [=](int64_t c) {
            for (const T* p : {gate, up, static_cast<const T*>(y)}) ask_ahead(p + c);
            const Twin g = twin(gate + c), u = twin(up + c);
            put(y + c, {of(g.a, u.a), of(g.b, u.b)});
        },
        [=](int64_t c, auto n) { put(y + c, of(vector(gate + c, n), vector(up + c, n)), n); });
}

template <class T, Activation kind>
static void row_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t width) {
    each_twin(
        width,
        [=](int64_t c) {
            for (const T* p : {gate, up, dy, static_cast<const T*>(dgate), static_cast<const T*>(dup)}) ask_ahead(p + c);
            const Twin g = twin(gate + c), u = twin(up + c), d = twin(dy + c);
            const Value a = activate<T, kind>(g.a), b = activate<T, kind>(g.b);
            put(dgate + c, {d.a * u.a * a.slope, d.b * u.b * b.slope});
            put(dup + c, {d.a * a.act, d.b * b.act});
        },
        [=](int64_t c, auto n) {
            const Vector d = vector(dy + c, n);
            const Value a = activate<T, kind>(vector(gate + c, n));
            put(dgate + c, d * vector(up + c, n) * a.slope, n);
            put(dup + c, d * a.act, n);
        });
}

template <class T, Activation kind>
static void rows(const T* dy, const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
    parallel(rows, 4 * width, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++) {
            const T *gate = gate_up + 2 * r * width, *up = gate + width;
            if (dy)
                row_backward<T, kind>(dy + r * width, gate, up, out + 2 * r * width, out + (2 * r + 1) * width, width);
            else
                row_forward<T, kind>(gate, up, out + r * width, width);
        }
    });
}

template <class T>
static void glu(int activation, const void* dy, const void* gate_up, void* out, int64_t n, int64_t width, int threads) {
    auto pick = [&](auto kind) { rows<T, decltype(kind)::value>((const T*)dy, (const T*)gate_up, (T*)out, n, width, threads); };
    if (activation == 0) pick(std::integral_constant<Activation, Activation::silu>());
    if (activation == 1) pick(std::integral_constant<Activation, Activation::gelu>());
    if (activation == 2) pick(std::integral_constant<Activation, Activation::gelu_tanh>());
}

}  // namespace hyperllama

// Forward: dy is null and out is (rows, width). Backward: dy is (rows, width) and out (rows, 2 width).
HYPERLLAMA_API void hyperllama_glu(int is_bf16, int activation, const void* dy, const void* gate_up, void* out, int64_t rows,
                                   int64_t width, int threads) {
    if (is_bf16)
        hyperllama::glu<hyperllama::bf16>(activation, dy, gate_up, out, rows, width, threads);
    else
        hyperllama::glu<float>(activation, dy, gate_up, out, rows, width, threads);
}
