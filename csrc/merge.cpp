// merge: see kernels/merge.py for the formulas. Tensors of any mix of dtypes are read as fp32, a group of vectors at a time. Sums
// have a fixed order and nothing is fused (see CMakeLists.txt) but the sum of linear, on every instruction set: the bits depend on
// the inputs alone, not on threads or instruction set. Bound by memory and, next, by stores to L1: what one model adds stays in
// registers where it can.
#include "common.h"
#include "counter.h"
#include "target.h"

#include <cmath>
#include <memory>
#include <vector>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace hyperllama {
namespace {

constexpr int64_t kBlock = 1024;           // elements; fp32 blocks of a few models stay in L1
constexpr int64_t kChunk = 64 * kBlock;    // elements of one fp64 partial sum
constexpr int64_t kPastCaches = 4 << 20;   // bytes; a smaller output may well be read again from a cache
constexpr int32_t kSign = 0x7FFFFFFF;      // all but the sign: |x| as an integer orders magnitudes, NaN last
constexpr int32_t kNone = kSign - 1;       // a magnitude that none but some NaNs reach, and they stay visible anyway

enum Dtype { kFloat32, kBfloat16, kFloat16 };

struct Source {
    const void* data;
    int dtype;
    uint64_t* hash;  // of the tensor, where it is asked for
};

// Vectors of one register: compilers take wider ones apart element by element.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Floats vector(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline Floats vector(const bf16* p) {
    Halves x;
    std::memcpy(&x, p, sizeof x);
#ifdef __AVX512F__
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);  // GCC 12 widens in four steps
#else
    return (Floats)(__builtin_convertvector(x, Bits) << 16);
#endif
}

inline Floats vector(const fp16* p) {
    alignas(64) float x[kLanes];
#pragma omp simd
    for (int l = 0; l < kLanes; l++) x[l] = load(p + l);
    return vector(x);
}

inline Floats choose(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

// x * weight + total, rounded once.
inline Floats fused(Floats x, Floats weight, Floats total) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)weight, (__m512)total);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)weight, (__m256)total);
#else
    for (int l = 0; l < kLanes; l++) total[l] = std::fma(x[l], weight[l], total[l]);
    return total;
#endif
}

inline Ints magnitudes(Floats x) { return (Ints)x & kSign; }

// Several vectors: what is asked once per group (dtype, kind of trim) costs little. Its size is the same on every instruction set.
constexpr int64_t kGroup = 64;
constexpr int kParts = kGroup / kLanes;

struct Group {
    Floats part[kParts];
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

int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Calls f(block, begin, n) for the blocks [first, end) of `elements`.
template <class F>
void each_block(int64_t first, int64_t end, int64_t elements, F f) {
    for (int64_t block = first; block < end; block++)
        f(block, block * kBlock, std::min(kBlock, elements - block * kBlock));
}

struct Merge {
    Source base;  // no data: zeros
    const Source* models;
    int64_t count, n;
    int threads;

    int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
};

// Hashes the blocks of all inputs that one thread reads, just before they are used: they are read from memory once.
class Hashes {
public:
    Hashes(const Merge& merge, bool wanted) : merge_(merge) {
        for (int64_t i = 0; wanted && i <= merge.count; i++)
            if (of(i).hash) sums_.push_back({i, 0});
    }

    ~Hashes() {
        for (const Sum& sum : sums_) __atomic_fetch_add(of(sum.input).hash, sum.hash, __ATOMIC_RELAXED);
    }

    void add(int64_t begin, int64_t n) {
        for (Sum& sum : sums_) {
            const Source& source = of(sum.input);
            const int64_t size = bytes_of(source.dtype), at = begin * size;
            sum.hash += hash_blocks(static_cast<const char*>(source.data) + at, n * size, at / kHashBlock);
        }
    }

private:
    struct Sum {
        int64_t input;
        uint64_t hash;
    };

