// The pass between the GEMMs of linear_cross_entropy: see kernels/linear_cross_entropy.py for the formulas.
#include "vector.h"

#include <cmath>
#include <limits>

namespace hyperllama {

constexpr int64_t kColumns = 4096;  // exponentials summed in fp32 before they go into the fp64 sum: short chains of rounding

// The loops over columns stand alone, on plain arguments: inside a lambda their bounds and factors are captured by reference, and
// the compiler, which has to expect that a store changes them, makes the loop many times slower.
template <class T>
static float peak_of(const T* row, int64_t cols, float scale) {
    constexpr float least = -std::numeric_limits<float>::infinity();
    Vector most = Vector{} + least;
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) most = larger(vector(row + c) * scale, most);
    float peak = largest(most);
    for (; c < cols; c++) peak = std::max(peak, load(row + c) * scale);
    return peak;
}

template <class T>
static float sum_of_exponentials(const T* row, int64_t cols, float scale, float peak) {
    Vector total{};
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) total += exponential<float>(vector(row + c) * scale - peak);
    float left[kLanes] = {};
    if (c < cols) put(left, exponential<float>(vector(row + c, cols - c) * scale - peak));
    float sum = hyperllama::sum(total);
    for (int64_t i = 0; i < cols - c; i++) sum += left[i];
    return sum;
}

template <class T>
static void to_gradient(T* row, int64_t cols, float scale, float peak, float factor) {
    each_vector(cols, [=](int64_t c, auto n) {
        const Vector x = vector(row + c, n) * scale - peak;
        put(row + c, exponential<T>(x) * factor, n);
    });
}

// Loss of every row, and the gradient in the place of its logits; columns from `valid` on get none. Rows whose target is
// `ignored` get zeros. `wrong` is set when a target is outside the vocabulary.
template <class T>
static void softmax_gradient(T* logits, const int64_t* targets, float* losses, bool* correct, int* wrong, int64_t rows,
                             int64_t cols, int64_t valid, int64_t ignored, float scale, float z_loss, float weight, int gradient, int threads) {
    parallel(rows, 4 * cols, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++) {
            T* row = logits + r * cols;
            const int64_t target = targets[r];
            if (target == ignored || target < 0 || target >= cols) {
                if (target != ignored) {
#pragma omp atomic write
                    *wrong = 1;
                }
                losses[r] = 0;
                correct[r] = false;
                if (gradient) std::memset(static_cast<void*>(row), 0, cols * sizeof(T));
                continue;
            }
            const float peak = peak_of(row, valid, scale);
            double total = 0;
            for (int64_t first = 0; first < valid; first += kColumns)
                total += sum_of_exponentials(row + first, std::min(kColumns, valid - first), scale, peak);
            const float log_total = float(std::log(total)), lse = log_total + peak;
            const float of_target = target < valid ? load(row + target) * scale - peak : -std::numeric_limits<float>::infinity();
            correct[r] = target < valid && load(row + target) * scale >= peak;
            losses[r] = log_total - of_target + z_loss * lse * lse;
            if (!gradient) continue;
            const float factor = weight * scale * (1 + 2 * z_loss * lse) / float(total);
            to_gradient(row, valid, scale, peak, factor);
            std::memset(static_cast<void*>(row + valid), 0, (cols - valid) * sizeof(T));
            store(row + target, (target < valid ? exponential<float>(Vector{} + of_target)[0] * factor : 0.0f) - weight * scale);
        }
    });
}

}  // namespace hyperllama

HYPERLLAMA_API void hyperllama_softmax_gradient(int is_bf16, void* logits, const int64_t* targets, float* losses, bool* correct,
                                                int* wrong, int64_t rows, int64_t cols, int64_t valid, int64_t ignored, float scale,
                                                float z_loss, float weight, int gradient, int threads) {
    if (is_bf16)
        hyperllama::softmax_gradient((hyperllama::bf16*)logits, targets, losses, correct, wrong, rows, cols, valid, ignored, scale, z_loss,
                                     weight, gradient, threads);
    else
        hyperllama::softmax_gradient((float*)logits, targets, losses, correct, wrong, rows, cols, valid, ignored, scale, z_loss, weight,
                                     gradient, threads);
}
