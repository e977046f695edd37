// What every kernel shares: bf16, threads, export. No torch: raw pointers in, raw pointers out.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#define HYPERLLAMA_API extern "C" __attribute__((visibility("default")))

namespace hyperllama {

struct bf16 {
    uint16_t bits;
};

inline float load(const float* p) { return *p; }

inline float load(const bf16* p) {
    uint32_t bits = uint32_t(p->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float* p, float value) { *p = value; }

// Round to nearest even; a NaN keeps its sign and becomes quiet instead of rounding to infinity.
inline void store(bf16* p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    p->bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
}

// e^x to about one ulp, in operations that every instruction set has as vectors; NaN stays NaN, overflow is infinity, underflow 0.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial fitted for least relative error (4e-9); 2^n in two halves.
inline float exp_(float x) {
    x = std::min(std::max(x, -104.0f), 89.5f);
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the sum has no bits left below one
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 0.00137514078958f;
    p = p * r + 0.00836891634138f;
    p = p * r + 0.0416695331092f;
    p = p * r + 0.1666651846f;
    p = p * r + 0.499999885951f;
    p = p * (r * r) + r + 1.0f;
    int32_t whole = int32_t(n), half = whole >> 1;
    int32_t bits_a = (half + 127) << 23, bits_b = (whole - half + 127) << 23;
    float a, b;
    std::memcpy(&a, &bits_a, 4);
    std::memcpy(&b, &bits_b, 4);
    return p * a * b;
}

// Waking a thread costs about as much as this many elements of work.
constexpr int64_t kElementsPerThread = 16384;

// Calls f(begin, end, thread) on contiguous parts of [0, n), `cost` elements each; parts depend only on n and `threads`.
template <class F>
void parallel(int64_t n, int64_t cost, int threads, F f) {
    threads = int(std::max<int64_t>(1, std::min<int64_t>({threads, n, n * cost / kElementsPerThread})));
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            // the runtime may give fewer threads than asked for: every part is still done
            for (int64_t t = omp_get_thread_num(); t < threads; t += omp_get_num_threads())
                f(n * t / threads, n * (t + 1) / threads, int(t));
        }
        return;
    }
#endif
    for (int t = 0; t < threads; t++) f(n * t / threads, n * (t + 1) / threads, t);
}

}  // namespace hyperllama