    const Source& of(int64_t i) const { return i < merge_.count ? merge_.models[i] : merge_.base; }

    const Merge& merge_;
    std::vector<Sum> sums_;
};

// ---- Which elements of a difference are kept ----

enum Kept { kAll, kTop, kRandom };

struct Trim {
    Kept kept = kAll;
    int32_t limit = 0;  // top: keep magnitudes above, and equal ones up to the flat index `last`; random: keep bits below
    int64_t last = 0;
    uint64_t key = 0;
    float scale = 1;
};

// x = (x - base) * (scale where kept, else 0) for the group at `begin`. A product: NaN and infinity stay visible.
inline void trim_group(const Trim& trim, const Group& base, int64_t begin, Group& x) {
    const Floats scale = Floats{} + trim.scale, zero{};
#pragma GCC unroll 16
    for (int c = 0; c < kParts; c++) x.part[c] -= base.part[c];
    if (trim.kept == kTop && (trim.last < begin || trim.last >= begin + kGroup)) {
        const int32_t least = trim.limit + (trim.last < begin);
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) x.part[c] *= choose(magnitudes(x.part[c]) >= least, scale, zero);
    } else if (trim.kept == kTop) {
        alignas(64) float kept[kGroup];
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) std::memcpy(kept + kLanes * c, &x.part[c], sizeof(Floats));
        for (int64_t j = 0; j < kGroup; j++)
            kept[j] = magnitude(kept[j]) >= trim.limit + (begin + j > trim.last) ? trim.scale : 0.0f;
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) x.part[c] *= vector(kept + kLanes * c);
    } else if (trim.kept == kRandom) {
        alignas(64) float kept[kGroup];
        alignas(64) uint64_t pairs[kGroup / 2];
        alignas(64) uint32_t halves[kGroup];
        const uint64_t key = trim.key, first = uint64_t(begin) / 2;  // groups begin at even elements
        const int32_t limit = trim.limit;
        const float factor = trim.scale;
#pragma omp simd
        for (int64_t j = 0; j < kGroup / 2; j++) pairs[j] = random_pair(key, first + uint64_t(j));
        std::memcpy(halves, pairs, sizeof halves);  // little-endian, as tensors in files are
#pragma omp simd
        for (int64_t j = 0; j < kGroup; j++) kept[j] = int32_t(halves[j] >> 8) < limit ? factor : 0.0f;
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) x.part[c] *= vector(kept + kLanes * c);
    } else {
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) x.part[c] *= scale;
    }
}

// ---- The k-th largest magnitude ----

constexpr int64_t kBins = 4096;

// The k-th largest of keys in [low, high], by histograms of ever narrower ranges: histogram(low, shift, counts) is count_keys for
// all keys. `k` becomes the key's place among its equals, `equal` their number.
template <class F>
int32_t kth_largest(int64_t& k, int64_t& equal, int32_t low, int32_t high, F histogram) {
    std::vector<int64_t> counts(kBins + 1);
    for (;;) {
        int shift = 0;
        while ((int64_t(high) - low) >> shift >= kBins) shift++;
        std::fill(counts.begin(), counts.end(), 0);
        histogram(low, shift, counts.data());
        int64_t bin = (int64_t(high) - low) >> shift;  // keys above `high` may be in later ones
        while (k > counts[bin]) k -= counts[bin--];
        low += int32_t(bin << shift);
        high = int32_t(std::min<int64_t>(high, int64_t(low) + (int64_t(1) << shift) - 1));
        if (shift == 0) {
            equal = counts[bin];
            return low;
        }
    }
}

// Counts keys by (key - low) >> shift; those below `low` or beyond the bins, which is most in all but the first histogram, go to
// one more bin.
void count_keys(const int32_t* keys, int64_t n, int32_t low, int shift, int64_t* counts) {
    for (int64_t j = 0; j < n; j++)
        counts[std::min((uint32_t(keys[j]) - uint32_t(low)) >> shift, uint32_t(kBins))]++;
}

