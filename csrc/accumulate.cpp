// A bf16 product added to an fp32 gradient in one pass; torch would convert all of it first.
#include "vector.h"

HYPERLLAMA_API void hyperllama_accumulate(float* to, const void* from, int64_t n, int threads) {
    using namespace hyperllama;
    constexpr int64_t line = 16;  // floats of a cache line, which no two threads write
    parallel((n + line - 1) / line, line, threads, [=](int64_t begin, int64_t end, int) {
        float* sums = to + begin * line;
        const bf16* x = static_cast<const bf16*>(from) + begin * line;
        each_vector(std::min(end * line, n) - begin * line,
                    [=](int64_t c, auto count) { put(sums + c, vector(sums + c, count) + vector(x + c, count), count); });
    });
}
