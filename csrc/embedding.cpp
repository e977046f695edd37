// The look-up's gradient: see kernels/embedding.py. Threads share the columns, so every sum is in the order of the ids.
#include "common.h"

namespace hyperllama {

// grad: (vocab, cols) += dy: (count, cols) at the rows `ids`. Returns false, having written nothing, when an id is outside.
template <class T>
static bool embedding_backward(float* grad, const int64_t* ids, const T* dy, int64_t count, int64_t vocab, int64_t cols, int threads) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= vocab) return false;
    constexpr int64_t line = 16;  // floats of a cache line, which no two threads write
    parallel((cols + line - 1) / line, line * count, threads, [&](int64_t begin, int64_t end, int) {
        const int64_t first = begin * line, last = std::min(end * line, cols);
        for (int64_t i = 0; i < count; i++) {
            float* to = grad + ids[i] * cols;
            const T* from = dy + i * cols;
#pragma omp simd
            for (int64_t c = first; c < last; c++) to[c] += load(from + c);
        }
    });
    return true;
}

}  // namespace hyperllama

HYPERLLAMA_API int hyperllama_embedding_backward(int is_bf16, float* grad, const int64_t* ids, const void* dy, int64_t count,
                                                 int64_t vocab, int64_t cols, int threads) {
    using hyperllama::bf16;
    return is_bf16 ? hyperllama::embedding_backward(grad, ids, (const bf16*)dy, count, vocab, cols, threads)
                   : hyperllama::embedding_backward(grad, ids, (const float*)dy, count, vocab, cols, threads);
}
