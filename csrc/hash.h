// The 64-bit hash of a tensor's bytes that kernels/hashing.py defines: a sum over blocks, so that they can be hashed in any order,
// by any number of threads, when a kernel has them in a cache anyway.
#pragma once
#include <cstdint>
#include <cstring>

namespace hyperllama {

constexpr int64_t kHashBlock = 2048;  // bytes

inline uint64_t hash_mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Block number `number` of a tensor, all of it.
inline uint64_t hash_block(const void* block, int64_t number) {
    constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
    const char* bytes = static_cast<const char*>(block);
    uint64_t sums[8] = {}, keys[8];
    for (int l = 0; l < 8; l++) keys[l] = golden * uint64_t(l + 1);
    for (int64_t at = 0; at < kHashBlock; at += 64) {
        // where several tensors take turns, block by block, hardware does not see that each of them goes on; into L2, which has room
        // for more lines on their way than L1
        __builtin_prefetch(bytes + at + kHashBlock, 0, 2);
        uint64_t words[8];
        std::memcpy(words, bytes + at, sizeof words);
#pragma omp simd
        for (int l = 0; l < 8; l++) {
            const uint64_t x = words[l] ^ keys[l];
            sums[l] += (x & 0xFFFFFFFFu) * (x >> 32) + words[l];
            keys[l] += 8 * golden;
        }
    }
    uint64_t hash = hash_mix(uint64_t(number) + golden);
    for (uint64_t sum : sums) hash = hash_mix(hash ^ sum);
    return hash;
}

// The blocks of `n` bytes that begin with block number `number`; the last one is filled up with zeros.
inline uint64_t hash_blocks(const void* data, int64_t n, int64_t number) {
    const char* bytes = static_cast<const char*>(data);
    uint64_t total = 0;
    for (; n >= kHashBlock; n -= kHashBlock, bytes += kHashBlock) total += hash_block(bytes, number++);
    if (n > 0) {
        char padded[kHashBlock] = {};
        std::memcpy(padded, bytes, n);
        total += hash_block(padded, number);
    }
    return total;
}

}  // namespace hyperllama
