// rms_norm: see kernels/rms_norm.py for the formulas. Rows are contiguous; arithmetic is fp32, rounded once.
#include "common.h"

#include <cmath>
#include <vector>

namespace hyperllama {

template <class T>
static void forward(const T* x, const T* residual, const T* weight, T* y, T* stream, float* rstd, int64_t rows, int64_t cols,
                    float eps, int threads) {
    parallel(rows, cols, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++) {
            const T* in = x + r * cols;
            float sum = 0;
            if (residual) {
                const T* add = residual + r * cols;
                T* out = stream + r * cols;
#pragma omp simd reduction(+ : sum)
                for (int64_t c = 0; c < cols; c++) {
                    store(out + c, load(in + c) + load(add + c));
                    float value = load(out + c);  // the norm reads what the residual stream keeps: the rounded sum
                    sum += value * value;
                }
                in = out;
            } else {
#pragma omp simd reduction(+ : sum)
                for (int64_t c = 0; c < cols; c++) {
                    float value = load(in + c);
                    sum += value * value;
                }
            }
            float scale = 1.0f / std::sqrt(sum / float(cols) + eps);
            rstd[r] = scale;
            T* out = y + r * cols;
#pragma omp simd
            for (int64_t c = 0; c < cols; c++) store(out + c, load(in + c) * scale * load(weight + c));
        }
    });
}

constexpr int64_t kBlock = 16;  // rows summed in fp32 before they go into the fp64 sums: short chains of rounding

// partial: (threads, cols) fp64 zeros; dweight: their sum in thread order, so the bits depend only on shape and threads.
template <class T>
static void backward(const T* dy, const T* dstream, const T* stream, const T* weight, const float* rstd, T* dx, double* partial,
                     float* dweight, int64_t rows, int64_t cols, int threads) {
    parallel(rows, 2 * cols, threads, [&](int64_t begin, int64_t end, int thread) {
        std::vector<float> block(cols);
        float* sums = block.data();
        double* total = partial + thread * cols;
        for (int64_t r = begin; r < end; r++) {
            const T *in = stream + r * cols, *grad = dy + r * cols;
            T* out = dx + r * cols;
            float scale = rstd[r], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = 0; c < cols; c++) {
                float g = load(grad + c), normed = load(in + c) * scale;
                dot += g * load(weight + c) * normed;
                sums[c] += g * normed;
            }
            dot /= float(cols);
            if (dstream) {
                const T* add = dstream + r * cols;
#pragma omp simd
                for (int64_t c = 0; c < cols; c++)
                    store(out + c, (load(grad + c) * load(weight + c) - load(in + c) * scale * dot) * scale + load(add + c));
            } else {
#pragma omp simd
                for (int64_t c = 0; c < cols; c++)
                    store(out + c, (load(grad + c) * load(weight + c) - load(in + c) * scale * dot) * scale);
            }
            if ((r - begin) % kBlock == kBlock - 1 || r == end - 1) {
#pragma omp simd
                for (int64_t c = 0; c < cols; c++) {
                    total[c] += sums[c];
                    sums[c] = 0;
                }
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
