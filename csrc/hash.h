// The 64-bit hash of a tensor's bytes that kernels/hashing.py defines: a sum over blocks, so that they can be hashed in any order,
// by any number of threads, when a kernel has them in a cache anyway.
#pragma once
#include "counter.h"

#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace hyperllama {

constexpr int64_t kHashBlock = 2048;  // bytes
alignas(64) constexpr uint64_t kHashKeys[8] = {kGolden,     2 * kGolden, 3 * kGolden, 4 * kGolden,
                                               5 * kGolden, 6 * kGolden, 7 * kGolden, 8 * kGolden};  // of line 0

// The eight sums over the 64-byte lines of a block. In vectors by hand: GCC makes products of 64 bits of those of 32.
struct HashSums {
    alignas(64) uint64_t sums[8] = {};

    void add(const void* line, int64_t number) {
        const uint64_t step = 8 * kGolden * uint64_t(number);
#if defined(__AVX512F__)
        const __m512i word = _mm512_loadu_si512(line), key = _mm512_load_si512(kHashKeys);
        const __m512i x = _mm512_xor_si512(word, _mm512_add_epi64(key, _mm512_set1_epi64(int64_t(step))));
        const __m512i product = _mm512_mul_epu32(x, _mm512_srli_epi64(x, 32));
        _mm512_store_si512(sums, _mm512_add_epi64(_mm512_load_si512(sums), _mm512_add_epi64(product, word)));
#elif defined(__AVX2__)
        for (int l = 0; l < 8; l += 4) {
            const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint64_t*>(line) + l));
            const __m256i key = _mm256_load_si256(reinterpret_cast<const __m256i*>(kHashKeys + l));
            const __m256i x = _mm256_xor_si256(word, _mm256_add_epi64(key, _mm256_set1_epi64x(int64_t(step))));
            const __m256i product = _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32));
            __m256i* const sum = reinterpret_cast<__m256i*>(sums + l);
            _mm256_store_si256(sum, _mm256_add_epi64(_mm256_load_si256(sum), _mm256_add_epi64(product, word)));
        }
#else
        uint64_t words[8];
        std::memcpy(words, line, sizeof words);
        for (int l = 0; l < 8; l++) {
            const uint64_t x = words[l] ^ (kHashKeys[l] + step);
            sums[l] += (x & 0xFFFFFFFFu) * (x >> 32) + words[l];
        }
#endif
    }

    // The hash of block number `block`.
    uint64_t hash(int64_t block) const {
        uint64_t hash = mix(uint64_t(block) + kGolden);
        for (uint64_t sum : sums) hash = mix(hash ^ sum);
        return hash;
    }
};

// Block number `number` of a tensor, all of it.
inline uint64_t hash_block(const void* block, int64_t number) {
    HashSums sums;
    for (int64_t line = 0; line < kHashBlock / 64; line++) {
        const char* bytes = static_cast<const char*>(block) + 64 * line;
        // where several tensors take turns, block by block, hardware does not see that each of them goes on; into L2, which has room
        // for more lines on their way than L1
        __builtin_prefetch(bytes + kHashBlock, 0, 2);
        sums.add(bytes, line);
    }
    return sums.hash(number);
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

// The block that holds byte `at` of a tensor, from its sums up to there and the tensor's last `n` bytes; zeros fill it up.
inline uint64_t hash_rest(HashSums& sums, const char* bytes, int64_t n, int64_t at) {
    char padded[kHashBlock] = {};
    std::memcpy(padded, bytes, n);
    const int64_t first = at % kHashBlock / 64;
    for (int64_t line = first; line < kHashBlock / 64; line++) sums.add(padded + 64 * (line - first), line);
    return sums.hash(at / kHashBlock);
}

}  // namespace hyperllama
