// merge: see kernels/merge.py for the formulas. Tensors of any mix of dtypes are read as fp32, a group of vectors at a time. Sums
// have a fixed order and nothing is fused (see CMakeLists.txt) but the sum of linear, on every instruction set: the bits depend on
// the inputs alone, not on threads or instruction set. Bound by memory and, next, by stores to L1: what one model adds stays in
// registers where it can.
#include "target.h"
#include "tops.h"

namespace hyperllama {
namespace {

constexpr int64_t kChunk = 64 * kBlock;      // elements of one fp64 partial sum
constexpr int64_t kPastCaches = 4 << 20;     // bytes; a smaller output may well be read again from a cache
constexpr int64_t kMostDrawn = 16 << 20;     // bytes of one model's mask that are kept for a second pass

template <class T>
void narrow(const float* block, int64_t n, Writer& writer) {
    alignas(64) T rounded[kBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; j++) store(rounded + j, block[j]);
    writer.put(rounded, n * int64_t(sizeof(T)));
}

void write(const float* block, int64_t n, int dtype, Writer& writer) {
    if (dtype == kBfloat16) narrow<bf16>(block, n, writer);
    if (dtype == kFloat16) narrow<fp16>(block, n, writer);
    if (dtype == kFloat32) writer.put(block, n * int64_t(sizeof(float)));
}

// ---- Sums in fixed order ----

typedef double Doubles __attribute__((vector_size(4 * kLanes)));

inline Doubles widened(const float* x) {  // half a register
#ifdef __AVX512F__
    return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(x));  // GCC 12 converts a quarter at a time
#else
    typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));
    HalfFloats half;
    std::memcpy(&half, x, sizeof half);
    return __builtin_convertvector(half, Doubles);
#endif
}

// The sum of `n` numbers, whole groups, in fp64: 64 chains and then 8, so the order is the same for vectors of any width.
double wide_sum(const float* x, int64_t n) {
    constexpr int kHalf = kLanes / 2, kChains = kGroup / kHalf;
    Doubles chains[kChains]{};
    for (int64_t j = 0; j < n; j += kGroup)
#pragma GCC unroll 32
        for (int c = 0; c < kChains; c++) chains[c] += widened(x + j + kHalf * c);
    alignas(64) double part[kGroup];
    std::memcpy(part, chains, sizeof part);
    for (int64_t j = 8; j < kGroup; j += 8)
#pragma omp simd
        for (int64_t l = 0; l < 8; l++) part[l] += part[j + l];
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// `sums` (width,) = fp64 sums over chunks of what f(reader, begin, n, memory, sums) adds for every block, chunk by chunk in order;
// `memory` has room for a block of each model.
template <class F>
std::vector<double> sums_over_chunks(const Merge& merge, int64_t width, int64_t cost, bool hash_inputs, F f) {
    const int64_t chunks = (merge.n + kChunk - 1) / kChunk, per_chunk = kChunk / kBlock;
    std::vector<double> partial(chunks * width), total(width);
    parallel(chunks, kChunk * cost, merge.threads, [&](int64_t first, int64_t end, int) {
        std::vector<float> memory(merge.count * kBlock);
        Reader reader(merge, hash_inputs);
        for (int64_t chunk = first; chunk < end; chunk++)
            each_block(chunk * per_chunk, std::min((chunk + 1) * per_chunk, merge.blocks()), merge.n,
                       [&](int64_t, int64_t begin, int64_t n) {
                           f(reader, begin, n, memory.data(), partial.data() + chunk * width);
                       });
    });
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t j = 0; j < width; j++) total[j] += partial[chunk * width + j];
    return total;
}

