// grow, remap: see kernels/grow.py for the formulas. Arithmetic is fp32, unfused (see CMakeLists.txt), rounded where the formulas say.
#include "common.h"
#include "counter.h"
#include "target.h"

#include <cmath>
#include <numeric>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace hyperllama {
namespace {

constexpr int64_t kBlock = 2048;          // elements; a block and its copies stay in L1
constexpr int64_t kPastCaches = 4 << 20;  // bytes; a smaller output may well be read again from a cache

template <class T>
constexpr uint32_t kInfinity = sizeof(T) == 2 ? 0x7F80 : 0x7F800000;  // as bits

// Calls f(first, end, writer) for parts of the `rows` of an output, whose `width` elements it is to put one row after another. Parts
// begin where blocks of the hash do.
template <class T, class F>
void each_row(Target& out, int64_t rows, int64_t width, int threads, F f) {
    const int64_t bytes = width * int64_t(sizeof(T)), step = out.data || !bytes ? 1 : kHashBlock / std::gcd(bytes, kHashBlock);
    const bool past_caches = out.data && rows * bytes >= kPastCaches;
    if (past_caches) expect_writes(out.data, rows * bytes);
    parallel((rows + step - 1) / step, step * width, threads, [&](int64_t begin, int64_t end, int) {
        Writer writer(out, begin * step * bytes, sizeof(T), kInfinity<T>, past_caches);
        f(begin * step, std::min(end * step, rows), writer);
        writer.finish();
    });
}

// source (rows, cols) / divisor -> out (p rows, q cols); `scale` is half the range of the noise, which goes with the divisor q. A row of the source is read for each of its
// p copies, from a cache where it is not too far back: rows come out in order, as a file takes them.
template <class T>
void grow(const T* source, Target& out, int64_t rows, int64_t cols, int64_t p, int64_t q, double divisor, float scale, bool noise,
          uint64_t key, int threads) {
    const float whole = float(divisor), half = float(divisor / 2);
    const int64_t pairs = noise ? q / 2 : 0, wide = q * cols;
    each_row<T>(out, rows * p, wide, threads, [&](int64_t begin, int64_t end, Writer& writer) {
        std::vector<T> line(wide);
        for (int64_t row = begin; row < end; row++) {
            const T* from = source + row % rows * cols;
            T* last = line.data() + 2 * pairs * cols;
            for (int64_t first = 0; first < cols && pairs > 0; first += kBlock) {
                alignas(64) T shared[kBlock];
                const int64_t n = std::min(kBlock, cols - first);
#pragma omp simd
                for (int64_t j = 0; j < n; j++) store(shared + j, load(from + first + j) / half);
                for (int64_t pair = 0; pair < pairs; pair++) {
                    T *one = line.data() + 2 * pair * cols + first, *other = one + cols;
                    const uint64_t drawn = uint64_t(row * wide + 2 * pair * cols + first);
#pragma omp simd
                    for (int64_t j = 0; j < n; j++) {
                        const uint64_t z = random_pair(key, drawn + uint64_t(j));
                        float share = float(int32_t(uint32_t(z) >> 8)) * 0x1p-24f * scale + 0.5f;
                        bool coin = z >> 40 < 1u << 23;
                        float larger = rounded<T>(load(shared + j) * share);
                        float smaller = load(shared + j) - larger;
                        store(one + j, coin ? larger : smaller);
                        store(other + j, coin ? smaller : larger);
                    }
                }
            }
            if (2 * pairs < q)
#pragma omp simd
                for (int64_t j = 0; j < cols; j++) store(last + j, load(from + j) / whole);
            if (pairs > 0) {
                writer.put(line.data(), wide * int64_t(sizeof(T)));  // pairs leave at most one copy over
            } else {
                for (int64_t copy = 0; copy < q; copy++) writer.put(last, cols * int64_t(sizeof(T)));
            }
        }
    });
}

// out[i, j] = source[rows[i], cols[j]] * scale[j]
template <class T>
void remap(const T* source, Target& out, int64_t width, const int64_t* rows, int64_t height, const int64_t* cols, int64_t n,
           const float* scale, int threads) {
    each_row<T>(out, height, n, threads, [&](int64_t begin, int64_t end, Writer& writer) {
        std::vector<T> line(n);
        for (int64_t i = begin; i < end; i++) {
            const T* from = source + rows[i] * width;
            if (scale)
                for (int64_t j = 0; j < n; j++) store(line.data() + j, load(from + cols[j]) * scale[j]);
            else
                for (int64_t j = 0; j < n; j++) line[j] = from[cols[j]];
            writer.put(line.data(), n * int64_t(sizeof(T)));
        }
    });
}

#ifdef __AVX512F__
inline __m512d widened(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline __m512d widened(const bf16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
#endif

// max |sum of the copies in a row - what they are copies of| and the largest magnitude there, in fp64: see kernels/raw.py.
template <class T>
void unfold(const T* source, const T* grown, int64_t width, const int64_t* rows, int64_t height, const int64_t* cols, int64_t n,
            double* result, int threads) {
    std::vector<double> found(2 * size_t(threads));
    parallel(height, n, threads, [&](int64_t begin, int64_t end, int thread) {
        std::vector<double> sums(width);
        double difference = 0, largest = 0;
        for (int64_t i = begin; i < end; i++) {
            const T *from = source + rows[i] * width, *copies = grown + i * n;
            int64_t done = 0;
#ifdef __AVX512F__  // tiles without sums in memory, the row after the next one asked for; GCC 12 converts a quarter of a register at a time
            __m512d most = _mm512_setzero_pd(), biggest = most;
            for (; !cols && done + 8 <= width; done += 8) {
                if (done % 32 == 0) {
                    __builtin_prefetch(from + done + 2 * width, 0, 2);
                    for (int64_t tile = 0; tile < n; tile += width) __builtin_prefetch(copies + tile + done + 2 * n, 0, 2);
                }
                const __m512d whole = widened(from + done);
                __m512d sum = widened(copies + done);
                for (int64_t tile = width; tile < n; tile += width) sum = _mm512_add_pd(sum, widened(copies + tile + done));
                most = _mm512_max_pd(_mm512_abs_pd(_mm512_sub_pd(sum, whole)), most);
                biggest = _mm512_max_pd(_mm512_abs_pd(whole), biggest);
            }
            difference = std::max(difference, _mm512_reduce_max_pd(most));
            largest = std::max(largest, _mm512_reduce_max_pd(biggest));
#endif
            std::fill(sums.begin() + done, sums.end(), 0.0);
            if (cols)
                for (int64_t j = 0; j < n; j++) sums[cols[j]] += double(load(copies + j));
            else
                for (int64_t tile = 0; tile < n; tile += width)
#pragma omp simd
                    for (int64_t j = done; j < width; j++) sums[j] += double(load(copies + tile + j));
#pragma omp simd reduction(max : difference, largest)
            for (int64_t j = done; j < width; j++) {
                const double whole = load(from + j), gap = std::fabs(sums[j] - whole), size = std::fabs(whole);
                difference = gap > difference ? gap : difference;
                largest = size > largest ? size : largest;
            }
        }
        found[2 * thread] = difference, found[2 * thread + 1] = largest;
    });
    for (size_t i = 0; i < found.size(); i++) result[i % 2] = std::max(result[i % 2], found[i]);
}

}  // namespace
}  // namespace hyperllama

HYPERLLAMA_API void hyperllama_grow(int is_bf16, const void* source, hyperllama::Target* out, int64_t rows, int64_t cols,
                                    int64_t row_copies, int64_t col_copies, double divisor, double scale, int noise, uint64_t key,
                                    int threads) {
    using namespace hyperllama;
    if (is_bf16)
        grow((const bf16*)source, *out, rows, cols, row_copies, col_copies, divisor, float(scale), noise != 0, key, threads);
    else
        grow((const float*)source, *out, rows, cols, row_copies, col_copies, divisor, float(scale), noise != 0, key, threads);
}

HYPERLLAMA_API void hyperllama_remap(int is_bf16, const void* source, hyperllama::Target* out, int64_t width, const int64_t* rows,
                                     int64_t height, const int64_t* cols, int64_t n, const float* scale, int threads) {
    using namespace hyperllama;
    if (is_bf16)
        remap((const bf16*)source, *out, width, rows, height, cols, n, scale, threads);
    else
        remap((const float*)source, *out, width, rows, height, cols, n, scale, threads);
}

// cols: null for tiles. result (2,): zeros in; the difference and the largest magnitude out.
HYPERLLAMA_API void hyperllama_unfold(int is_bf16, const void* source, const void* grown, int64_t width, const int64_t* rows,
                                      int64_t height, const int64_t* cols, int64_t n, double* result, int threads) {
    using namespace hyperllama;
    if (is_bf16)
        unfold((const bf16*)source, (const bf16*)grown, width, rows, height, cols, n, result, threads);
    else
        unfold((const float*)source, (const float*)grown, width, rows, height, cols, n, result, threads);
}
