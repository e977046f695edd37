// Causal attention: see kernels/attention.py for the formulas. A task is a part of the queries that share one kv head in one
// document; it packs their keys and values once, for products by a register tile.
//
// Keys and values as "columns" are [panel][unit of h][key in panel], what scores read; as "rows" [unit of keys][h], what sums over
// keys read. Scores and sums are fp32; the softmax sees whole rows, so no running maximum is corrected.
#include "tile.h"

#include <cmath>
#include <limits>
#include <vector>
#if defined(__AMX_BF16__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HYPERLLAMA_AMX
#endif

namespace hyperllama {

constexpr int64_t kQueries = 8 * kTile;    // queries worked on at a time
constexpr int64_t kKeys = kTile == 8 ? 256 : 240;  // keys at a time in the backward; also what keys are padded to
constexpr int64_t kWhole = kTile == 8 ? kPanel : 3 * kPanel;  // whole panels and whole tiles
static_assert(kKeys % kQueries % kTile == 0 && kKeys % kWhole == 0 && kWhole % kTile == 0 && kQueries % 2 == 0, "blocks are whole tiles");

// Numbers `column` and on of a row of units; the same for two rows, as one row of units that hold both.
inline void put_at(float* row, int64_t column, Vector x) { put(row + column, x); }
inline void put_rows(float*, int64_t, Vector, Vector) {}  // an fp32 unit holds one row: it is there already

#ifdef __AVX512BF16__
inline __m256i narrow(Vector x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
inline void put_at(Pair* row, int64_t column, Vector x) { _mm256_storeu_si256((__m256i*)((char*)row + 2 * column), narrow(x)); }
inline void put_rows(Pair* row, int64_t column, Vector x, Vector y) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(x)), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(y)), 16);
    _mm512_storeu_si512(row + column, _mm512_or_si512(low, high));
}
#endif

// A tile as wide as a head: `head` is a multiple of the lanes.
template <class U>
inline void wide_tile(int64_t units, const U* a, int64_t ra, int64_t ca, const U* b, int64_t head, float* c, bool add) {
    int64_t d = 0;
    for (; d + kPanel <= head; d += kPanel) tile<kTile, 2>(units, a, ra, ca, b + d, head, c + d, head, add);
    if (d < head) tile<kTile, 1>(units, a, ra, ca, b + d, head, c + d, head, add);
}

// How a CPU multiplies: vectors of units, or (below) tiles. `scores` and `wide` give kRows rows: the panel of keys at `b`, and a head.
template <class U>
struct Vectors {
    using Unit = U;
    static constexpr int64_t kRows = kTile;
    static constexpr bool kTiles = false;
    struct Use {};
    static void scores(int64_t units, const U* a, const U* b, float* c, int64_t rc) {
        tile<kTile, 2>(units, a, units, 1, b, kPanel, c, rc, false);
    }
    static void wide(int64_t units, const U* a, int64_t ra, const U* b, int64_t head, float* c, bool add) {
        wide_tile(units, a, ra, 1, b, head, c, add);
    }
};

#ifdef HYPERLLAMA_AMX
// Tiles of 16 rows of 64 bytes: AMX, for heads of a multiple of 32. A is [row][unit], B [unit][column]; what a thread has in its
// tiles is its own from `Tiles::Use` on, as torch's GEMMs set them up for themselves too.
struct Tiles {
    using Unit = Pair;
    static constexpr int64_t kRows = 32;
    static constexpr bool kTiles = true;

    struct Use {
        Use() {
            alignas(64) struct {
                uint8_t palette = 1, start_row = 0, reserved[14] = {};
                uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } tiles;
            _tile_loadconfig(&tiles);
        }
        ~Use() { _tile_release(); }
    };

