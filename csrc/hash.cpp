// The hash of a tensor: see kernels/hashing.py.
#include "common.h"
#include "hash.h"

HYPERLLAMA_API uint64_t hyperllama_hash(const void* data, int64_t bytes, int threads) {
    using namespace hyperllama;
    uint64_t total = 0;
    parallel((bytes + kHashBlock - 1) / kHashBlock, kHashBlock / 2, threads, [&](int64_t begin, int64_t end, int) {
        const int64_t first = begin * kHashBlock, last = std::min(end * kHashBlock, bytes);
        const uint64_t part = hash_blocks(static_cast<const char*>(data) + first, last - first, begin);
        __atomic_fetch_add(&total, part, __ATOMIC_RELAXED);
    });
    return total;
}
