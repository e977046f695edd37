// Vectors of one register, on every instruction set and with GCC and Clang: compilers take wider ones apart element by element.
// For loops that gain from more than `omp simd` gives them: conversions of bf16 in one instruction, whole functions of vectors.
#pragma once
#include "common.h"

#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace hyperllama {
namespace {  // every file compiles these with its own flags

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Vector vector(const float* p) {
    Vector x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline Vector vector(const bf16* p) {
    Halves x;
    std::memcpy(&x, p, sizeof x);
#ifdef __AVX512F__
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);  // GCC 12 widens in four steps
#else
    return (Vector)(__builtin_convertvector(x, Bits) << 16);
#endif
}

inline void put(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }

// The bits of the nearest bf16, of two the even one; NaN stays NaN.
inline Bits nearest(Vector x) {
    const Bits bits = (Bits)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded;
}

// Rounded so. Where the CPU has an instruction for it, subnormal results are 0.
inline void put(bf16* p, Vector x) {
#if defined(__AVX512BF16__)
    const Halves y = (Halves)_mm512_cvtneps_pbh((__m512)x);
#elif defined(__AVX512F__)
    const Halves y = (Halves)_mm512_cvtepi32_epi16((__m512i)nearest(x));
#else
    const Halves y = __builtin_convertvector(nearest(x), Halves);
#endif
    std::memcpy(static_cast<void*>(p), &y, sizeof y);
}

// A whole vector, or its first n < kLanes numbers; the others are 0.
typedef std::integral_constant<int64_t, kLanes> Whole;

template <class T>
inline Vector vector(const T* p, Whole) { return vector(p); }
template <class T>
inline Vector vector(const T* p, int64_t n) {
    T padded[kLanes] = {};
    std::memcpy(static_cast<void*>(padded), p, n * sizeof(T));
    return vector(padded);
}
template <class T>
inline void put(T* p, Vector x, Whole) { put(p, x); }
template <class T>
inline void put(T* p, Vector x, int64_t n) {
    T padded[kLanes];
    put(padded, x);
    std::memcpy(static_cast<void*>(p), padded, n * sizeof(T));
}

// Two vectors of numbers that lie together, in an order of its own: for what is done to each number alone.
struct Twin {
    Vector a, b;
};

inline Twin twin(const float* p) { return {vector(p), vector(p + kLanes)}; }
inline Twin twin(const bf16* p) {  // the numbers at even places, and those at odd ones: an operation each
    Bits x;
    std::memcpy(&x, p, sizeof x);
    return {(Vector)(x << 16), (Vector)(x & 0xFFFF0000)};
}
inline void put(float* p, Twin x) {
    put(p, x.a);
    put(p + kLanes, x.b);
}
inline void put(bf16* p, Twin x) {
#if defined(__AVX512BF16__)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                           18, 2, 17, 1, 16, 0);
    const __m512i y = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a));
#else
    const Bits y = nearest(x.a) | nearest(x.b) << 16;
#endif
    std::memcpy(static_cast<void*>(p), &y, sizeof y);
}

// Asks for what a stream of numbers will need, to read or to write: the CPU's own prefetching ends with a page of 4 kB and begins the
// next one slowly. Into L2, which waits for more lines at once than L1 does. Beyond an array's end it does nothing.
inline void ask_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 8192, 0, 2); }

// Calls f(c, n) for the vectors of `cols` numbers: n is Whole{} for all but what is left over.
template <class F>
inline void each_vector(int64_t cols, F f) {
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) f(c, Whole{});
    if (c < cols) f(c, cols - c);
}

inline Vector select(Integers condition, Vector yes, Vector no) { return condition ? yes : no; }
inline Vector larger(Vector a, Vector b) { return select(a < b, b, a); }
inline Vector absolute(Vector x) { return (Vector)((Integers)x & 0x7FFFFFFF); }
// x or, where that is less (more), `least` (`most`); NaN stays NaN
inline Vector at_least(float least, Vector x) {
#ifdef __AVX512F__
    return (Vector)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x);  // GCC 12 compares and blends
#else
    return select(x < least, Vector{} + least, x);
#endif
}
inline Vector at_most(float most, Vector x) {
#ifdef __AVX512F__
    return (Vector)_mm512_min_ps(_mm512_set1_ps(most), (__m512)x);
#else
    return select(x > most, Vector{} + most, x);
#endif
}
// x as T holds it, where T is what a stream of sums is kept in
inline Vector rounded(Vector x, const float*) { return x; }
inline Vector rounded(Vector x, const bf16*) {
    bf16 kept[kLanes];
    put(kept, x);
    return vector(kept);
}

template <class F>
inline float reduce(Vector v, F f) {
    float x[kLanes];
    std::memcpy(x, &v, sizeof v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) x[i] = f(x[i], x[i + width]);
    return x[0];
}
inline float sum(Vector v) {
    return reduce(v, [](float a, float b) { return a + b; });
}
inline float largest(Vector v) {
    return reduce(v, [](float a, float b) { return a < b ? b : a; });
}

// The sum of f(c, n) over the vectors of `cols` numbers: f gives 0 for what is left over. Short chains of rounding.
template <class F>
inline float sum_over(int64_t cols, F f) {
    constexpr int64_t block = 32 * kLanes;
    float total = 0;
    for (int64_t first = 0; first < cols; first += block) {
        Vector part{};
        each_vector(std::min(block, cols - first), [&part, &f, first](int64_t c, auto n) { part += f(first + c, n); });
        total += sum(part);
    }
    return total;
}

// What follows is to about one ulp for float, and to 1e-4 for bf16, whose own rounding is 20 times that.

// e^x for x up to 88.7, where it is infinite; far below 2^-126 it is 0. NaN stays NaN.
// e^x = 2^n e^r, and e^r by a polynomial fitted for least relative error.
template <class T>
inline Vector exponential(Vector x) {
    constexpr float log2_e = 1.44269504f;
#ifdef __AVX512F__
    if constexpr (std::is_same_v<T, bf16>) {  // here 0 <= r < ln 2
        const __m512 t = (__m512)(x * log2_e);
        const Vector f = (Vector)_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        return (Vector)_mm512_scalef_ps((__m512)(((0.07802452f * f + 0.22606716f) * f + 0.6958335f) * f + 0.9999252f), t);
    }
#endif
    constexpr float magic = 12582912.0f + 127;  // 1.5 * 2^23: the sum has no bits left below one, and its last are n's exponent
    x = at_least(-88.1f, x);  // whose exponent is that of 0
    const Vector shifted = x * log2_e + magic, n = shifted - magic;  // |r| <= ln 2 / 2
    Vector p;
    if constexpr (std::is_same_v<T, bf16>) {
        const Vector f = x * log2_e - n;
        p = ((0.05517166853f * f + 0.242611140f) * f + 0.69326096773f) * f + 0.9999280572f;
    } else {
        const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
        p = (((0.00137514078958f * r + 0.00836891634138f) * r + 0.0416695331092f) * r + 0.1666651846f) * r + 0.499999885951f;
        p = p * (r * r) + r + 1.0f;
    }
    return p * (Vector)((Integers)shifted << 23);
}

// 1 / x
template <class T>
inline Vector inverse(Vector x) {
#ifdef __AVX512F__
    if constexpr (std::is_same_v<T, bf16>) return (Vector)_mm512_rcp14_ps((__m512)x);
#endif
    return 1.0f / x;
}

}  // namespace
}  // namespace hyperllama