// |d|_1 / |trimmed d|_1 for every model. What is drawn on the way is kept where the trim has room.
std::vector<double> ratios(const Merge& merge, const Trim* trims, bool hash_inputs) {
    const auto add = [&](Reader& reader, int64_t begin, int64_t n, float* base, double* sums) {
        alignas(64) float before[kBlock], after[kBlock];
        for (int64_t j = 0; j < n; j += kGroup) {
            Group x;
            reader(merge.count, begin + j, n - j, x);
            std::memcpy(base + j, &x, sizeof x);
        }
        for (int64_t i = 0; i < merge.count; i++) {
            const Trim& trim = trims[i];
            for (int64_t j = 0; j < n; j += kGroup) {
                Group d;
                reader(i, begin + j, n - j, d);
                const int64_t group = (begin + j) / kGroup;
                if (group < trim.groups) trim.drawn[group] = draw(trim, begin + j);
#pragma GCC unroll 16
                for (int c = 0; c < kParts; c++) {
                    d.part[c] -= vector(base + j + kLanes * c);
                    const Integers size = magnitudes(d.part[c]);
                    std::memcpy(before + j + kLanes * c, &size, sizeof size);
                }
                trim_group(trim, begin + j, d);
#pragma GCC unroll 16
                for (int c = 0; c < kParts; c++) {
                    const Integers size = magnitudes(d.part[c]);
                    std::memcpy(after + j + kLanes * c, &size, sizeof size);
                }
            }
            const int64_t whole = (n + kGroup - 1) / kGroup * kGroup;
            sums[2 * i] += wide_sum(before, whole);
            sums[2 * i + 1] += wide_sum(after, whole);
        }
    };
    const std::vector<double> sums = sums_over_chunks(merge, 2 * merge.count, merge.count, hash_inputs, add);
    std::vector<double> result(merge.count);
    for (int64_t i = 0; i < merge.count; i++) {
        const double before = sums[2 * i], after = sums[2 * i + 1];
        result[i] = before < 1e-7 || after < 1e-7 ? 1 : before / after;
    }
    return result;
}

// ---- The merged tensor ----

struct Combination {
    const float* weights;
    float lam, divisor;
    bool elect, normalize;  // with elect: divide by the weights that agree; else by `divisor`
    Target& out;
    int dtype;
};

// total: the sum of the products -> the mean of those that have its sign; NaN stays, which is also what infinities give that do
// not agree.
inline void elect(const std::vector<Group>& products, const Combination& how, Group& total) {
    const Vector zero{}, one = zero + 1;
    Vector vote[kParts], agreed[kParts]{}, divisor[kParts]{};
#pragma GCC unroll 16
    for (int c = 0; c < kParts; c++) vote[c] = select(total.part[c] >= 0, one, -one);
    for (size_t i = 0; i < products.size(); i++) {
        const Vector weight = zero + how.weights[i];
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) {
            const Integers agrees = products[i].part[c] * vote[c] > 0;
            agreed[c] += select(agrees, products[i].part[c], zero);
            divisor[c] += select(agrees, weight, zero);
        }
    }
#pragma GCC unroll 16
    for (int c = 0; c < kParts; c++) {
        const Integers small = (divisor[c] < 1e-8f) & (divisor[c] > -1e-8f);
        if (how.normalize) agreed[c] /= select(small, one, divisor[c]);
        total.part[c] = select(total.part[c] == total.part[c], agreed[c], total.part[c]);
    }
}

