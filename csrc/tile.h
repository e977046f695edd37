// Products by a tile of registers. Operands are held in 32-bit units along the summed dimension: an fp32 number, or a pair of bf16
// where the CPU multiplies pairs; sums are fp32.
#pragma once
#include "vector.h"

#include <vector>

namespace hyperllama {
namespace {  // every file compiles these with its own flags

constexpr int kTile = kLanes == 16 ? 8 : 6;
constexpr int64_t kPanel = 2 * kLanes;  // columns of a register tile of kTile rows

struct __attribute__((may_alias)) Pair {
    uint32_t bits;
};
template <class U>
constexpr int64_t kNumbers = 1;
template <>
constexpr int64_t kNumbers<Pair> = 2;
template <class U>
using Held = std::conditional_t<kNumbers<U> == 2, bf16, float>;

inline uint32_t bits_of(const bf16* p) { return p->bits; }
inline uint32_t bits_of(const float*) { return 0; }  // pairs are made of bf16 only

template <class T>
inline void unit(const T* first, const T*, float* out) { *out = load(first); }
template <class T>
inline void unit(const T* first, const T* second, Pair* out) { out->bits = bits_of(first) | bits_of(second) << 16; }

inline Vector multiply_add(Vector sum, float a, const float* b) { return sum + a * *(const Vector*)b; }
#ifdef __AVX512BF16__
inline Vector multiply_add(Vector sum, Pair a, const Pair* b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a.bits)), (__m512bh)_mm512_loadu_si512(b));
}
#endif

// C[R rows][V vectors] (+)= sum over `units` of A[row * ra + unit * ca] * B[unit * rb + column]. The sum starts at 0, also when it is
// added to C: short chains of rounding.
template <int R, int V, class U>
inline void tile(int64_t units, const U* a, int64_t ra, int64_t ca, const U* b, int64_t rb, float* c, int64_t rc, bool add) {
    Vector sum[R][V];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) sum[i][j] = Vector{};
    for (int64_t k = 0; k < units; k++)
        for (int i = 0; i < R; i++)
            for (int j = 0; j < V; j++) sum[i][j] = multiply_add(sum[i][j], a[i * ra + k * ca], b + k * rb + j * kLanes);
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) {
            Vector* to = (Vector*)(c + i * rc + j * kLanes);
            *to = add ? *to + sum[i][j] : sum[i][j];
        }
}

// The same for at most a tile of kTile rows and kPanel columns; A has kTile rows to read, and B, packed, kPanel columns.
template <class U>
inline void part_of_tile(int64_t units, const U* a, int64_t ra, int64_t ca, const U* b, float* c, int64_t rc, int64_t rows, int64_t cols,
                         bool add) {
    if (rows == kTile && cols == kPanel) return tile<kTile, 2>(units, a, ra, ca, b, kPanel, c, rc, add);
    float whole[kTile * kPanel];
    tile<kTile, 2>(units, a, ra, ca, b, kPanel, whole, kPanel, false);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) c[i * rc + j] = whole[i * kPanel + j] + (add ? c[i * rc + j] : 0.0f);
}

constexpr int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Scratch of one thread, kept from call to call.
inline float* scratch(int64_t floats) {
    static thread_local std::vector<float> memory;
    if (int64_t(memory.size()) < floats + 16) memory.resize(floats + 16);
    return reinterpret_cast<float*>(up_to(reinterpret_cast<uintptr_t>(memory.data()), 64));
}

}  // namespace
}  // namespace hyperllama
