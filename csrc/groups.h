// What the merges read, a group of vectors at a time: tensors of any mix of dtypes as fp32, hashed on the way.
#pragma once
#include "hash.h"
#include "vector.h"

#include <cmath>
#include <vector>
#ifdef __FMA__
#include <immintrin.h>
#endif

namespace hyperllama {
namespace {  // every file compiles these with its own flags

constexpr int64_t kBlock = 1024;       // elements; fp32 blocks of a few models stay in L1
constexpr int32_t kSign = 0x7FFFFFFF;  // all but the sign: |x| as an integer orders magnitudes, NaN last

enum Dtype { kFloat32, kBfloat16, kFloat16 };

int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

struct Source {
    const void* data;
    int dtype;
    uint64_t* hash;  // of the tensor, where it is asked for
};

inline Vector vector(const fp16* p) {
    alignas(64) float x[kLanes];
#pragma omp simd
    for (int l = 0; l < kLanes; l++) x[l] = load(p + l);
    return vector(x);
}

// x * weight + total, rounded once.
inline Vector fused(Vector x, Vector weight, Vector total) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)x, (__m512)weight, (__m512)total);
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)x, (__m256)weight, (__m256)total);
#else
    for (int l = 0; l < kLanes; l++) total[l] = std::fma(x[l], weight[l], total[l]);
    return total;
#endif
}

inline Integers magnitudes(Vector x) { return (Integers)x & kSign; }

// Several vectors: what is asked once per group (dtype, kind of trim) costs little. Its size is the same on every instruction set.
constexpr int64_t kGroup = 64;
constexpr int kParts = kGroup / kLanes;

struct Group {
    Vector part[kParts];
};

template <class T>
inline void read(const T* from, Group& group) {
#pragma GCC unroll 16
    for (int c = 0; c < kParts; c++) group.part[c] = vector(from + kLanes * c);
}

template <class T>
void read_tail(const T* from, int64_t n, Group& group) {
    alignas(64) float padded[kGroup] = {};
    for (int64_t j = 0; j < n; j++) padded[j] = load(from + j);
    read(padded, group);
}

template <class T>
inline void read(const void* data, int64_t begin, int64_t n, Group& group) {
    const T* from = static_cast<const T*>(data) + begin;
    if (n >= kGroup)
        read(from, group);
    else
        read_tail(from, n, group);
}

// Elements [begin, begin + n) as fp32, at most a group; the rest is 0, and so is all of a source without data.
inline void read(const Source& source, int64_t begin, int64_t n, Group& group) {
    if (!source.data) group = {};
    else if (source.dtype == kBfloat16) read<bf16>(source.data, begin, n, group);
    else if (source.dtype == kFloat32) read<float>(source.data, begin, n, group);
    else read<fp16>(source.data, begin, n, group);
}

// The same for a block.
void read_block(const Source& source, int64_t begin, int64_t n, float* block) {
    for (int64_t j = 0; j < kBlock; j += kGroup) {
        Group group{};
        if (j < n) read(source, begin + j, n - j, group);
        std::memcpy(block + j, &group, sizeof group);
    }
}

float element(const Source& source, int64_t j) {
    if (source.dtype == kBfloat16) return load(static_cast<const bf16*>(source.data) + j);
    if (source.dtype == kFloat16) return load(static_cast<const fp16*>(source.data) + j);
    return static_cast<const float*>(source.data)[j];
}

inline int32_t magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits & kSign;
}

struct Merge {
    Source base;  // no data: zeros
    const Source* models;
    int64_t count, n;
    int threads;

    int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
    const Source& input(int64_t i) const { return i < count ? models[i] : base; }
};

// Calls f(block, begin, n) for the blocks [first, end) of `elements`.
template <class F>
void each_block(int64_t first, int64_t end, int64_t elements, F f) {
    for (int64_t block = first; block < end; block++)
        f(block, block * kBlock, std::min(kBlock, elements - block * kBlock));
}

// One thread's way through the inputs, block by block: each group of each input once. Models take turns, which hides from the
// hardware that each of them goes on, so the same place of the next block is asked for while this one is worked on; into L2, which
// has room for more lines on their way than L1. Asked for in a loop that only hashes they would come too fast for memory.
class Reader {
public:
    Reader(const Merge& merge, bool hashed) : merge_(merge), hashed_(hashed), sums_(merge.count + 1), hashes_(merge.count + 1) {}

    ~Reader() {
        for (int64_t i = 0; i <= merge_.count; i++)
            if (uint64_t* hash = merge_.input(i).hash) __atomic_fetch_add(hash, hashes_[i], __ATOMIC_RELAXED);
    }

    // `read` of input i: a model, or the base behind them.
    [[gnu::always_inline]] void operator()(int64_t i, int64_t begin, int64_t n, Group& group) {
        const Source& source = merge_.input(i);
        if (!source.data) {
            group = {};
        } else if (source.dtype == kBfloat16) {
            pass<sizeof(bf16)>(source, i, begin, n);
            read<bf16>(source.data, begin, n, group);
        } else if (source.dtype == kFloat32) {
            pass<sizeof(float)>(source, i, begin, n);
            read<float>(source.data, begin, n, group);
        } else {
            pass<sizeof(fp16)>(source, i, begin, n);
            read<fp16>(source.data, begin, n, group);
        }
    }

    // Only hashes a block of every input.
    void hash(int64_t begin, int64_t n) {
        for (int64_t i = 0; hashed_ && i <= merge_.count; i++) {
            const Source& source = merge_.input(i);
            const int64_t size = bytes_of(source.dtype), at = begin * size;
            if (source.hash) hashes_[i] += hash_blocks(static_cast<const char*>(source.data) + at, n * size, at / kHashBlock);
        }
    }

private:
    template <int64_t size>
    [[gnu::always_inline]] void pass(const Source& source, int64_t i, int64_t begin, int64_t n) {
        const int64_t at = begin * size, line = at % kHashBlock / 64;
        const char* bytes = static_cast<const char*>(source.data) + at;
#pragma GCC unroll 4
        for (int64_t l = 0; l < size; l++) __builtin_prefetch(bytes + kBlock * size + 64 * l, 0, 2);
        if (!hashed_ || !source.hash) return;
        if (begin + kGroup >= merge_.n) {
            hashes_[i] += hash_rest(sums_[i], bytes, n * size, at);
            return;
        }
#pragma GCC unroll 4
        for (int64_t l = 0; l < size; l++) sums_[i].add(bytes + 64 * l, line + l);
        if ((at + kGroup * size) % kHashBlock == 0) {
            hashes_[i] += sums_[i].hash(at / kHashBlock);
            sums_[i] = {};
        }
    }

    const Merge& merge_;
    const bool hashed_;
    std::vector<HashSums> sums_;  // of the blocks that are under way
    std::vector<uint64_t> hashes_;
};

}  // namespace
}  // namespace hyperllama
