// The k-th largest magnitude of every model's difference to the base, exactly, by one pass over the tensors that is seldom followed by
// a second.
#pragma once
#include "trim.h"

#include <memory>

namespace hyperllama {
namespace {

constexpr int32_t kNone = kSign - 1;  // a magnitude that none but some NaNs reach, and they stay visible anyway

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

inline int32_t sum(Integers x) {
    int32_t total = 0;
    for (int l = 0; l < kLanes; l++) total += x[l];
    return total;
}

// Counts the keys |x - base| of at most a block and appends those inside the bracket, in order, to `end`, which it moves; it
// writes up to 16 places beyond. Without an `end` it only counts.
template <bool ends, class T>
Counts tally(const T* x, const float* base, int64_t n, Bracket bracket, int32_t*& end) {
    Integers above{}, from_high{}, above_low{}, from_low{};
    alignas(64) int32_t keys[kBlock];
    int64_t j = 0, done = 0;
    for (; j + kLanes <= n; j += kLanes) {
        __builtin_prefetch(x + j + kBlock);  // models take turns, which hides their next blocks from the hardware
        const Integers key = magnitudes(vector(x + j) - vector(base + j));
#ifdef __AVX512F__
        const __m512i k = (__m512i)key, low = _mm512_set1_epi32(bracket.low), high = _mm512_set1_epi32(bracket.high);
        const __mmask16 from = _mm512_cmpge_epi32_mask(k, high), to = _mm512_cmpgt_epi32_mask(k, low), inside = to & ~from;
        const auto count = [one = _mm512_set1_epi32(1)](Integers& counts, __mmask16 which) {
            counts = (Integers)_mm512_mask_add_epi32((__m512i)counts, which, (__m512i)counts, one);
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
            Reader reader(merge_, true);
            each_block(first, end, merge_.n, [&](int64_t block, int64_t begin, int64_t n) {
                reader.hash(begin, n);
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

}  // namespace
}  // namespace hyperllama