    // Whether the CPU has them and Linux grants their registers, which it does for the whole process when asked.
    static bool available() {
        static const bool granted = [] {
            unsigned a, b, c, d;
            constexpr unsigned kBf16 = 1 << 22, kTile = 1 << 24;
            constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
            return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) && !syscall(SYS_arch_prctl, kRequest, kTileData);
        }();
        return granted;
    }

    // C (32, columns) (+)= A B for columns of a multiple of 32 and units of 16.
    static void product(int64_t columns, int64_t units, const Pair* a, int64_t ra, const Pair* b, int64_t rb, float* c, int64_t rc,
                        bool add) {
        __asm__ volatile("" ::: "memory");  // GCC does not know that its intrinsics read and write memory
        for (int64_t j = 0; j < columns; j += 32) {
            float *upper = c + j, *lower = upper + 16 * rc;
            if (add) {
                _tile_loadd(0, upper, 4 * rc);
                _tile_loadd(1, upper + 16, 4 * rc);
                _tile_loadd(2, lower, 4 * rc);
                _tile_loadd(3, lower + 16, 4 * rc);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < units; k += 16) {
                _tile_loadd(4, a + k, 4 * ra);
                _tile_loadd(6, b + k * rb + j, 4 * rb);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b + k * rb + j + 16, 4 * rb);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + 16 * ra + k, 4 * ra);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, upper, 4 * rc);
            _tile_stored(1, upper + 16, 4 * rc);
            _tile_stored(2, lower, 4 * rc);
            _tile_stored(3, lower + 16, 4 * rc);
        }
        __asm__ volatile("" ::: "memory");
    }

    static void scores(int64_t units, const Pair* a, const Pair* b, float* c, int64_t rc) {
        product(kPanel, units, a, units, b, kPanel, c, rc, false);
    }
    static void wide(int64_t units, const Pair* a, int64_t ra, const Pair* b, int64_t head, float* c, bool add) {
        product(head, units, a, ra, b, head, c, head, add);
    }
};
static_assert(kPanel == 32 && kQueries % Tiles::kRows == 0, "blocks are whole tiles");
#endif

// (rows, head) at `stride` as [row][unit of head]; rows from `rows` to `padded` are 0.
template <class T, class U>
static void pack_left(const T* x, int64_t stride, int64_t rows, int64_t padded, int64_t head, U* out) {
    const int64_t units = head / kNumbers<U>;
    for (int64_t r = 0; r < rows; r++) {
        const T* in = x + r * stride;
#pragma omp simd
        for (int64_t u = 0; u < units; u++) unit(in + u * kNumbers<U>, in + (u + 1) * kNumbers<U> - 1, out + r * units + u);
    }
    std::memset(static_cast<void*>(out + rows * units), 0, (padded - rows) * units * sizeof(U));
}

template <class T, class U>
static void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t padded, int64_t head, U* out) {
    const int64_t units = head / kNumbers<U>;
    for (int64_t first = 0; first < padded; first += kPanel) {
        const int64_t count = std::max<int64_t>(0, std::min(rows - first, kPanel));
        U* panel = out + first * units;
        if (count < kPanel) std::memset(static_cast<void*>(panel), 0, kPanel * units * sizeof(U));
        const T* in = x + first * stride;
        for (int64_t u = 0; u < units; u++)
            for (int64_t r = 0; r < count; r++)
                unit(in + r * stride + u * kNumbers<U>, in + r * stride + (u + 1) * kNumbers<U> - 1, panel + u * kPanel + r);
    }
}

template <class T, class U>
static void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t padded, int64_t head, U* out) {
    static const T zeros[1024] = {};
    for (int64_t r = 0; r < padded; r += kNumbers<U>, out += head) {
        const int64_t other = r + kNumbers<U> - 1;
        const T *first = r < rows ? x + r * stride : zeros, *second = other < rows ? x + other * stride : zeros;
#pragma omp simd
        for (int64_t d = 0; d < head; d++) unit(first + d, second + d, out + d);
    }
}

struct Task {
    int64_t start, length, kv, part, parts;  // first token, tokens; kv head; which of the parts of its blocks of queries
};

struct Problem {
    int64_t seq_len, heads, kv_heads, head, threads;
    float scale;
    int64_t width() const { return (heads + 2 * kv_heads) * head; }
    int64_t group() const { return heads / kv_heads; }
    int64_t at(int64_t token, int64_t j) const {  // (B, n, T): where the log-sum-exp of head j is
        return (token / seq_len * heads + j) * seq_len + token % seq_len;
    }
    // calls f(first query, query head) for every block of the task's part: in turns, so that parts do about the same work
    template <class F>
    void blocks(const Task& task, F f) const {
        int64_t turn = 0;
        for (int64_t m = 0; m < task.length; m += kQueries)
            for (int64_t j = task.kv * group(); j < (task.kv + 1) * group(); j++)
                if (turn++ % task.parts == task.part) f(m, j);
    }
};

