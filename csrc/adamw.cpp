// adamw: see kernels/adamw.py for the formulas. One pass over five flat buffers; lr, step and clip are read where they lie.
#include "common.h"

#include <cmath>

HYPERLLAMA_API void hyperllama_adamw(float* master, const float* grad, float* m, float* v, void* weights, int64_t n,
                                     const float* lr, double beta1, double beta2, double eps, double weight_decay,
                                     const int64_t* step, const float* clip, const uint8_t* groups, const float* scales,
                                     int threads) {
    using hyperllama::bf16;
    if (*clip == 0) return;
    const float scale = *clip, rate = *lr;
    const float b1 = float(beta1), b2 = float(beta2), a1 = float(1 - beta1), a2 = float(1 - beta2);
    const double correct1 = 1 / (1 - std::pow(beta1, double(*step)));
    const float correct2 = float(1 / (1 - std::pow(beta2, double(*step))));
    bf16* rounded = static_cast<bf16*>(weights);
    // elements of one group: `share` of the update, `floor` and `decay` already times the group's scales
    auto part = [&](int64_t begin, int64_t end, float share, float floor, float decay) {
        auto update = [&](int64_t i) {
            float g = grad[i] * scale;
            float first = m[i] = b1 * m[i] + a1 * g;
            float second = v[i] = b2 * v[i] + a2 * (g * g);
            float change = first * share / (std::sqrt(second * correct2) + floor);
            return master[i] -= rate * (change + decay * master[i]);
        };
        if (rounded) {
#pragma omp simd
            for (int64_t i = begin; i < end; i++) hyperllama::store(rounded + i, update(i));
        } else {
#pragma omp simd
            for (int64_t i = begin; i < end; i++) update(i);
        }
    };
    constexpr int64_t line = hyperllama::kGroupLine;
    if (!groups) {
        hyperllama::parallel(n, 4, threads, [&](int64_t begin, int64_t end, int) {
            part(begin, end, float(correct1), float(eps), float(weight_decay));
        });
        return;
    }
    hyperllama::parallel((n + line - 1) / line, 4 * line, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t first = begin, last; first < end; first = last) {
            for (last = first + 1; last < end && groups[last] == groups[first];) last++;
            const float* of = scales + 3 * groups[first];
            part(first * line, std::min(n, last * line), float(correct1 * of[0]), float(eps * of[1]),
                 float(weight_decay * of[2]));
        }
    });
}