struct Bracket {
    int32_t low, high;
    bool ends;  // whether keys equal to low and to high are counted apart; else they count as below and above
};

struct Counts {  // of the keys above, at and inside a bracket
    int32_t above, high, inside, low;
};

inline int32_t sum(Ints x) {
    int32_t total = 0;
    for (int l = 0; l < kLanes; l++) total += x[l];
    return total;
}

// Counts the keys |x - base| of at most a block and appends those inside the bracket, in order, to `end`, which it moves; it
// writes up to 16 places beyond. Without an `end` it only counts.
template <bool ends, class T>
Counts tally(const T* x, const float* base, int64_t n, Bracket bracket, int32_t*& end) {
    Ints above{}, from_high{}, above_low{}, from_low{};
    alignas(64) int32_t keys[kBlock];
    int64_t j = 0, done = 0;
    for (; j + kLanes <= n; j += kLanes) {
        __builtin_prefetch(x + j + kBlock);  // models take turns, which hides their next blocks from the hardware
        const Ints key = magnitudes(vector(x + j) - vector(base + j));
#ifdef __AVX512F__
        const __m512i k = (__m512i)key, low = _mm512_set1_epi32(bracket.low), high = _mm512_set1_epi32(bracket.high);
        const __mmask16 from = _mm512_cmpge_epi32_mask(k, high), to = _mm512_cmpgt_epi32_mask(k, low), inside = to & ~from;
        const auto count = [one = _mm512_set1_epi32(1)](Ints& counts, __mmask16 which) {
            counts = (Ints)_mm512_mask_add_epi32((__m512i)counts, which, (__m512i)counts, one);
        };
        count(from_high, from);
        count(above_low, to);
        if (ends) {
            count(above, _mm512_cmpgt_epi32_mask(k, high));
            count(from_low, _mm512_cmpge_epi32_mask(k, low));
        }
        if (end) {  // few are inside, and short stores seldom cross a cache line; compressing into memory is slow on Zen 4
            const __m512i kept = _mm512_maskz_compress_epi32(inside, k);
            const int number = __builtin_popcount(inside);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(end), _mm512_castsi512_si128(kept));
            if (__builtin_expect(number > 4, 0)) _mm512_storeu_si512(end, kept);
            end += number;
        }
        done = j + kLanes;
#else
        from_high -= key >= bracket.high;
        above_low -= key > bracket.low;
        if (ends) {
            above -= key > bracket.high;
            from_low -= key >= bracket.low;
        }
        std::memcpy(keys + j, &key, sizeof key);
#endif
    }
    Counts counts{sum(above), sum(from_high), sum(above_low), sum(from_low)};
    for (; j < n; j++) {
        const int32_t key = keys[j] = magnitude(load(x + j) - base[j]);
        counts.above += key > bracket.high;
        counts.high += key >= bracket.high;
        counts.inside += key > bracket.low;
        counts.low += key >= bracket.low;
    }
    const int32_t inside = counts.inside - counts.high;
    if (ends)
        counts = {counts.above, counts.high - counts.above, inside, counts.low - counts.inside};
    else
        counts = {counts.high, 0, inside, 0};
    if (end && counts.inside)
        for (j = done; j < n; j++) {
            *end = keys[j];
            end += keys[j] > bracket.low && keys[j] < bracket.high;
        }
    return counts;
}

template <class T>
Counts tally(const void* x, int64_t begin, const float* base, int64_t n, Bracket bracket, int32_t*& end) {
    const T* from = static_cast<const T*>(x) + begin;
    return bracket.ends ? tally<true>(from, base, n, bracket, end) : tally<false>(from, base, n, bracket, end);
}

Counts tally(const Source& x, int64_t begin, const float* base, int64_t n, Bracket bracket, int32_t*& end) {
    if (x.dtype == kBfloat16) return tally<bf16>(x.data, begin, base, n, bracket, end);
    if (x.dtype == kFloat16) return tally<fp16>(x.data, begin, base, n, bracket, end);
    return tally<float>(x.data, begin, base, n, bracket, end);
}