template <class T, class How>
static void forward(const Problem& p, const Task& task, const T* qkv, T* out, float* lse) {
    using U = typename How::Unit;
    const int64_t h = p.head, n = kNumbers<U>, units = h / n, stride = p.width(), padded = up_to(task.length, kKeys);
    const int64_t line = padded + n * kLanes;  // of scores: not a multiple of the page
    float* memory = scratch(2 * padded * units + kQueries * (2 * line + units + h));
    U *keys = (U*)memory, *values = keys + padded * units, *queries = values + padded * units;
    float *scores = (float*)(queries + kQueries * units), *sums = scores + kQueries * line;
    U* shares = (U*)(sums + kQueries * h);
    if (n == 1) shares = (U*)scores;
    const T* token = qkv + task.start * stride;
    pack_columns(token + (p.heads + task.kv) * h, stride, task.length, padded, h, keys);
    pack_rows(token + (p.heads + p.kv_heads + task.kv) * h, stride, task.length, padded, h, values);
    p.blocks(task, [&](int64_t m, int64_t j) {
        const int64_t rows = std::min(kQueries, task.length - m);
        pack_left(token + m * stride + j * h, stride, rows, kQueries, h, queries);
        for (int64_t c = 0; c < m + rows; c += kPanel)
            for (int64_t r = std::max<int64_t>(0, (c - m) / How::kRows * How::kRows); r < rows; r += How::kRows)
                How::scores(units, queries + r * units, keys + c * units, scores + r * line + c, line);
        float inverse[kQueries];
        for (int64_t r = 0; r < kQueries; r++) {
            float* row = scores + r * line;
            const int64_t seen = r < rows ? m + r + 1 : 0, whole = up_to(seen, kLanes);
            for (int64_t c = seen; c < whole; c++) row[c] = -std::numeric_limits<float>::infinity();
            Vector most = Vector{} - std::numeric_limits<float>::infinity(), total{};
            for (int64_t c = 0; c < seen; c += kLanes) most = larger(*(Vector*)(row + c), most);
            const float peak = largest(most), shift = seen ? peak * p.scale : 0;
            for (int64_t c = 0; c < seen; c += kLanes) {
                Vector x = exponential<Held<U>>(*(Vector*)(row + c) * p.scale - shift);
                total += x;
                put_at(shares + r * (line / n), c, x);
            }
            // a product of rows reads as much of this one as of its last
            const int64_t read = m + r / How::kRows * How::kRows + How::kRows;
            for (int64_t c = whole; c < read; c += kLanes) put_at(shares + r * (line / n), c, Vector{});
            const float sum = hyperllama::sum(total);
            inverse[r] = 1 / sum;
            if (r < rows) lse[p.at(task.start + m + r, j)] = shift + std::log(sum);
        }
        for (int64_t r = 0; r < rows; r += How::kRows)
            How::wide((m + r + How::kRows + n - 1) / n, shares + r * (line / n), line / n, values, h, sums + r * h, false);
        for (int64_t r = 0; r < rows; r++) {
            T* to = out + ((task.start + m + r) * p.heads + j) * h;
#pragma omp simd
            for (int64_t d = 0; d < h; d++) store(to + d, sums[r * h + d] * inverse[r]);
        }
    });
}

// [unit of rows][h] as [h][unit of rows].
template <class U>
static void turn(const U* in, int64_t units, int64_t head, U* out) {
    for (int64_t d = 0; d < head; d++)
        for (int64_t u = 0; u < units; u++) out[d * units + u] = in[u * head + d];
}

// Gradients of a task's keys and values go to `dkeys` and `dvalues`, which are zeros before, (padded length, h) or, from tiles, which
// want the units of both sides along queries, turned: (h, turned_line). Those of its queries go to dqkv.
static int64_t turned_line(int64_t length) { return up_to(length, kKeys) + kLanes; }

