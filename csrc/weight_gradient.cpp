// The gradient of a linear layer's weight: see kernels/linear.py. The sum runs over the tokens, so both sides are packed from rows of
// tokens: [group of columns][unit of tokens][column].
#include "tile.h"

namespace hyperllama {

constexpr int64_t kUnits = 256;                 // of the sum at a time: with its short chains of rounding, few passes over dW
constexpr int64_t kLeft = 256 / kTile * kTile;  // columns of dy, and of x, packed at a time: both stay in L2
constexpr int64_t kRight = 512;
constexpr int64_t kAhead = 4;  // units asked for before they are packed

// (rows, cols) at `stride`, cols at most kRight, as [group of W columns][unit of rows][column]; zeros fill the last group and unit.
template <int64_t W, class T, class U>
static void pack(const T* x, int64_t stride, int64_t rows, int64_t cols, U* out) {
    static const T zeros[kRight] = {};
    const int64_t units = (rows + kNumbers<U> - 1) / kNumbers<U>;
    for (int64_t u = 0; u < units; u++) {
        const int64_t other = (u + 1) * kNumbers<U> - 1;
        const T *first = x + u * kNumbers<U> * stride, *second = other < rows ? x + other * stride : zeros;
        // the next rows are on other pages, where the CPU's own prefetching does not follow
        for (int64_t c = 0; c < cols; c += 64 / int64_t(sizeof(T))) {
            __builtin_prefetch(first + kAhead * kNumbers<U> * stride + c);
            __builtin_prefetch(first + ((kAhead + 1) * kNumbers<U> - 1) * stride + c);
        }
        U* to = out + u * W;
        int64_t c = 0;
        for (; c + W <= cols; c += W, to += units * W) {
#pragma omp simd
            for (int64_t i = 0; i < W; i++) unit(first + c + i, second + c + i, to + i);
        }
        if (c == cols) continue;
        for (int64_t i = 0; i < W; i++) unit(c + i < cols ? first + c + i : zeros, c + i < cols ? second + c + i : zeros, to + i);
    }
}

// grad (n, k) += dy^T x for dy (tokens, n) and x (tokens, k), their rows `dy_stride` and `x_stride` apart.
template <class U, class T>
static void block(float* grad, int64_t stride, const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, int64_t tokens, int64_t n,
                  int64_t k) {
    U *right = (U*)scratch((kRight + kLeft) * kUnits), *left = right + kRight * kUnits;
    for (int64_t t = 0; t < tokens; t += kUnits * kNumbers<U>) {
        const int64_t rows = std::min(kUnits * kNumbers<U>, tokens - t), units = (rows + kNumbers<U> - 1) / kNumbers<U>;
        for (int64_t c = 0; c < k; c += kRight) {
            const int64_t cols = std::min(kRight, k - c);
            pack<kPanel>(x + t * x_stride + c, x_stride, rows, cols, right);
            for (int64_t r = 0; r < n; r += kLeft) {
                const int64_t lines = std::min(kLeft, n - r);
                pack<kTile>(dy + t * dy_stride + r, dy_stride, rows, lines, left);
                for (int64_t i = 0; i < lines; i += kTile)
                    for (int64_t j = 0; j < cols; j += kPanel)
                        part_of_tile(units, left + i * units, 1, kTile, right + j * units, grad + (r + i) * stride + c + j, stride,
                                     std::min<int64_t>(kTile, lines - i), std::min(kPanel, cols - j), true);
            }
        }
    }
}

// Threads share the longer side of dW; every sum is one thread's, in the order of the tokens.
template <class U, class T>
static void weight_gradient(float* grad, const T* dy, const T* x, int64_t tokens, int64_t n, int64_t k, int threads) {
    const int64_t step = n >= k ? kTile : kPanel, side = std::max(n, k), steps = (side + step - 1) / step;
    parallel(steps, tokens * std::min(n, k) * step / 16, threads, [=](int64_t begin, int64_t end, int) {
        const int64_t first = begin * step, count = std::min(end * step, side) - first;
        if (n >= k)
            block<U>(grad + first * k, k, dy + first, n, x, k, tokens, count, k);
        else
            block<U>(grad + first, k, dy, n, x + first, k, tokens, n, count);
    });
}

}  // namespace hyperllama

HYPERLLAMA_API void hyperllama_weight_gradient(int is_bf16, float* grad, const void* dy, const void* x, int64_t tokens, int64_t n,
                                               int64_t k, int threads) {
    using namespace hyperllama;
#ifdef __AVX512BF16__
    using Unit = Pair;
#else
    using Unit = float;
#endif
    if (is_bf16)
        weight_gradient<Unit>(grad, (const bf16*)dy, (const bf16*)x, tokens, n, k, threads);
    else
        weight_gradient<float>(grad, (const float*)dy, (const float*)x, tokens, n, k, threads);
}
