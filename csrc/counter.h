// Random bits as a pure function of (key, counter), bit for bit those of kernels/counter.py, where the formula is.
#pragma once
#include <cstdint>

namespace hyperllama {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u, kMixFirst = 0xBF58476D1CE4E5B9u, kMixSecond = 0x94D049BB133111EBu;

// The finalizer of SplitMix64.
inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * kMixFirst;
    z = (z ^ (z >> 27)) * kMixSecond;
    return z ^ (z >> 31);
}

// What counters 2 `pair` and 2 `pair` + 1 share: 24 uniform bits of the first are its low half >> 8, of the second its high half >> 8.
// Times 2^-24 they are counter.py's `uniform`.
inline uint64_t random_pair(uint64_t key, uint64_t pair) { return mix(key + (pair + 1) * kGolden); }

inline uint32_t random_bits(uint64_t key, uint64_t counter) {
    const uint64_t z = random_pair(key, counter >> 1);
    return (counter & 1 ? uint32_t(z >> 32) : uint32_t(z)) >> 8;
}

}  // namespace hyperllama