template <class T, class How>
static void backward(const Problem& p, const Task& task, const T* dy, const T* qkv, const T* out, const float* lse, T* dqkv,
                     float* dkeys, float* dvalues) {
    using U = typename How::Unit;
    const int64_t h = p.head, n = kNumbers<U>, units = h / n, stride = p.width(), padded = up_to(task.length, kKeys);
    const int64_t line = kKeys + n * kLanes, wide = p.heads * h;
    float* memory = scratch(3 * padded * units + kQueries * (6 * units + 4 * line + h));
    U *key_columns = (U*)memory, *value_columns = key_columns + padded * units, *key_rows = value_columns + padded * units;
    U *queries = key_rows + padded * units, *grads = queries + kQueries * units;          // [query][unit of h]
    U *query_rows = grads + kQueries * units, *grad_rows = query_rows + kQueries * units;  // [unit of queries][h]
    U *turned_queries = grad_rows + kQueries * units, *turned_grads = turned_queries + kQueries * units;  // [h][unit of queries]
    float *shares = (float*)(turned_grads + kQueries * units), *scores = shares + kQueries * line, *dqueries = scores + kQueries * line;
    // what sums over queries read, [unit of queries][key], and what the sum over keys reads, [query][unit of keys]
    U *shares_by_query = (U*)shares, *scores_by_query = (U*)scores, *by_key = (U*)scores;
    if (n == 2) {
        shares_by_query = (U*)(dqueries + kQueries * h);
        scores_by_query = shares_by_query + kQueries / 2 * line;
        by_key = scores_by_query + kQueries / 2 * line;
    }
    const int64_t key_line = line / n;
    const T *token = qkv + task.start * stride, *gradient = dy + task.start * wide, *result = out + task.start * wide;
    pack_columns(token + (p.heads + task.kv) * h, stride, task.length, padded, h, key_columns);
    pack_columns(token + (p.heads + p.kv_heads + task.kv) * h, stride, task.length, padded, h, value_columns);
    pack_rows(token + (p.heads + task.kv) * h, stride, task.length, padded, h, key_rows);
    p.blocks(task, [&](int64_t m, int64_t j) {
        const int64_t rows = std::min(kQueries, task.length - m);
        pack_left(token + m * stride + j * h, stride, rows, kQueries, h, queries);
        pack_left(gradient + m * wide + j * h, wide, rows, kQueries, h, grads);
        pack_rows(token + m * stride + j * h, stride, rows, kQueries, h, query_rows);
        pack_rows(gradient + m * wide + j * h, wide, rows, kQueries, h, grad_rows);
        if constexpr (How::kTiles) {
            turn(query_rows, kQueries / n, h, turned_queries);
            turn(grad_rows, kQueries / n, h, turned_grads);
        }
        std::memset(dqueries, 0, kQueries * h * sizeof(float));
        float inner[kQueries], shift[kQueries];
        for (int64_t r = 0; r < rows; r++) {
            const T *a = gradient + (m + r) * wide + j * h, *b = result + (m + r) * wide + j * h;
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < h; d++) dot += load(a + d) * load(b + d);
            inner[r] = dot;
            shift[r] = lse[p.at(task.start + m + r, j)];
        }
        for (int64_t k = 0; k < m + rows; k += kKeys) {
            const int64_t columns = std::min(kKeys, up_to(m + rows - k, kWhole));
            for (int64_t c = 0; c < columns && c + k < m + rows; c += kPanel)
                for (int64_t r = std::max<int64_t>(0, (k + c - m) / How::kRows * How::kRows); r < rows; r += How::kRows) {
                    const int64_t at = r * line + c;
                    How::scores(units, queries + r * units, key_columns + (k + c) * units, shares + at, line);
                    How::scores(units, grads + r * units, value_columns + (k + c) * units, scores + at, line);
                }
            for (int64_t r = 0; r < kQueries; r++) {
                float *share = shares + r * line, *score = scores + r * line;
                const int64_t seen = r < rows ? std::max<int64_t>(0, std::min(columns, m + r + 1 - k)) : 0;
                int64_t c = 0;
                for (; c < seen; c += kLanes) {
                    Vector x = exponential<Held<U>>(*(Vector*)(share + c) * p.scale - shift[r]);
                    Vector y = x * (*(Vector*)(score + c) - inner[r]);
                    *(Vector*)(share + c) = x;
                    *(Vector*)(score + c) = y;
                }
                for (int64_t hidden = seen; hidden < c; hidden++) share[hidden] = score[hidden] = 0;
                for (; c < columns; c += kLanes) *(Vector*)(share + c) = *(Vector*)(score + c) = Vector{};
            }
            if (n == 2)
                for (int64_t r = 0; r < kQueries; r += 2)
                    for (int64_t c = 0; c < columns; c += kLanes) {
                        const Vector x = *(Vector*)(shares + r * line + c), next_x = *(Vector*)(shares + (r + 1) * line + c);
                        const Vector y = *(Vector*)(scores + r * line + c), next_y = *(Vector*)(scores + (r + 1) * line + c);
                        put_rows(shares_by_query + r / 2 * line, c, x, next_x);
                        put_rows(scores_by_query + r / 2 * line, c, y, next_y);
                        put_at(by_key + r * key_line, c, y);
                        put_at(by_key + (r + 1) * key_line, c, next_y);
                    }
            // earlier queries don't see these keys
            if constexpr (How::kTiles) {
                for (int64_t c = 0; c < columns && k + c < m + rows; c += kPanel) {
                    const int64_t all = kQueries / n, first = std::max<int64_t>(0, k + c - m) / n, right = first * line + c;
                    for (int64_t d = 0; d < h; d += How::kRows) {
                        const int64_t left = d * all + first, across = turned_line(task.length), to = d * across + k + c;
                        How::product(kPanel, all - first, turned_grads + left, all, shares_by_query + right, line, dvalues + to, across, true);
                        How::product(kPanel, all - first, turned_queries + left, all, scores_by_query + right, line, dkeys + to, across, true);
                    }
                }
            } else {
                for (int64_t c = 0; c < columns; c += kTile) {
                    const int64_t first = std::max<int64_t>(0, k + c - m) / n;
                    const int64_t left = first * line + c, right = first * h, to = (k + c) * h;
                    if (first * n >= rows) break;
                    wide_tile(kQueries / n - first, shares_by_query + left, 1, line, grad_rows + right, h, dvalues + to, true);
                    wide_tile(kQueries / n - first, scores_by_query + left, 1, line, query_rows + right, h, dkeys + to, true);
                }
            }
            for (int64_t r = 0; r < rows; r += How::kRows) {
                const int64_t seen = std::min(columns, m + r + How::kRows - k);
                if (seen > 0)
                    How::wide((seen + n - 1) / n, by_key + r * key_line, key_line, key_rows + k * units, h, dqueries + r * h, true);
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            T* to = dqkv + (task.start + m + r) * stride + j * h;
#pragma omp simd
            for (int64_t d = 0; d < h; d++) store(to + d, dqueries[r * h + d] * p.scale);
        }
    });
}

