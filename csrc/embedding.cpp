// The look-up's gradient: see kernels/embedding.py. Tokens are taken in the order of the table's rows, stably: every sum is in the
// order of the ids, threads share the rows, and the table is passed through once, upwards. Taken in the order of the ids, both the
// table's rows and dy's lie anywhere, and what counts is the latency of memory, not its bandwidth.
#include "common.h"

#include <vector>

namespace hyperllama {

constexpr int64_t kMost = int64_t(1) << 31;  // tokens at a time
constexpr int64_t kAhead = 4;                // tokens whose rows are asked for before they are needed

template <class T>
static void add(float* to, const T* from, const float* to_later, const T* from_later, int64_t cols) {
    constexpr int64_t line = 64 / sizeof(T), floats = 64 / sizeof(float);
    int64_t c = 0;
    for (; c + line <= cols; c += line) {
        // between sums, not a row at once, and into L2: both have room for more lines on their way
        __builtin_prefetch(from_later + c, 0, 2);
        for (int64_t i = c; i < c + line; i += floats) __builtin_prefetch(to_later + i, 0, 2);
#pragma omp simd
        for (int64_t i = c; i < c + line; i++) to[i] += load(from + i);
    }
    for (; c < cols; c++) to[c] += load(from + c);
}

// grad: (vocab, cols) += dy: (count, cols) at the rows `ids`, all of which exist; count is below 2^32.
template <class T>
static void embedding_backward(float* grad, const int64_t* ids, const T* dy, int64_t count, int64_t vocab, int64_t cols, int threads) {
    std::vector<uint32_t> place(vocab + 1), order(count);  // half as wide as pointers: both are in L2, where places are random
    for (int64_t i = 0; i < count; i++) place[ids[i] + 1]++;
    for (int64_t id = 0; id < vocab; id++) place[id + 1] += place[id];
    for (int64_t i = 0; i < count; i++) order[place[ids[i]]++] = uint32_t(i);
    auto row = [&](int64_t at) { return ids[order[at]]; };
    auto whole = [&](int64_t at) {  // the first place from `at` on where a row begins
        while (at > 0 && at < count && row(at) == row(at - 1)) at++;
        return at;
    };
    parallel(count, cols, threads, [&](int64_t begin, int64_t end, int) {
        end = whole(end);
        for (int64_t at = whole(begin); at < end; at++) {
            const int64_t later = std::min(at + kAhead, end - 1);
            add(grad + row(at) * cols, dy + order[at] * cols, grad + row(later) * cols, dy + order[later] * cols, cols);
        }
    });
}

// Returns false, having written nothing, when an id is outside.
template <class T>
static bool checked(float* grad, const int64_t* ids, const T* dy, int64_t count, int64_t vocab, int64_t cols, int threads) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= vocab) return false;
    for (int64_t i = 0; i < count; i += kMost)
        embedding_backward(grad, ids + i, dy + i * cols, std::min(kMost, count - i), vocab, cols, threads);
    return true;
}

}  // namespace hyperllama

HYPERLLAMA_API int hyperllama_embedding_backward(int is_bf16, float* grad, const int64_t* ids, const void* dy, int64_t count,
                                                 int64_t vocab, int64_t cols, int threads) {
    using hyperllama::bf16;
    return is_bf16 ? hyperllama::checked(grad, ids, (const bf16*)dy, count, vocab, cols, threads)
                   : hyperllama::checked(grad, ids, (const float*)dy, count, vocab, cols, threads);
}