// Finds every model's trim by one pass over the tensors: a sample gives a bracket that nearly always holds the k-th magnitude; the
// pass counts what is above and at its ends and collects what is inside. Whole groups of equals are at an end, not inside, where
// they are large enough to matter. When the sample misled, histograms over the tensor find the same.
class Tops {
    static constexpr int64_t kMostInside = 4 << 20;  // keys of one model and thread: the memory of any merge is bounded

public:
    Tops(const Merge& merge, const int64_t* kept, Trim* trims) : merge_(merge), kept_(kept), trims_(trims) {
        for (int64_t i = 0; i < merge.count; i++) {
            trims[i].kept = kTop;
            trims[i].limit = kept[i] > 0 ? 0 : kNone;
            trims[i].last = kept[i] > 0 ? merge.n : -1;
            if (kept[i] > 0 && kept[i] < merge.n) active_.push_back(i);
        }
        if (!counted()) return;
        brackets_.resize(merge.count);
        sample();
        count();
        parallel(int64_t(active_.size()), kElementsPerThread, merge.threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t a = begin; a < end; a++) find(active_[a]);
        });
    }

    // Whether a pass over the tensors was needed.
    bool counted() const { return !active_.empty(); }

private:
    struct Part {  // of the blocks, done by one thread
        int64_t begin = 0, end = 0, capacity = 0;
        std::unique_ptr<int32_t[]> inside;   // (models, capacity)
        std::vector<int64_t> used;           // (models,)
        std::vector<char> full;              // (models,)
    };

    void sample() {
        // a larger sample costs more, a smaller one leaves more inside the bracket: measured, the best is about n^(2/3) / 3
        const int64_t n = merge_.n, size = std::min<int64_t>(n, 256 + int64_t(std::pow(double(n), 2.0 / 3) / 3));
        std::vector<int32_t> keys(merge_.count * size);
        parallel(size, merge_.count * 16, merge_.threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t s = begin; s < end; s++) {
                const int64_t from = n / size * s + n % size * s / size, width = n / size;
                const int64_t j = from + int64_t(random_bits(0, uint64_t(s))) % width;  // one of each stratum, off any period
                const float base = element(merge_.base, j);
                for (int64_t i : active_) keys[i * size + s] = magnitude(element(merge_.models[i], j) - base);
            }
        });
        parallel(int64_t(active_.size()), size, merge_.threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t a = begin; a < end; a++) {
                const int64_t i = active_[a];
                int32_t *first = keys.data() + i * size, *last = first + size;
                const double share = double(kept_[i]) / double(n), rank = share * double(size);
                const double margin = 3.5 * std::sqrt(rank * (1 - share)) + 2;  // a miss in 2000 tensors, which costs time only
                const int64_t upper = int64_t(rank - margin), lower = int64_t(rank + margin);
                Bracket bracket{-1, kSign, true};
                if (lower < size) {
                    std::nth_element(first, first + lower, last, std::greater<int32_t>());
                    bracket.low = first[lower];
                    last = first + lower;
                }
                if (rank - margin >= 0 && upper < last - first) {
                    std::nth_element(first, first + upper, last, std::greater<int32_t>());
                    bracket.high = first[upper];
                }
                // where few are equal, the ends are taken inside, which saves half of the comparisons
                const int64_t from = std::max<int64_t>(upper, 0), to = std::min(lower, size);
                int64_t within = 0;
                for (int64_t s = 0; s < size; s++) within += keys[i * size + s] >= bracket.low && keys[i * size + s] <= bracket.high;
                bracket.ends = 4 * within > 5 * (to - from) || bracket.low < 0 || bracket.high == kSign;
                if (!bracket.ends) bracket.low--, bracket.high++;
                if (bracket.low == bracket.high) bracket.low--;
                brackets_[i] = bracket;
            }
        });
    }

    void count() {
        counts_.resize(merge_.count * merge_.blocks());
        parts_.resize(merge_.threads);
        parallel(merge_.blocks(), kBlock * merge_.count, merge_.threads, [&](int64_t first, int64_t end, int thread) {
            Part& part = parts_[thread];
            part.begin = first, part.end = end;
            part.capacity = std::min((end - first) * kBlock / 8, kMostInside) + 2 * kBlock;
            part.inside.reset(new int32_t[merge_.count * part.capacity]);
            if (part.capacity >= 4 << 20)  // a small part of it is used: a large page must be worth clearing
                expect_writes(part.inside.get(), merge_.count * part.capacity * int64_t(sizeof(int32_t)));
            part.used.assign(merge_.count, 0);
            part.full.assign(merge_.count, 0);
            alignas(64) float base[kBlock];
            Hashes hashes(merge_, true);
            each_block(first, end, merge_.n, [&](int64_t block, int64_t begin, int64_t n) {
                hashes.add(begin, n);
                read_block(merge_.base, begin, n, base);
                for (int64_t i : active_) {
                    part.full[i] = part.full[i] || part.used[i] + n + 16 > part.capacity;
                    int32_t* const start = part.full[i] ? nullptr : part.inside.get() + i * part.capacity + part.used[i];
                    int32_t* end = start;
                    counts_[i * merge_.blocks() + block] = tally(merge_.models[i], begin, base, n, brackets_[i], end);
                    part.used[i] += end - start;
                }
            });
        });
    }

    void find(int64_t i) {
        int64_t above = 0, high = 0, inside = 0, low = 0, k = kept_[i], equal = 0;
        for (int64_t block = 0; block < merge_.blocks(); block++) {
            const Counts& c = counts_[i * merge_.blocks() + block];
            above += c.above, high += c.high, inside += c.inside, low += c.low;
        }
        bool full = false, counted = true;
        for (const Part& part : parts_) full = full || (part.begin < part.end && part.full[i]);
        const Bracket bracket = brackets_[i];
        int32_t limit;
        if (k > above && k <= above + high) {
            limit = bracket.high, equal = high, k -= above;
        } else if (k > above && k <= above + high + inside && !full) {
            k -= above + high;
            limit = kth_largest(k, equal, bracket.low, bracket.high, [&](int32_t from, int shift, int64_t* counts) {
                for (const Part& part : parts_)
                    if (part.begin < part.end)
                        count_keys(part.inside.get() + i * part.capacity, part.used[i], from, shift, counts);
            });
        } else if (k > above + high + inside && k <= above + high + inside + low) {
            limit = bracket.low, equal = low, k -= above + high + inside;
        } else {
            counted = false;
            limit = kth_largest(k, equal, 0, kSign, [&](int32_t from, int shift, int64_t* counts) {
                each_key_block(i, [&](int64_t, const int32_t* key, int64_t n) {
                    count_keys(key, n, from, shift, counts);
                    return false;
                });
            });
        }
        trims_[i].limit = std::min(limit, kNone);
        if (k < equal) trims_[i].last = counted ? place_counted(i, limit, k) : place(i, 0, limit, k);
    }

    // f(begin, keys, n) for every block from `first` on, until it returns true.
    template <class F>
    void each_key_block(int64_t i, F f, int64_t first = 0) const {
        alignas(64) float base[kBlock], x[kBlock];
        alignas(64) int32_t key[kBlock];
        for (int64_t begin = first * kBlock; begin < merge_.n; begin += kBlock) {
            const int64_t n = std::min(kBlock, merge_.n - begin);
            read_block(merge_.base, begin, n, base);
            read_block(merge_.models[i], begin, n, x);
#pragma omp simd
            for (int64_t j = 0; j < n; j++) key[j] = magnitude(x[j] - base[j]);
            if (f(begin, key, n)) return;
        }
    }

    // The flat index of the k-th key equal to `limit` from block `first` on.
    int64_t place(int64_t i, int64_t first, int32_t limit, int64_t k) const {
        int64_t found = -1;
        each_key_block(i, [&](int64_t begin, const int32_t* key, int64_t n) {
            for (int64_t j = 0; j < n; j++)
                if (key[j] == limit && --k == 0) {
                    found = begin + j;
                    return true;
                }
            return false;
        }, first);
        return found;
    }

    // The same from the counts and the collected keys, which say in which block it is.
    int64_t place_counted(int64_t i, int32_t limit, int64_t k) const {
        for (const Part& part : parts_) {
            const int32_t* inside = part.inside.get() + i * part.capacity;
            for (int64_t block = part.begin; block < part.end; block++) {
                const Counts& c = counts_[i * merge_.blocks() + block];
                const bool high = brackets_[i].ends && limit == brackets_[i].high, low = brackets_[i].ends && limit == brackets_[i].low;
                const int64_t equal = high ? c.high : low ? c.low : std::count(inside, inside + c.inside, limit);
                if (k <= equal) return place(i, block, limit, k);
                k -= equal;
                if (!high && !low) inside += c.inside;
            }
        }
        return -1;
    }

    const Merge& merge_;
    const int64_t* kept_;
    Trim* trims_;
    std::vector<int64_t> active_;
    std::vector<Bracket> brackets_;  // (models,)
    std::vector<Counts> counts_;     // (models, blocks)
    std::vector<Part> parts_;
};