void combine(const Merge& merge, const Trim* trims, const Combination& how, bool hash_inputs) {
    const int64_t size = bytes_of(how.dtype);
    const bool past_caches = how.out.data && merge.n * size >= kPastCaches, linear = !merge.base.data;
    const uint32_t infinity = how.dtype == kFloat32 ? 0x7F800000 : how.dtype == kBfloat16 ? 0x7F80 : 0x7C00;
    if (past_caches) expect_writes(how.out.data, merge.n * size);
    parallel(merge.blocks(), kBlock * merge.count, merge.threads, [&](int64_t first, int64_t end, int) {
        std::vector<Group> products(how.elect ? merge.count : 0);
        alignas(64) float merged[kBlock];
        Writer writer(how.out, first * kBlock * size, size, infinity, past_caches);
        Reader reader(merge, hash_inputs);
        each_block(first, end, merge.n, [&](int64_t, int64_t begin, int64_t n) {
            for (int64_t j = 0; j < n; j += kGroup) {
                Group base, total{};
                reader(merge.count, begin + j, n - j, base);
                for (int64_t i = 0; i < merge.count; i++) {
                    Group product;
                    reader(i, begin + j, n - j, product);
                    if (linear) {
                        const Vector weight = Vector{} + trims[i].scale;
#pragma GCC unroll 16
                        for (int c = 0; c < kParts; c++) total.part[c] = fused(product.part[c], weight, total.part[c]);
                        continue;
                    }
#pragma GCC unroll 16
                    for (int c = 0; c < kParts; c++) product.part[c] -= base.part[c];
                    trim_group(trims[i], begin + j, product);
#pragma GCC unroll 16
                    for (int c = 0; c < kParts; c++) total.part[c] += product.part[c];
                    if (how.elect) products[i] = product;
                }
                if (how.elect) elect(products, how, total);
#pragma GCC unroll 16
                for (int c = 0; c < kParts; c++) {
                    Vector value = total.part[c];
                    if (!how.elect && how.divisor != 1) value /= how.divisor;
                    if (merge.base.data) value = value * how.lam + base.part[c];
                    std::memcpy(merged + j + kLanes * c, &value, sizeof value);
                }
            }
            write(merged, n, how.dtype, writer);
        });
        writer.finish();
    });
}

// sums (count, count), lower part, += products of the blocks d (count, kBlock) of fp32: 64 chains of 16 in fp32, then fp64.
template <int count>
void add_products(const float* d, double* sums) {
    constexpr int kPairs = count * (count + 1) / 2;
    alignas(64) float chains[kPairs][kGroup];
    for (int64_t c = 0; c < kGroup; c += kLanes) {
        Vector chain[kPairs]{};
        for (int64_t j = c; j < kBlock; j += kGroup) {
            Vector x[count];
#pragma GCC unroll 8
            for (int i = 0, pair = 0; i < count; i++) {
                x[i] = vector(d + i * kBlock + j);
#pragma GCC unroll 8
                for (int o = 0; o <= i; o++, pair++) chain[pair] += x[i] * x[o];
            }
        }
        for (int pair = 0; pair < kPairs; pair++) std::memcpy(chains[pair] + c, &chain[pair], sizeof(Vector));
    }
    for (int i = 0, pair = 0; i < count; i++)
        for (int o = 0; o <= i; o++, pair++) sums[i * count + o] += wide_sum(chains[pair], kGroup);
}

// The same for any number of models, pair by pair.
void add_products(int64_t count, const float* d, double* sums) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t o = 0; o <= i; o++) {
            Group chains{};
            for (int64_t j = 0; j < kBlock; j += kGroup)
#pragma GCC unroll 16
                for (int c = 0; c < kParts; c++)
                    chains.part[c] += vector(d + i * kBlock + j + kLanes * c) * vector(d + o * kBlock + j + kLanes * c);
            sums[i * count + o] += wide_sum(reinterpret_cast<const float*>(&chains), kGroup);
        }
}

std::vector<Source> sources(const void* const* data, const int* dtypes, uint64_t* hashes, int64_t count) {
    std::vector<Source> result(count);
    for (int64_t i = 0; i < count; i++) result[i] = {data[i], dtypes[i], hashes && data[i] ? hashes + i : nullptr};
    return result;
}

}  // namespace
}  // namespace hyperllama

