// The norm of the whole gradient: see kernels/grad_norm.py.
#include "common.h"

#include <cmath>
#include <vector>

// Squares are summed in fp64, in blocks that are then added in order: the bits do not depend on the threads.
HYPERLLAMA_API double hyperllama_grad_norm(const float* grad, int64_t n, int threads) {
    constexpr int64_t block = 1 << 16;
    std::vector<double> sums((n + block - 1) / block);
    hyperllama::parallel(int64_t(sums.size()), block, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; b++) {
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = b * block; i < std::min(n, (b + 1) * block); i++) sum += double(grad[i]) * double(grad[i]);
            sums[b] = sum;
        }
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return std::sqrt(total);
}
