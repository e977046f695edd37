// rope: see kernels/rope.py for the formulas. One row of qkv per token; arithmetic is fp32, rounded once.
#include "vector.h"

namespace hyperllama {

// qkv, out: (batch * seq_len, width); cos, sin: (length, half). Heads from `rotated` on are copied. `wrong` is set when a position
// is outside the tables.
template <class T>
static void rope(const T* qkv, T* out, const float* cos, const float* sin, const int64_t* positions, int64_t length,
                 int64_t tokens, int64_t seq_len, int64_t width, int64_t half, int64_t rotated, float sign, int* wrong, int threads) {
    parallel(tokens, width, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; t++) {
            const int64_t place = positions ? positions[t] : t % seq_len;
            if (place < 0 || place >= length) {
#pragma omp atomic write
                *wrong = 1;
                continue;
            }
            const float *c = cos + place * half, *s = sin + place * half;
            for (int64_t head = 0; head < rotated; head++) {
                const T *a = qkv + t * width + 2 * head * half, *b = a + half;
                T *x = out + t * width + 2 * head * half, *y = x + half;
                each_vector(half, [=](int64_t j, auto n) {
                    ask_ahead(a + j);
                    ask_ahead(x + j);
                    const Vector first = vector(a + j, n), second = vector(b + j, n), cosine = vector(c + j, n), sine = sign * vector(s + j, n);
                    put(x + j, first * cosine - second * sine, n);
                    put(y + j, second * cosine + first * sine, n);
                });
            }
            const int64_t done = 2 * rotated * half;
            if (out != qkv) std::memcpy(static_cast<void*>(out + t * width + done), qkv + t * width + done, (width - done) * sizeof(T));
        }
    });
}

}  // namespace hyperllama

HYPERLLAMA_API void hyperllama_rope(int is_bf16, const void* qkv, void* out, const float* cos, const float* sin,
                                    const int64_t* positions, int64_t length, int64_t tokens, int64_t seq_len, int64_t width,
                                    int64_t half, int64_t rotated, int inverse, int* wrong, int threads) {
    using hyperllama::bf16;
    const float sign = inverse ? -1.0f : 1.0f;
    if (is_bf16)
        hyperllama::rope((const bf16*)qkv, (bf16*)out, cos, sin, positions, length, tokens, seq_len, width, half, rotated, sign,
                         wrong, threads);
    else
        hyperllama::rope((const float*)qkv, (float*)out, cos, sin, positions, length, tokens, seq_len, width, half, rotated, sign,
                         wrong, threads);
}
