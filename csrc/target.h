// Where a kernel's result goes: to memory, or to a file, piece by piece from a buffer that stays in a cache. Writing a file this way
// takes half the time of page faults in a map of it, and needs no memory for the tensor.
#pragma once
#include "common.h"
#include "hash.h"

#include <cerrno>
#include <memory>
#include <unistd.h>

namespace hyperllama {

constexpr int64_t kPiece = 256 << 10;  // bytes, a multiple of kHashBlock: a quarter of a core's L2

// kernels/raw.py has the same fields. In: `data`, or null and the file `fd` (open for writing) with the tensor's place in it. Out:
// finite, and for files the content's hash, and the error number of a write that failed.
struct Target {
    void* data;
    int64_t offset;
    uint64_t hash;
    int32_t fd, finite, error, unused;
};

// Whether any of `n` bytes of 16-bit or 32-bit floats is NaN or infinity, whose exponents are the largest.
template <class Word>
inline bool not_finite(const char* bytes, int64_t n, Word infinity) {
    Word largest = 0;
    const int64_t words = n / int64_t(sizeof(Word));
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < words; j++) {
        Word word;
        std::memcpy(&word, bytes + j * sizeof(Word), sizeof(Word));
        word &= Word(~Word(0)) >> 1;
        largest = word > largest ? word : largest;
    }
    return largest >= infinity;
}

// Writes consecutive bytes of a target from `begin` on, one thread; for a file `begin` is a multiple of kHashBlock. `infinity` is
// that of the dtype, as bits, `size` its bytes.
class Writer {
public:
    Writer(Target& target, int64_t begin, int64_t size, uint32_t infinity, bool past_caches)
        : target_(target), at_(begin), size_(size), infinity_(infinity), past_caches_(past_caches) {
        if (!target.data) piece_.reset(new char[kPiece]);
    }

    void put(const void* bytes, int64_t n) {
        const char* from = static_cast<const char*>(bytes);
        if (target_.data) {
            check(from, n);
            char* to = static_cast<char*>(target_.data) + at_;
            if (past_caches_)
                stream(to, from, n);
            else
                std::memcpy(to, from, n);
            at_ += n;
            return;
        }
        while (n > 0) {
            const int64_t part = std::min(n, kPiece - used_);
            std::memcpy(piece_.get() + used_, from, part);
            used_ += part, from += part, n -= part;
            if (used_ == kPiece) flush();
        }
    }

    // To be called once, after the last `put`.
    void finish() {
        if (used_ > 0) flush();
        if (past_caches_) streamed();
        if (!finite_) __atomic_store_n(&target_.finite, 0, __ATOMIC_RELAXED);
        if (error_) __atomic_store_n(&target_.error, error_, __ATOMIC_RELAXED);
        __atomic_fetch_add(&target_.hash, hash_, __ATOMIC_RELAXED);
    }

private:
    void check(const char* bytes, int64_t n) {
        const bool bad = size_ == 2 ? not_finite<uint16_t>(bytes, n, uint16_t(infinity_)) : not_finite<uint32_t>(bytes, n, infinity_);
        finite_ = finite_ && !bad;
    }

    void flush() {
        check(piece_.get(), used_);
        hash_ += hash_blocks(piece_.get(), used_, at_ / kHashBlock);
        for (int64_t done = 0; done < used_ && !error_;) {
            const ssize_t written = pwrite(target_.fd, piece_.get() + done, used_ - done, target_.offset + at_ + done);
            if (written > 0)
                done += written;
            else if (written == 0 || errno != EINTR)
                error_ = written == 0 ? EIO : errno;
        }
        at_ += used_;
        used_ = 0;
    }

    Target& target_;
    int64_t at_, used_ = 0, size_;
    uint32_t infinity_;
    bool past_caches_, finite_ = true;
    int32_t error_ = 0;
    uint64_t hash_ = 0;
    std::unique_ptr<char[]> piece_;
};

}  // namespace hyperllama