// ---- Sums in fixed order ----

// A group of fp64 sums, added to element by element: the order is the same for vectors of any width.
struct WideGroup {
    double part[kGroup] = {};

    void add(const Group& group) {
        alignas(64) float x[kGroup];
        std::memcpy(x, &group, sizeof x);
#pragma omp simd
        for (int64_t j = 0; j < kGroup; j++) part[j] += double(x[j]);
    }

    double sum() const {
        double total = 0;
        for (double x : part) total += x;
        return total;
    }
};

// The sum of a group in fp64, likewise.
double sum(const Group& group) {
    alignas(64) float x[kGroup];
    std::memcpy(x, &group, sizeof x);
    double part[8] = {}, total = 0;
    for (int64_t j = 0; j < kGroup; j += 8)
#pragma omp simd
        for (int64_t l = 0; l < 8; l++) part[l] += double(x[j + l]);
    for (double each : part) total += each;
    return total;
}

// `sums` (width,) = fp64 sums over chunks of what f(begin, n, sums, thread) adds for every block, chunk by chunk in order.
template <class F>
std::vector<double> sums_over_chunks(const Merge& merge, int64_t width, int64_t cost, bool hash_inputs, F f) {
    const int64_t chunks = (merge.n + kChunk - 1) / kChunk, per_chunk = kChunk / kBlock;
    std::vector<double> partial(chunks * width), total(width);
    parallel(chunks, kChunk * cost, merge.threads, [&](int64_t first, int64_t end, int) {
        std::vector<float> memory(merge.count * kBlock);
        Hashes hashes(merge, hash_inputs);
        for (int64_t chunk = first; chunk < end; chunk++)
            each_block(chunk * per_chunk, std::min((chunk + 1) * per_chunk, merge.blocks()), merge.n,
                       [&](int64_t, int64_t begin, int64_t n) {
                           hashes.add(begin, n);
                           f(begin, n, memory.data(), partial.data() + chunk * width);
                       });
    });
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t j = 0; j < width; j++) total[j] += partial[chunk * width + j];
    return total;
}

