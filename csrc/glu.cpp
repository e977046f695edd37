// glu: see kernels/glu.py for the formulas. Rows are contiguous; arithmetic is fp32, rounded once.
#include "common.h"

#include <cmath>
#include <type_traits>

namespace hyperllama {

enum class Activation { silu, gelu, gelu_tanh };

struct Value {
    float share, slope;  // act(g) = g * share; act'(g) = slope
};

struct Sigmoid {
    float value, rest;  // rest = 1 - value, without cancellation where value is next to one
};

inline Sigmoid sigmoid(float x) {
    float e = exp_(-x), value = 1.0f / (1.0f + e);
    return {value, e < 1.0f ? e * value : 1.0f - value};
}

template <Activation kind>
inline Value activate(float g) {
    if constexpr (kind == Activation::silu) {
        Sigmoid s = sigmoid(g);
        return {s.value, s.value + (s.value * g) * s.rest};
    } else if constexpr (kind == Activation::gelu) {
        // Phi(g) = erfc(-g / sqrt 2) / 2; for z >= 0, erfc(z) = e^(-z^2) P(1 / (1 + z / 2)), fitted on [0, 10] (7e-9 relative)
        float z = std::min(std::abs(g) * 0.707106781f, 14.5f), e = exp_(-z * z), t = 1.0f / (1.0f + 0.5f * z);
        float p = 0.0291604667873f;
        p = p * t - 0.217605434492f;
        p = p * t + 0.658977958645f;
        p = p * t - 0.991349185429f;
        p = p * t + 0.705255105748f;
        p = p * t - 0.26381043664f;
        p = p * t + 0.289785350497f;
        p = p * t + 0.222276660347f;
        p = p * t + 0.285472218854f;
        p = p * t + 0.281828112907f;
        p = p * t + 9.17899469624e-6f;
        float tail = 0.5f * e * p, share = g < 0.0f ? tail : 1.0f - tail;
        return {share, share + g * e * 0.398942280f};
    } else {
        // (1 + tanh u) / 2 = 1 / (1 + e^(-2u)): nothing cancels; beyond +-100 nothing changes any more
        constexpr float a = 1.59576912f, b = 0.0713548163f;  // 2u = a g + b g^3: 2 sqrt(2 / pi), and that times 0.044715
        float x = std::min(std::max(g, -100.0f), 100.0f), square = x * x;
        Sigmoid s = sigmoid(x * (a + b * square));
        return {s.value, s.value + x * (a + 3.0f * b * square) * (s.value * s.rest)};
    }
}

template <class T, Activation kind>
static void glu_forward(const T* gate_up, T* y, int64_t rows, int64_t width, int threads) {
    parallel(rows, 4 * width, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++) {
            const T *gate = gate_up + 2 * r * width, *up = gate + width;
            T* out = y + r * width;
#pragma omp simd
            for (int64_t c = 0; c < width; c++) {
                float g = load(gate + c);
                store(out + c, g * activate<kind>(g).share * load(up + c));
            }
        }
    });
}

template <class T, Activation kind>
static void glu_backward(const T* dy, const T* gate_up, T* dgate_up, int64_t rows, int64_t width, int threads) {
    parallel(rows, 4 * width, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++) {
            const T *gate = gate_up + 2 * r * width, *up = gate + width, *grad = dy + r * width;
            T *dgate = dgate_up + 2 * r * width, *dup = dgate + width;
#pragma omp simd
            for (int64_t c = 0; c < width; c++) {
                float g = load(gate + c), d = load(grad + c);
                Value a = activate<kind>(g);
                store(dgate + c, d * load(up + c) * a.slope);
                store(dup + c, d * g * a.share);
            }
        }
    });
}

template <class T>
static void glu(int activation, const void* dy, const void* gate_up, void* out, int64_t rows, int64_t width, int threads) {
    auto pick = [&](auto kind) {
        constexpr Activation a = decltype(kind)::value;
        if (dy)
            glu_backward<T, a>((const T*)dy, (const T*)gate_up, (T*)out, rows, width, threads);
        else
            glu_forward<T, a>((const T*)gate_up, (T*)out, rows, width, threads);
    };
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
