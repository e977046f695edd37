// Random bits as a pure function of (key, counter), bit for bit those of kernels/counter.py, where the formula is.
#pragma once
#include <cstdint>

namespace hyperllama {

// 24 uniform bits: times 2^-24 they are counter.py's `uniform`.
inline uint32_t random_bits(uint64_t key, uint64_t counter) {
    uint64_t z = key + (counter + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return uint32_t((z ^ (z >> 31)) >> 40);
}

}  // namespace hyperllama