// tensors, dtypes: `count` models and then the base; a null base is zeros. trim: 0 none, 1 largest, 2 random by keys; rescale: 0
// none, 1 by density, 2 by norm. hashes, unless null: (count + 1,) zeros, to which each tensor's is added in the first pass.
HYPERLLAMA_API void hyperllama_merge(const void* const* tensors, const int* dtypes, uint64_t* hashes, int64_t count, int64_t n,
                                     const double* weights, const double* densities, const uint64_t* keys, int trim, int rescale,
                                     int elect, int normalize, double divisor, double lam, hyperllama::Target* out, int out_dtype,
                                     int threads) {
    using namespace hyperllama;
    const std::vector<Source> all = sources(tensors, dtypes, hashes, count + 1);
    const Merge merge{all[count], all.data(), count, n, threads};
    std::vector<Trim> trims(count);
    bool first_pass = true;
    if (trim == kTop) {
        std::vector<int64_t> kept(count);
        for (int64_t i = 0; i < count; i++) kept[i] = int64_t(densities[i] * double(n));
        if (Tops(merge, kept.data(), trims.data()).counted()) first_pass = false;
    }
    for (int64_t i = 0; trim == kRandom && i < count; i++) {
        trims[i].kept = kRandom;
        trims[i].key = keys[i];
        trims[i].limit = int32_t(std::ceil(std::ldexp(float(densities[i]), 24)));
    }
    std::vector<std::unique_ptr<uint64_t[]>> drawn(rescale == 2 && trim == kRandom ? count : 0);
    for (size_t i = 0; i < drawn.size(); i++) {
        trims[i].groups = std::min((n + kGroup - 1) / kGroup, kMostDrawn / int64_t(sizeof(uint64_t)));
        drawn[i].reset(new uint64_t[trims[i].groups]);
        trims[i].drawn = drawn[i].get();
    }
    std::vector<double> scales(count, 1.0);
    if (rescale == 2) {
        scales = ratios(merge, trims.data(), first_pass);
        first_pass = false;
    }
    for (int64_t i = 0; rescale == 1 && i < count; i++) scales[i] = densities[i] > 0 ? 1 / densities[i] : 1;
    std::vector<float> rounded(weights, weights + count);
    for (int64_t i = 0; i < count; i++) trims[i].scale = float(scales[i] * weights[i]);
    const Combination how{rounded.data(), float(lam), float(divisor), elect != 0, normalize != 0, *out, out_dtype};
    combine(merge, trims.data(), how, first_pass);
}

// gram (count, count) = <x_i - b, x_j - b>: products and chains of 16 sums in fp32, then fp64.
HYPERLLAMA_API void hyperllama_merge_gram(const void* const* tensors, const int* dtypes, uint64_t* hashes, int64_t count, int64_t n,
                                          double* gram, int threads) {
    using namespace hyperllama;
    const std::vector<Source> all = sources(tensors, dtypes, hashes, count + 1);
    const Merge merge{all[count], all.data(), count, n, threads};
    const auto add = [&](Reader& reader, int64_t begin, int64_t n, float* d, double* sums) {
        for (int64_t j = 0; j < kBlock; j += kGroup) {
            Group base{}, x{};
            if (j < n) reader(count, begin + j, n - j, base);
            for (int64_t i = 0; i < count; i++) {
                if (j < n) reader(i, begin + j, n - j, x);
                for (int c = 0; c < kParts; c++) x.part[c] -= base.part[c];
                std::memcpy(d + i * kBlock + j, &x, sizeof x);
            }
        }
        switch (count) {
            case 2: return add_products<2>(d, sums);
            case 3: return add_products<3>(d, sums);
            case 4: return add_products<4>(d, sums);
            case 5: return add_products<5>(d, sums);
            case 6: return add_products<6>(d, sums);
            default: return add_products(count, d, sums);
        }
    };
    const std::vector<double> sums = sums_over_chunks(merge, count * count, count * count, true, add);
    for (int64_t i = 0; i < count; i++)
        for (int64_t o = 0; o <= i; o++) gram[i * count + o] = gram[o * count + i] = sums[i * count + o];
}
