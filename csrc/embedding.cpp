// The look-up's gradient: see kernels/embedding.py. Threads share the columns, so every sum is in the order of the ids.
#include "common.h"

namespace hyperllama {

constexpr int64_t kLine = 16;   // floats of a cache line, which no two threads write
constexpr int64_t kAhead = 4;   // rows asked for before they are needed: ids are random, so the CPU can't foresee them

template <class T>
static void add(float* to, const T* from, const float* next, int64_t cols) {
    for (int64_t c = 0; c < cols; c += kLine) __builtin_prefetch(next + c, 1);
#pragma omp simd
    for (int64_t c = 0; c < cols; c++) to[c] += load(from + c);
}

// grad: (vocab, cols) += dy: (count, cols) at the rows `ids`. Returns false, having written nothing, when an id is outside.
template <class T>
static bool embedding_backward(float* grad, const int64_t* ids, const T* dy, int64_t count, int64_t vocab, int64_t cols, int threads) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= vocab) return false;
    parallel((cols + kLine - 1) / kLine, kLine * count, threads, [&](int64_t begin, int64_t end, int) {
        const int64_t first = begin * kLine, width = std::min(end * kLine, cols) - first;
        for (int64_t i = 0; i < count; i++) {
            const float* next = grad + ids[std::min(i + kAhead, count - 1)] * cols + first;
            add(grad + ids[i] * cols + first, dy + i * cols + first, next, width);
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
