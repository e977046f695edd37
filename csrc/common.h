// What every kernel shares: bf16, threads, export. No torch: raw pointers in, raw pointers out.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE2__
#include <emmintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#define HYPERLLAMA_API extern "C" __attribute__((visibility("default")))

namespace hyperllama {

struct bf16 {
    uint16_t bits;
};

struct fp16 {
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

// The exponent moves from bias 15 to 127 by a product, which normalizes subnormals too; infinity and NaN take the largest exponent.
inline float load(const fp16* p) {
    uint32_t bits = uint32_t(p->bits & 0x7FFF) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
    bits |= (p->bits & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u;
    bits |= uint32_t(p->bits & 0x8000) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest even, as for bf16; adding 0.5, whose last bit is 2^-24, rounds what becomes subnormal.
inline void store(fp16* p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    std::memcpy(&value, &magnitude, 4);
    float shifted = value + 0.5f;
    uint32_t subnormal;
    std::memcpy(&subnormal, &shifted, 4);
    uint32_t normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    uint32_t half = magnitude < 0x38800000 ? subnormal - 0x3F000000 : std::min(normal, 0x7C00u);
    half = magnitude >= 0x47800000 ? 0x7C00 : half;  // from 2^16 on `normal` may have wrapped around
    half = magnitude > 0x7F800000 ? 0x7E00 : half;
    p->bits = uint16_t(sign | half);
}

// x as T holds it.
template <class T>
inline float rounded(float x) {
    T result;
    store(&result, x);
    return load(&result);
}

constexpr int64_t kGroupLine = 128;  // elements of a flat buffer that share a group of parameters: LINE in kernels/adamw.py

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

// Copies a finished block past the caches: a large output is not read again soon, and its lines need not be read before they are
// written. Threads call `streamed` when they are done.
inline void stream(void* to, const void* from, int64_t bytes) {
    char* target = static_cast<char*>(to);
    const char* source = static_cast<const char*>(from);
#ifdef __SSE2__
    int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(target) & 63);
    std::memcpy(target, source, head);
    target += head, source += head, bytes -= head;
    for (; bytes >= 16; target += 16, source += 16, bytes -= 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(target), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#endif
    std::memcpy(target, source, bytes);
}

// Asks for large pages under a large output before it is first written: with small ones, a kernel bound by memory spends most of
// its time in page faults. Advice only.
inline void expect_writes(void* to, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = uintptr_t(2) << 20, begin = (reinterpret_cast<uintptr_t>(to) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(to) + uintptr_t(bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void streamed() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

}  // namespace hyperllama
