// The norm of the whole gradient: see kernels/grad_norm.py.
#include "common.h"

#include <cmath>
#include <vector>

static double sum_of_squares(const float* x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += double(x[i]) * double(x[i]);
    return sum;
}

// Squares are summed in fp64, in blocks that are then added in order: the bits do not depend on the threads.
HYPERLLAMA_API double hyperllama_grad_norm(const float* grad, int64_t n, const uint8_t* groups, const double* weights,
                                           int threads) {
    using hyperllama::kGroupLine;
    constexpr int64_t block = 1 << 16;
    std::vector<double> sums((n + block - 1) / block);
    hyperllama::parallel(int64_t(sums.size()), block, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; b++) {
            const int64_t stop = std::min(n, (b + 1) * block);
            if (!groups) sums[b] = sum_of_squares(grad + b * block, stop - b * block);
            for (int64_t i = b * block; groups && i < stop; i += kGroupLine)
                sums[b] += weights[groups[i / kGroupLine]] * sum_of_squares(grad + i, std::min(kGroupLine, stop - i));
        }
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return std::sqrt(total);
}
