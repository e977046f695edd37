// grow, remap: see kernels/grow.py for the formulas. Arithmetic is fp32, unfused (see CMakeLists.txt), rounded where the formulas say.
#include "common.h"
#include "counter.h"

namespace hyperllama {
namespace {

constexpr int64_t kBlock = 2048;          // elements; a block and its copies stay in L1
constexpr int64_t kPastCaches = 4 << 20;  // bytes; a smaller output may well be read again from a cache

template <class T>
void put(T* to, const T* from, int64_t n, bool past_caches) {
    if (past_caches)
        stream(to, from, n * int64_t(sizeof(T)));
    else
        std::memcpy(static_cast<void*>(to), from, n * sizeof(T));
}

// source (rows, cols) -> out (p rows, q cols); `scale` is half the range of the noise.
template <class T>
void grow(const T* source, T* out, int64_t rows, int64_t cols, int64_t p, int64_t q, float scale, bool noise, uint64_t key,
          int threads) {
    const float whole = float(q), half = float(double(q) / 2);
    const int64_t pairs = noise ? q / 2 : 0, wide = q * cols;
    const bool past_caches = rows * p * wide * int64_t(sizeof(T)) >= kPastCaches;
    if (past_caches) expect_writes(out, rows * p * wide * int64_t(sizeof(T)));
    parallel(rows, p * wide, threads, [&](int64_t begin, int64_t end, int) {
        alignas(64) T quotient[kBlock], shared[kBlock], one[kBlock], other[kBlock];
        for (int64_t r = begin; r < end; r++)
            for (int64_t first = 0; first < cols; first += kBlock) {
                const int64_t n = std::min(kBlock, cols - first);
                const T* from = source + r * cols + first;
#pragma omp simd
                for (int64_t j = 0; j < n; j++) store(quotient + j, load(from + j) / whole);
#pragma omp simd
                for (int64_t j = 0; j < n; j++) store(shared + j, load(from + j) / half);
                for (int64_t i = 0; i < p; i++) {
                    const int64_t row = i * rows + r;
                    T* to = out + row * wide + first;
                    for (int64_t pair = 0; pair < pairs; pair++) {
                        const uint64_t counter = uint64_t(2 * (row * wide + 2 * pair * cols + first));
#pragma omp simd
                        for (int64_t j = 0; j < n; j++) {
                            float share = float(int32_t(random_bits(key, counter + 2 * j))) * 0x1p-24f * scale + 0.5f;
                            bool coin = random_bits(key, counter + 2 * j + 1) < 1u << 23;
                            float larger = rounded<T>(load(shared + j) * share);
                            float smaller = load(shared + j) - larger;
                            store(one + j, coin ? larger : smaller);
                            store(other + j, coin ? smaller : larger);
                        }
                        put(to + 2 * pair * cols, one, n, past_caches);
                        put(to + (2 * pair + 1) * cols, other, n, past_caches);
                    }
                    for (int64_t copy = 2 * pairs; copy < q; copy++) put(to + copy * cols, quotient, n, past_caches);
                }
            }
        if (past_caches) streamed();
    });
}

// out[i, j] = source[rows[i], cols[j]] * scale[j]
template <class T>
void remap(const T* source, T* out, int64_t width, const int64_t* rows, int64_t height, const int64_t* cols, int64_t n,
           const float* scale, int threads) {
    if (height * n * int64_t(sizeof(T)) >= kPastCaches) expect_writes(out, height * n * int64_t(sizeof(T)));
    parallel(height, n, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i++) {
            const T* from = source + rows[i] * width;
            T* to = out + i * n;
            if (scale)
                for (int64_t j = 0; j < n; j++) store(to + j, load(from + cols[j]) * scale[j]);
            else
                for (int64_t j = 0; j < n; j++) to[j] = from[cols[j]];
        }
    });
}

}  // namespace
}  // namespace hyperllama

HYPERLLAMA_API void hyperllama_grow(int is_bf16, const void* source, void* out, int64_t rows, int64_t cols, int64_t row_copies,
                                    int64_t col_copies, double scale, int noise, uint64_t key,
                                    int threads) {
    using namespace hyperllama;
    if (is_bf16)
        grow((const bf16*)source, (bf16*)out, rows, cols, row_copies, col_copies, float(scale), noise != 0, key, threads);
    else
        grow((const float*)source, (float*)out, rows, cols, row_copies, col_copies, float(scale), noise != 0, key, threads);
}

HYPERLLAMA_API void hyperllama_remap(int is_bf16, const void* source, void* out, int64_t width, const int64_t* rows, int64_t height,
                                     const int64_t* cols, int64_t n, const float* scale, int threads) {
    using namespace hyperllama;
    if (is_bf16)
        remap((const bf16*)source, (bf16*)out, width, rows, height, cols, n, scale, threads);
    else
        remap((const float*)source, (float*)out, width, rows, height, cols, n, scale, threads);
}