// |d|_1 / |trimmed d|_1 for every model.
std::vector<double> ratios(const Merge& merge, const Trim* trims, bool hash_inputs) {
    const auto add = [&](int64_t begin, int64_t n, float*, double* sums) {
        for (int64_t i = 0; i < merge.count; i++) {
            WideGroup before, after;
            for (int64_t j = 0; j < n; j += kGroup) {
                Group base, x, size;
                read(merge.base, begin + j, n - j, base);
                read(merge.models[i], begin + j, n - j, x);
#pragma GCC unroll 16
                for (int c = 0; c < kParts; c++) size.part[c] = (Floats)magnitudes(x.part[c] - base.part[c]);
                before.add(size);
                trim_group(trims[i], base, begin + j, x);
#pragma GCC unroll 16
                for (int c = 0; c < kParts; c++) size.part[c] = (Floats)magnitudes(x.part[c]);
                after.add(size);
            }
            sums[2 * i] += before.sum();
            sums[2 * i + 1] += after.sum();
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
    const Floats zero{}, one = zero + 1;
    Floats vote[kParts], agreed[kParts]{}, divisor[kParts]{};
#pragma GCC unroll 16
    for (int c = 0; c < kParts; c++) vote[c] = choose(total.part[c] >= 0, one, -one);
    for (size_t i = 0; i < products.size(); i++) {
        const Floats weight = zero + how.weights[i];
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) {
            const Ints agrees = products[i].part[c] * vote[c] > 0;
            agreed[c] += choose(agrees, products[i].part[c], zero);
            divisor[c] += choose(agrees, weight, zero);
        }
    }
#pragma GCC unroll 16
    for (int c = 0; c < kParts; c++) {
        const Ints small = (divisor[c] < 1e-8f) & (divisor[c] > -1e-8f);
        if (how.normalize) agreed[c] /= choose(small, one, divisor[c]);
        total.part[c] = choose(total.part[c] == total.part[c], agreed[c], total.part[c]);
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
        Hashes hashes(merge, hash_inputs);
        each_block(first, end, merge.n, [&](int64_t, int64_t begin, int64_t n) {
            hashes.add(begin, n);
            for (int64_t j = 0; j < n; j += kGroup) {
                Group base, total{};
                read(merge.base, begin + j, n - j, base);
                for (int64_t i = 0; i < merge.count; i++) {
                    Group product;
                    read(merge.models[i], begin + j, n - j, product);
                    if (linear) {
                        const Floats weight = Floats{} + trims[i].scale;
#pragma GCC unroll 16
                        for (int c = 0; c < kParts; c++) total.part[c] = fused(product.part[c], weight, total.part[c]);
                        continue;
                    }
                    trim_group(trims[i], base, begin + j, product);
#pragma GCC unroll 16
                    for (int c = 0; c < kParts; c++) total.part[c] += product.part[c];
                    if (how.elect) products[i] = product;
                }
                if (how.elect) elect(products, how, total);
#pragma GCC unroll 16
                for (int c = 0; c < kParts; c++) {
                    Floats value = total.part[c];
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
    const auto add = [&](int64_t begin, int64_t n, float* d, double* sums) {
        for (int64_t j = 0; j < kBlock; j += kGroup) {
            Group base{}, x{};
            if (j < n) read(merge.base, begin + j, n - j, base);
            for (int64_t i = 0; i < count; i++) {
                if (j < n) read(merge.models[i], begin + j, n - j, x);
                for (int c = 0; c < kParts; c++) x.part[c] -= base.part[c];
                std::memcpy(d + i * kBlock + j, &x, sizeof x);
            }
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t o = 0; o <= i; o++) {
                Group chains{};
                for (int64_t j = 0; j < kBlock; j += kGroup)
#pragma GCC unroll 16
                    for (int c = 0; c < kParts; c++)
                        chains.part[c] += vector(d + i * kBlock + j + kLanes * c) * vector(d + o * kBlock + j + kLanes * c);
                sums[i * count + o] += sum(chains);
            }
    };
    const std::vector<double> sums = sums_over_chunks(merge, count * count, count * count, true, add);
    for (int64_t i = 0; i < count; i++)
        for (int64_t o = 0; o <= i; o++) gram[i * count + o] = gram[o * count + i] = sums[i * count + o];
}
