// rms_norm: see kernels/rms_norm.py for the formulas. Rows are contiguous; arithmetic is fp32, rounded once.
#include "vector.h"

#include <cmath>
#include <vector>

namespace hyperllama {

// stream = x + residual, where there is one, and y = stream * weight / its root mean square: the inverse of that root is returned.
template <class T>
static float row_forward(const T* x, const T* residual, const T* weight, T* y, T* stream, int64_t cols, float eps) {
    const float squares = sum_over(cols, [=](int64_t c, auto n) {
        Vector value = vector(x + c, n);
        if (residual) {  // the norm reads what the stream keeps: the rounded sum
            value = rounded(value + vector(residual + c, n), x);
            put(stream + c, value, n);
        }
        return value * value;
    });
    const T* in = residual ? stream : x;
    const float scale = 1.0f / std::sqrt(squares / float(cols) + eps);
    each_vector(cols, [=](int64_t c, auto n) { put(y + c, vector(in + c, n) * scale * vector(weight + c, n), n); });
    return scale;
}

template <class T>
static void forward(const T* x, const T* residual, const T* weight, T* y, T* stream, float* rstd, int64_t rows, int64_t cols,
                    float eps, int threads) {
    parallel(rows, cols, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++) {
            const int64_t at = r * cols;
            rstd[r] = row_forward(x + at, residual ? residual + at : nullptr, weight, y + at, residual ? stream + at : nullptr, cols, eps);
        }
    });
}

constexpr int64_t kBlock = 16;  // rows summed in fp32 before they go into the fp64 sums: short chains of rounding

// dx of a row, plus the stream's own gradient where there is one; the row's part of dweight is added to `sums`.
template <class T>
static void row_backward(const T* dy, const T* dstream, const T* stream, const T* weight, float scale, T* dx, float* sums, int64_t cols) {
    const float dot = sum_over(cols, [=](int64_t c, auto n) {
        const Vector d = vector(dy + c, n), normed = vector(stream + c, n) * scale;
        put(sums + c, vector(sums + c, n) + d * normed, n);
        return d * vector(weight + c, n) * normed;
    }) / float(cols);
    each_vector(cols, [=](int64_t c, auto n) {
        Vector d = (vector(dy + c, n) * vector(weight + c, n) - vector(stream + c, n) * scale * dot) * scale;
        if (dstream) d += vector(dstream + c, n);
        put(dx + c, d, n);
    });
}

// partial: (threads, cols) fp64 zeros; dweight: their sum in thread order, so the bits depend only on shape and threads.
template <class T>
static void backward(const T* dy, const T* dstream, const T* stream, const T* weight, const float* rstd, T* dx, double* partial,
                     float* dweight, int64_t rows, int64_t cols, int threads) {
    parallel(rows, 2 * cols, threads, [&](int64_t begin, int64_t end, int thread) {
        std::vector<float> block(cols);
        float* sums = block.data();
        double* total = partial + thread * cols;
        for (int64_t r = begin; r < end; r++) {
            const int64_t at = r * cols;
            row_backward(dy + at, dstream ? dstream + at : nullptr, stream + at, weight, rstd[r], dx + at, sums, cols);
            if ((r - begin) % kBlock == kBlock - 1 || r == end - 1) {
                for (int64_t c = 0; c < cols; c++) total[c] += sums[c];
                std::fill(block.begin(), block.end(), 0.0f);
            }
        }
    });
    for (int64_t c = 0; c < cols; c++) {
        double sum = 0;
        for (int t = 0; t < threads; t++) sum += partial[t * cols + c];
        dweight[c] = float(sum);
    }
}

}  // namespace hyperllama

using hyperllama::bf16;

HYPERLLAMA_API void hyperllama_rms_norm_forward(int is_bf16, const void* x, const void* residual, const void* weight, void* y,
                                                void* stream, float* rstd, int64_t rows, int64_t cols, float eps, int threads) {
    if (is_bf16)
        hyperllama::forward((const bf16*)x, (const bf16*)residual, (const bf16*)weight, (bf16*)y, (bf16*)stream, rstd, rows, cols,
                            eps, threads);
    else
        hyperllama::forward((const float*)x, (const float*)residual, (const float*)weight, (float*)y, (float*)stream, rstd, rows,
                            cols, eps, threads);
}

HYPERLLAMA_API void hyperllama_rms_norm_backward(int is_bf16, const void* dy, const void* dstream, const void* stream,
                                                 const void* weight, const float* rstd, void* dx, double* partial, float* dweight,
                                                 int64_t rows, int64_t cols, int threads) {
    if (is_bf16)
        hyperllama::backward((const bf16*)dy, (const bf16*)dstream, (const bf16*)stream, (const bf16*)weight, rstd, (bf16*)dx,
                             partial, dweight, rows, cols, threads);
    else
        hyperllama::backward((const float*)dy, (const float*)dstream, (const float*)stream, (const float*)weight, rstd, (float*)dx,
                             partial, dweight, rows, cols, threads);
}
