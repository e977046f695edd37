// Products of a linear layer in fp32, forward and to its input's gradient: see kernels/linear.py. Each thread has rows of its own and
// packs the weight as [panel of columns][place in the sum][column]; a row is read as it lies.
#include "tile.h"

namespace hyperllama {
namespace {

constexpr int64_t kDepth = 128;                 // of the sum at a time: a panel of it stays in L1, and chains of rounding are short
constexpr int64_t kPacked = 128 << 10;          // numbers of the weight packed at a time, half of an L2, in whole panels
constexpr int64_t kRows = 240 / kTile * kTile;  // that meet all that is packed: their results stay in L2 until they are whole

// Columns [0, cols) of B (depth, cols), zeros up to whole panels. B[k][c] is w[c * stride + k] where `transposed`, else w[k * stride + c].
void pack(const float* w, int64_t stride, int64_t depth, int64_t cols, bool transposed, float* out) {
    for (int64_t c = 0; c < cols; c += kPanel, out += depth * kPanel) {
        const int64_t n = std::min(kPanel, cols - c);
        if (n < kPanel) std::fill(out, out + depth * kPanel, 0.0f);
        if (!transposed) {
            for (int64_t k = 0; k < depth; k++) std::memcpy(out + k * kPanel, w + k * stride + c, n * sizeof(float));
            continue;
        }
        for (int64_t k = 0; k < depth; k += kLanes)  // blocks: the lines that are read and written stay in L1
            for (int64_t i = 0; i < n; i++) {
                const float* from = w + (c + i) * stride;
                for (int64_t l = k; l < std::min(k + kLanes, depth); l++) out[l * kPanel + i] = from[l];
            }
    }
}

// y (+)= x B of at most a tile: x (rows, depth) at `stride`.
void part(const float* x, int64_t stride, const float* b, int64_t depth, float* y, int64_t y_stride, int64_t rows, int64_t cols, bool add) {
    if (rows == kTile) return part_of_tile(depth, x, stride, 1, b, y, y_stride, rows, cols, add);
    float lines[kTile * kDepth] = {};  // there is nothing to read below the last row
    for (int64_t i = 0; i < rows; i++) std::memcpy(lines + i * depth, x + i * stride, depth * sizeof(float));
    part_of_tile(depth, lines, depth, 1, b, y, y_stride, rows, cols, add);
}

void product(float* y, const float* x, const float* w, int64_t rows, int64_t n, int64_t k, bool transposed) {
    const int64_t width = std::max(kPanel, std::min(up_to(n, kPanel), kPacked / k / kPanel * kPanel));
    const int64_t depths = (k + kDepth - 1) / kDepth;
    float* right = scratch(width * k);
    for (int64_t c = 0; c < n; c += width) {
        const int64_t cols = std::min(width, n - c), stride = up_to(cols, kPanel);
        for (int64_t d = 0; d < depths; d++) {
            const int64_t from = k * d / depths, depth = k * (d + 1) / depths - from;
            pack(transposed ? w + c * k + from : w + from * n + c, transposed ? k : n, depth, cols, transposed, right + from * stride);
        }
        for (int64_t r = 0; r < rows; r += kRows)
            for (int64_t d = 0; d < depths; d++) {
                const int64_t from = k * d / depths, depth = k * (d + 1) / depths - from;
                for (int64_t j = 0; j < cols; j += kPanel)
                    for (int64_t i = r; i < std::min(r + kRows, rows); i += kTile)
                        part(x + i * k + from, k, right + from * stride + j * depth, depth, y + i * n + c + j, n,
                             std::min<int64_t>(kTile, rows - i), std::min(kPanel, cols - j), d > 0);
            }
    }
}

}  // namespace
}  // namespace hyperllama

// y (rows, n) = x (rows, k) B, B (k, n) the transpose of w (n, k) or w (k, n) itself.
HYPERLLAMA_API void hyperllama_product(float* y, const float* x, const float* w, int64_t rows, int64_t n, int64_t k, int transposed,
                                       int threads) {
    using namespace hyperllama;
    const int64_t steps = (rows + kTile - 1) / kTile;
    parallel(steps, n * k * kTile / 16, threads, [=](int64_t begin, int64_t end, int) {
        const int64_t first = begin * kTile, last = std::min(end * kTile, rows);
        product(y + first * n, x + first * k, w, last - first, n, k, transposed);
    });
}