// Tasks of all documents: a document is cut where it is so much of the work that threads would wait for each other.
static std::vector<Task> tasks_of(const Problem& p, const int32_t* borders, int64_t documents) {
    std::vector<Task> tasks;
    double all = 0;
    for (int64_t i = 0; i < documents; i++) {
        const double length = borders ? borders[i + 1] - borders[i] : p.seq_len;
        all += length * length * double(p.kv_heads);
    }
    for (int64_t i = 0; i < documents; i++) {
        const int64_t start = borders ? borders[i] : i * p.seq_len, length = borders ? borders[i + 1] - borders[i] : p.seq_len;
        int64_t parts = std::max<int64_t>(1, int64_t(4 * p.threads * double(length) * double(length) / all));
        if (parts > 1) parts = up_to(parts, p.threads);
        parts = std::min(parts, up_to(length, kQueries) / kQueries * p.group());
        for (int64_t kv = 0; kv < p.kv_heads && length; kv++)
            for (int64_t part = 0; part < parts; part++) tasks.push_back({start, length, kv, part, parts});
    }
    return tasks;
}

template <class F>
static void each(int64_t count, int threads, F f) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; i++) f(i);
}

template <class T, class How>
static void attention(const Problem& p, const std::vector<Task>& tasks, const T* qkv, T* out, float* lse) {
    each(int64_t(tasks.size()), int(p.threads), [&](int64_t i) {
        [[maybe_unused]] typename How::Use use;
        forward<T, How>(p, tasks[i], qkv, out, lse);
    });
}

