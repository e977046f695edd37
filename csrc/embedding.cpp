// The look-up's gradient: see kernels/embedding.py. Threads share the rows of the table, so every sum is in the order of the ids.
#include "common.h"

#include <vector>

namespace hyperllama {

constexpr int64_t kLine = 16;  // floats of a cache line
constexpr size_t kAhead = 8;   // rows asked for before they are needed: ids are random, the CPU can't foresee them,
constexpr size_t kNext = 2;    // nor which rows of dy are this thread's

template <class T>
static void add(float* to, const T* from, const float* later, const T* next, int64_t cols) {
    // into L2, which waits for more lines at once than L1 does: 1.4 times as fast as a prefetch for writing, or into L1
    for (int64_t c = 0; c < cols; c += kLine) __builtin_prefetch(later + c, 0, 2);
    for (int64_t c = 0; c < cols; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(next + c, 0, 2);
#pragma omp simd
    for (int64_t c = 0; c < cols; c++) to[c] += load(from + c);
}

// grad: (vocab, cols) += dy: (count, cols) at the rows `ids`. Returns false, having written nothing, when an id is outside.
template <class T>
static bool embedding_backward(float* grad, const int64_t* ids, const T* dy, int64_t count, int64_t vocab, int64_t cols, int threads) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= vocab) return false;
    parallel(threads, count * cols / threads, threads, [&](int64_t begin, int64_t end, int) {
        std::vector<int64_t> mine;
        mine.reserve(count / threads * 5 / 4);
        for (int64_t i = 0; i < count; i++) {
            const int64_t whose = ids[i] % threads;
            if (whose >= begin && whose < end) mine.push_back(i);
        }
        const size_t last = mine.size() - 1;
        for (size_t i = 0; i < mine.size(); i++) {
            const float* later = grad + ids[mine[std::min(i + kAhead, last)]] * cols;
            add(grad + ids[mine[i]] * cols, dy + mine[i] * cols, later, dy + mine[std::min(i + kNext, last)] * cols, cols);
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
