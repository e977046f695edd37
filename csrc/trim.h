// Which elements of a model's difference to the base are kept, and times what.
#pragma once
#include "counter.h"
#include "groups.h"

namespace hyperllama {
namespace {

enum Kept { kAll, kTop, kRandom };

struct Trim {
    Kept kept = kAll;
    int32_t limit = 0;  // top: keep magnitudes above, and equal ones up to the flat index `last`; random: keep bits below
    int64_t last = 0;
    uint64_t key = 0;
    float scale = 1;
    uint64_t* drawn = nullptr;  // random: what `draw` gave for the first `groups` groups
    int64_t groups = 0;
};

inline Integers lane_bits() {
    Integers bits{};
    for (int l = 0; l < kLanes; l++) bits[l] = 1 << l;
    return bits;
}

// Which elements of the group at `begin` are kept at random, the first in the lowest bit. Groups begin at even elements.
inline uint64_t draw(const Trim& trim, int64_t begin) {
    uint64_t kept = 0;
#ifdef __AVX512F__
    const __m512i limit = _mm512_set1_epi32(trim.limit);
    const auto mixed = [](__m512i z, int shift, uint64_t factor) {
        return _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, shift)), _mm512_set1_epi64(int64_t(factor)));
    };
    alignas(64) static constexpr uint64_t steps[8] = {0,           kGolden,     2 * kGolden, 3 * kGolden,
                                                      4 * kGolden, 5 * kGolden, 6 * kGolden, 7 * kGolden};
    const uint64_t first = trim.key + (uint64_t(begin) / 2 + 1) * kGolden;
#pragma GCC unroll 4
    for (int c = 0; c < kParts; c++) {  // random_pair of 8 pairs, each 32 bits for two elements; GCC's own vectors of it take a quarter more
        __m512i z = _mm512_add_epi64(_mm512_load_si512(steps), _mm512_set1_epi64(int64_t(first + 8 * uint64_t(c) * kGolden)));
        z = mixed(mixed(z, 30, kMixFirst), 27, kMixSecond);
        z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
        kept |= uint64_t(_mm512_cmplt_epi32_mask(_mm512_srli_epi32(z, 8), limit)) << (kLanes * c);
    }
#else
    const uint64_t key = trim.key, first = uint64_t(begin) / 2;
    const int32_t limit = trim.limit;
    alignas(64) uint64_t pairs[kGroup / 2];
    alignas(64) uint32_t halves[kGroup];
    alignas(64) uint8_t flags[kGroup];
#pragma omp simd
    for (int64_t j = 0; j < kGroup / 2; j++) pairs[j] = random_pair(key, first + uint64_t(j));
    std::memcpy(halves, pairs, sizeof halves);  // little-endian, as tensors in files are
#pragma omp simd
    for (int64_t j = 0; j < kGroup; j++) flags[j] = int32_t(halves[j] >> 8) < limit;
    for (int64_t j = 0; j < kGroup; j += 8) {
        uint64_t eight;
        std::memcpy(&eight, flags + j, 8);
        kept |= (eight * 0x0102040810204080u >> 56) << j;  // bit 8 b of `eight` comes to bit 56 + b
    }
#endif
    return kept;
}

// d = d * (scale where kept, else 0) for the group at `begin`. A product: NaN and infinity stay visible.
inline void trim_group(const Trim& trim, int64_t begin, Group& d) {
    const Vector scale = Vector{} + trim.scale, zero{};
    if (trim.kept == kTop && (trim.last < begin || trim.last >= begin + kGroup)) {
        const int32_t least = trim.limit + (trim.last < begin);
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) d.part[c] *= select(magnitudes(d.part[c]) >= least, scale, zero);
    } else if (trim.kept == kTop) {
        alignas(64) float kept[kGroup];
        std::memcpy(kept, &d, sizeof d);
        for (int64_t j = 0; j < kGroup; j++)
            kept[j] = magnitude(kept[j]) >= trim.limit + (begin + j > trim.last) ? trim.scale : 0.0f;
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) d.part[c] *= vector(kept + kLanes * c);
    } else if (trim.kept == kRandom) {
        const int64_t group = begin / kGroup;
        const uint64_t kept = group < trim.groups ? trim.drawn[group] : draw(trim, begin);
        const Integers bit = lane_bits();
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++)
            d.part[c] *= select(((Integers{} + int32_t(kept >> (kLanes * c))) & bit) != 0, scale, zero);
    } else {
#pragma GCC unroll 16
        for (int c = 0; c < kParts; c++) d.part[c] *= scale;
    }
}

}  // namespace
}  // namespace hyperllama