// Parts of one document and kv head follow each other in `tasks`; each sums into memory of its own, and they are added in order.
template <class T, class How>
static void attention_backward(const Problem& p, const std::vector<Task>& tasks, const T* dy, const T* qkv, const T* out,
                               const float* lse, T* dqkv) {
    const int64_t h = p.head;
    std::vector<std::vector<float>> sums(tasks.size());
    auto finish = [&](size_t first) {
        const Task& task = tasks[first];
        const int64_t half = turned_line(task.length) * h;
        for (int64_t part = 1; part < task.parts; part++) {
            float *total = sums[first].data(), *more = sums[first + part].data();
#pragma omp simd
            for (int64_t i = 0; i < 2 * half; i++) total[i] += more[i];
        }
        for (int64_t t = 0; t < task.length; t++) {
            const int64_t row = How::kTiles ? 1 : h, column = How::kTiles ? turned_line(task.length) : 1;
            const float *key = sums[first].data() + t * row, *value = key + half;
            T *dkey = dqkv + (task.start + t) * p.width() + (p.heads + task.kv) * h, *dvalue = dkey + p.kv_heads * h;
#pragma omp simd
            for (int64_t d = 0; d < h; d++) {
                store(dkey + d, key[d * column] * p.scale);
                store(dvalue + d, value[d * column]);
            }
        }
        for (int64_t part = 0; part < task.parts; part++) std::vector<float>().swap(sums[first + part]);
    };
    each(int64_t(tasks.size()), int(p.threads), [&](int64_t i) {
        [[maybe_unused]] typename How::Use use;
        const int64_t half = turned_line(tasks[i].length) * h;
        sums[i].assign(2 * half, 0.0f);
        backward<T, How>(p, tasks[i], dy, qkv, out, lse, dqkv, sums[i].data(), sums[i].data() + half);
        if (tasks[i].parts == 1) finish(i);
    });
    each(int64_t(tasks.size()), int(p.threads), [&](int64_t i) {
        if (tasks[i].parts > 1 && tasks[i].part == 0) finish(i);
    });
}

// False when the borders don't go from 0 to the number of tokens, upwards.
static bool fit(const int32_t* borders, int64_t documents, int64_t tokens) {
    if (!borders) return true;
    if (documents < 1 || borders[0] != 0 || borders[documents] != tokens) return false;
    for (int64_t i = 0; i < documents; i++)
        if (borders[i] > borders[i + 1]) return false;
    return true;
}

// Calls f with the way to multiply bf16. CPUs with tiles multiply pairs more slowly than fp32 vectors.
template <class F>
static void multiplying_bf16(int64_t head, F f) {
#ifdef HYPERLLAMA_AMX
    if (Tiles::available()) return head % 32 ? f(Vectors<float>{}) : f(Tiles{});
#endif
#ifdef __AVX512BF16__
    f(Vectors<Pair>{});
#else
    f(Vectors<float>{});
#endif
}

}  // namespace hyperllama

using namespace hyperllama;

// qkv: (batch * seq_len, (heads + 2 kv_heads) head), out: (batch * seq_len, heads * head), lse: (batch, heads, seq_len).
// Returns whether cu_seqlens (null: every window is a document) was usable; nothing is written otherwise.
HYPERLLAMA_API int hyperllama_attention(int is_bf16, const void* qkv, void* out, float* lse, int64_t batch, int64_t seq_len,
                                        int64_t heads, int64_t kv_heads, int64_t head, float scale, const int32_t* cu_seqlens,
                                        int64_t documents, int threads) {
    const Problem p{seq_len, heads, kv_heads, head, threads, scale};
    if (!fit(cu_seqlens, documents, batch * seq_len)) return 0;
    const auto tasks = tasks_of(p, cu_seqlens, cu_seqlens ? documents : batch);
    if (is_bf16)
        multiplying_bf16(head, [&](auto how) { attention<bf16, decltype(how)>(p, tasks, (const bf16*)qkv, (bf16*)out, lse); });
    else
        attention<float, Vectors<float>>(p, tasks, (const float*)qkv, (float*)out, lse);
    return 1;
}

HYPERLLAMA_API int hyperllama_attention_backward(int is_bf16, const void* dy, const void* qkv, const void* out, const float* lse,
                                                 void* dqkv, int64_t batch, int64_t seq_len, int64_t heads, int64_t kv_heads,
                                                 int64_t head, float scale, const int32_t* cu_seqlens, int64_t documents,
                                                 int threads) {
    const Problem p{seq_len, heads, kv_heads, head, threads, scale};
    if (!fit(cu_seqlens, documents, batch * seq_len)) return 0;
    const auto tasks = tasks_of(p, cu_seqlens, cu_seqlens ? documents : batch);
    if (is_bf16)
        multiplying_bf16(head, [&](auto how) {
            attention_backward<bf16, decltype(how)>(p, tasks, (const bf16*)dy, (const bf16*)qkv, (const bf16*)out, lse, (bf16*)dqkv);
        });
    else
        attention_backward<float, Vectors<float>>(p, tasks, (const float*)dy, (const float*)qkv, (const float*)out, lse, (float*)dqkv);
    return 1;
}
