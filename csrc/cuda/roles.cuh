// What both launches are made of: a ring of stages between a producer and two warp groups that multiply, the packing of
// the adapters, the sum that makes S (or dS), the GEMM, and how its result leaves.

#pragma once
#include "plan.h"
#include "tools.cuh"

// Of a padded rank: its boxes, so stages of a tail; their steps of 16; the boxes along the sum in a stage of S.
template <int RP> constexpr int TAIL = RP > BOX ? 2 : 1;
template <int RP> constexpr int SIXTEENS = RP < BOX ? RP / 16 : 4;
template <int RP> constexpr int SPAN = RP > BOX ? 1 : 2;

struct Shared {
    uint8_t stages[STAGES][STAGE_BYTES];
    uint8_t out[2][CUTS][CUT_BYTES];            // of each warp group
    uint8_t kept[STAGES][2][BOX][PIECE];        // mask bits of the stages
    uint64_t full[STAGES], empty[STAGES];
    int note[STAGES];                           // which item a stage belongs to
    int last;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "shared memory of an SM");

// The two warp groups that multiply: each has 64 of a tile's 128 rows (or columns).
struct Consumer {
    int thread = threadIdx.x - 128, half = thread / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    int row = 16 * warp + lane / 4, column = 2 * (lane % 4);  // of d[0] in D
    DEVICE void sync_half() const { sync_threads(1 + half, 128); }
    DEVICE void sync_both() const { sync_threads(3, 256); }
    DEVICE bool leads_half() const { return thread % 128 == 0; }
};

// One end of the ring. Producer and consumers walk it in the same order, each at its own pace.
struct Ring {
    Shared& sm;
    int stage = 0, phase = 0;
    DEVICE void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    DEVICE uint8_t* box(int i) const { return sm.stages[stage] + i * BOX_BYTES; }

    // The producer: waits until the stage is free, announces so many boxes and pieces of the mask, loads them.
    DEVICE void fill(int boxes, int pieces, int note = 0) {
        barrier_wait(&sm.empty[stage], phase ^ 1);
        sm.note[stage] = note;
        barrier_expect(&sm.full[stage], boxes * BOX_BYTES + pieces * PIECE_BYTES);
    }
    DEVICE void load_piece(int i, const TensorMap& map, int byte, int row) const {
        tma_load(sm.kept[stage][i], &map, byte, row, &sm.full[stage]);
    }
    DEVICE void load(int i, const TensorMap& map, int column, int row) const {
        tma_load(box(i), &map, column, row, &sm.full[stage]);
    }

    // A consumer: waits until the stage is there; gives a stage back.
    DEVICE void wait() const { barrier_wait(&sm.full[stage], phase); }
    DEVICE void give_back(int which) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&sm.empty[which]);
    }
};

DEVICE Shared& start(uint8_t* raw) {
    Shared& sm = *reinterpret_cast<Shared*>(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&sm.full[i], 1);
            barrier_init(&sm.empty[i], 8);  // warps that multiply
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    return sm;
}

// A sum of products in flight: D += A B over one stage after the other, the one before given back while this one runs.
template <typename T, int COUNT> struct Product {
    float (&d)[COUNT];
    Ring& ring;
    int before = -1;  // the stage that is still being read
    // A's 64 rows are box `half`; B begins at box 2.
    template <bool B_ACROSS, int EACH> DEVICE void step(int half) {
        ring.wait();
        const uint32_t a = k_major(ring.box(half)), b = B_ACROSS ? mn_major(ring.box(2)) : k_major(ring.box(2));
        wgmma_fence();
        UNROLL for (int k = 0; k < EACH; k++)
            wgmma<T, false, B_ACROSS>(d, a + 2 * k, b + (B_ACROSS ? 128 : 2) * k, before + k >= 0);
        wgmma_commit();
        if (before >= 0) {
            wgmma_wait<1>();
            ring.give_back(before);
        }
        before = ring.stage;
        ring.next();
    }

    template <bool B_ACROSS> DEVICE void run(int steps, int half) {  // at least one: else d would have two beginnings
        do step<B_ACROSS, 4>(half);
        while (--steps);
    }

    DEVICE void finish() {
        wgmma_wait<0>();
        settle(d);
        ring.give_back(before);
    }
};

// Tile i of a GEMM of `rows` x `columns` tiles: along a group of columns, then down, then the next group. What runs at
// once shares few rows of the left operand and a slab of the right one, and rows come in the order in which S does.
struct Tile {
    int row, column;
    DEVICE Tile(int i, int rows, int columns) {
        const int group = i / (rows * GROUP), rest = i % (rows * GROUP);
        const int wide = columns - group * GROUP < GROUP ? columns - group * GROUP : GROUP;
        row = rest / wide;
        column = group * GROUP + rest % wide;
    }
};

// ---- packing: what TMA cannot read as it lies (the adapters, of any strides and dtype) copied to where it can

// (rows, columns) elements from strides (s0, s1) to strides (d0, 1), by threads first, first + step, ...; four loads
// of a thread are under way at a time.
template <typename T>
DEVICE void pack(T* to, int64_t d0, const void* from, bool is_float, unsigned rows, unsigned columns, int64_t s0,
                 int64_t s1, unsigned first, unsigned step) {
    const unsigned count = rows * columns;
    for (unsigned i = first; i < count; i += 4 * step) {
        T x[4];
        UNROLL for (int j = 0; j < 4; j++) {
            const unsigned at = i + j * step;
            if (at >= count) break;
            const int64_t source = at / columns * s0 + at % columns * s1;
            x[j] = is_float ? T(static_cast<const float*>(from)[source]) : static_cast<const T*>(from)[source];
        }
        UNROLL for (int j = 0; j < 4; j++) {
            const unsigned at = i + j * step;
            if (at < count) to[at / columns * d0 + at % columns] = x[j];
        }
    }
}

// All CTAs pack, while their first tiles come: A to (R, K), B to (N, stride) or, for a stride of 0, Bᵀ (R, N).
template <typename T>
DEVICE void pack_adapters(const Consumer& me, const Adapters& a, int N, int K, int R, int stride, int ctas,
                          const Flags& flags) {
    const unsigned first = cta() * 256 + me.thread, step = ctas * 256;
    T *A = static_cast<T*>(a.packed_A), *B = static_cast<T*>(a.packed_B);
    pack<T>(A, K, a.lora_A, a.is_float, R, K, a.stride_ar, a.stride_ak, first, step);
    if (stride) pack<T>(B, stride, a.lora_B, a.is_float, N, R, a.stride_bn, a.stride_br, first, step);
    else pack<T>(B, N, a.lora_B, a.is_float, R, N, a.stride_br, a.stride_bn, first, step);
    me.sync_both();
    if (me.thread == 0) flag_add(flags.packed, 1);
}

DEVICE void wait_packed(int ctas, int streamers, const Flags& flags) {  // one thread of each streaming CTA
    while (flag_read(flags.packed) < ctas);
    if (flag_count(flags.packed, 1) == ctas + streamers - 1) flag_count(flags.packed, -ctas - streamers);
    fence_async_proxy();
}

DEVICE void wait_row(int row, const Flags& flags) {  // one thread of each tile or item that reads the row block's S
    while (flag_read(&flags.rows[row]) == 0);
    flag_count(&flags.rows[row], -1);
    fence_async_proxy();
}

// ---- the mask, by the three warps beside each producer, row block after row block: the first are soon there

DEVICE void make_mask(const Mask& mask, int rows, int ctas, int32_t* made) {
    const uint64_t seed = *mask.seed;
    const uint32_t limit = keep_limit(mask.threshold);
    const int width = mask.stride / 4;  // words of a row
    for (int row = 0; row < rows; row++) {
        for (int i = cta() * 96 + threadIdx.x - 32; i < TILE_M * width; i += ctas * 96) {
            const int m = row * TILE_M + i / width;
            uint32_t word = 0;
#pragma unroll 1
            for (int j = 0; j < 4; j++) {
                uint32_t w[4];
                philox(seed, i % width * 4 + j, m, w);
                UNROLL for (int k = 0; k < 4; k++)
                    word |= (keep_low(w[k], limit) | keep_high(w[k], limit) << 1) << (8 * j + 2 * k);
            }
            reinterpret_cast<uint32_t*>(mask.bits + static_cast<int64_t>(m) * mask.stride)[i % width] = word;
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) flag_add(&made[row], 1);
    }
}

DEVICE void wait_mask(int ctas, int32_t* made) {  // one thread of the CTA that streams the row block
    while (flag_read(made) < 3 * ctas);
    flag_count(made, -3 * ctas);
}

// The producer's part of a tile: steps over (P, W), then the tail over (S, Q). ACROSS: their rows run across the sum.
// With a mask the tail is two stages, each with the bits of 128 columns.
template <int RP, bool ACROSS>
DEVICE void load_tile(Ring& ring, Tile tile, const TensorMap& p, const TensorMap& w, const TensorMap& s,
                      const TensorMap& q, const TensorMap* mask, int length, const Flags& flags) {
    const int steps = cdiv(length, TILE_K), m = tile.row * TILE_M, n = tile.column * TILE_N;
    for (int step = 0; step < steps + (mask ? 2 : TAIL<RP>); step++) {
        const bool tail = step >= steps, boxes = step < steps + TAIL<RP>, bits = tail && mask;
        const int k = TILE_K * (tail ? step - steps : step);
        if (step == steps) wait_row(tile.row, flags);
        ring.fill(boxes ? 6 : 0, bits ? 2 : 0);
        for (int j = 0; j < 2 && boxes; j++) ring.load(j, tail ? s : p, k, m + BOX * j);
        for (int j = 0; j < 4 && boxes; j++)
            ring.load(2 + j, tail ? q : w, ACROSS ? n + BOX * j : k, ACROSS ? k : n + BOX * j);
        for (int j = 0; j < 2 && bits; j++) ring.load_piece(j, *mask, n / 8 + (step - steps) * PIECE, m + BOX * j);
        ring.next();
    }
}

// ---- S = factor * drop(P) Qᵀ of one row block: P (M, L), Q (R, L). Stages of 64 columns; of 128 where R leaves room.

template <int RP>
DEVICE void load_sum(Ring& ring, const TensorMap& p, const TensorMap& q, const TensorMap* mask, int row, int L) {
    for (int l = 0; l < L; l += BOX * SPAN<RP>) {
        ring.fill(SPAN<RP> * (2 + TAIL<RP>), mask ? 2 : 0);
        for (int j = 0; j < 2 && mask; j++) ring.load_piece(j, *mask, l / 128 * PIECE, row + BOX * j);
        for (int i = 0; i < SPAN<RP>; i++) {
            for (int j = 0; j < 2; j++) ring.load(2 * i + j, p, l + BOX * i, row + BOX * j);
            for (int j = 0; j < TAIL<RP>; j++) ring.load(4 + i + j, q, l + BOX * i, BOX * j);
        }
        ring.next();
    }
}

// Zeros where the mask drops, in a box of x, by the threads of a warp group; half of a piece has the bits. A byte of
// them is the 16 bytes that the swizzle keeps together.
DEVICE void drop_box(uint8_t* box, const uint8_t (&piece)[BOX][PIECE], int half, int thread) {
#pragma unroll 2
    for (int i = thread % 128; i < BOX * 8; i += 128) {
        const int r = i / 8, c = i % 8;
        uint4& x = *reinterpret_cast<uint4*>(box + 128 * r + 16 * (c ^ (r & 7)));
        const uint32_t bits = *reinterpret_cast<const uint32_t*>(&piece[r][8 * half + (c & 4)]) >> 8 * (c & 3);
        uint32_t y[4] = {x.x, x.y, x.z, x.w};
        UNROLL for (int k = 0; k < 4; k++) {
            if (!(bits >> 2 * k & 1)) y[k] &= 0xFFFF0000;
            if (!(bits >> 2 * k & 2)) y[k] &= 0xFFFF;
        }
        x = {y[0], y[1], y[2], y[3]};
    }
}

template <typename T, int RP>
DEVICE void sum_rows(Ring& ring, const Consumer& me, const Rank& S, int row, int M, int L, int R,
                     uint32_t threshold) {
    float d[RP / 2];
    for (int l = 0; l < L; l += BOX * SPAN<RP>) {
        ring.wait();
        if (threshold) {
            UNROLL for (int i = 0; i < SPAN<RP>; i++)
                drop_box(ring.box(2 * i + me.half), ring.sm.kept[ring.stage][me.half], l / BOX % 2 + i, me.thread);
            fence_async_proxy();
            me.sync_half();
        }
        wgmma_fence();
        UNROLL for (int i = 0; i < 4 * SPAN<RP>; i++)
            wgmma<T, false, false>(d, k_major(ring.box(i / 4 * 2 + me.half)) + i % 4 * 2,
                                   k_major(ring.box(4 + i / 4)) + i % 4 * 2, l + i);
        wgmma_commit();
        wgmma_wait<0>();
        settle(d);
        ring.give_back(ring.stage);
        ring.next();
    }
    const float factor = S.factor * (threshold ? keep_scale(threshold) : 1.0f);
    UNROLL for (int i = 0; i < RP / 2; i += 2) {
        const int m = row + BOX * me.half + me.row + 8 * (i / 2 % 2), r = 8 * (i / 4) + me.column;
        const uint32_t two = pack_two(T(), d[i] * factor, d[i + 1] * factor);
        if (m >= M || r >= R) continue;
        *reinterpret_cast<uint32_t*>(static_cast<T*>(S.rows) + static_cast<int64_t>(m) * S.stride_s + r) = two;
        if (!S.again) continue;
        uint16_t* again = static_cast<uint16_t*>(S.again) + m * S.stride_am + r * S.stride_ar;
        again[0] = static_cast<uint16_t>(two);
        if (r + 1 < R) again[S.stride_ar] = static_cast<uint16_t>(two >> 16);
    }
}

// ---- a tile leaves, 32 columns at a time: rounded, laid into shared memory, stored by TMA behind everyone's back

template <typename T> struct Exit {
    Shared& sm;
    const TensorMap& map;
    int pieces = 0;
    DEVICE void store(const float (&d)[128], const Consumer& me, int row, int column, int rows, int columns,
                      const T* bias) {
        if (row + BOX * me.half >= rows) return;
        UNROLL for (int cut = 0; cut < TILE_N / CUT; cut++) {
            const int n = column + CUT * cut;
            if (n >= columns) return;
            uint8_t* piece = sm.out[me.half][pieces % CUTS];
            float2 b[4] = {};
            UNROLL for (int j = 0; j < 4; j++) {
                const int c = n + 8 * j + me.column;
                if (bias && c < columns) b[j] = {to_float(bias[c]), to_float(bias[c + 1])};
            }
            if (me.leads_half()) tma_store_wait<CUTS - 1>();
            me.sync_half();
            UNROLL for (int i = 0; i < 16; i += 2) {  // rows of 64 bytes, swizzled by 64
                const int r = me.row + 8 * (i / 2 % 2), c = 8 * (i / 4) + me.column;
                *reinterpret_cast<uint32_t*>(piece + 64 * r + (2 * c ^ (r / 2 % 4 * 16))) =
                    pack_two(T(), d[16 * cut + i] + b[i / 4].x, d[16 * cut + i + 1] + b[i / 4].y);
            }
            fence_async_proxy();
            me.sync_half();
            if (me.leads_half()) tma_store(&map, n, row + BOX * me.half, piece);
            pieces++;
        }
    }

    DEVICE void finish(const Consumer& me) {
        if (me.leads_half()) tma_store_wait<0>();
    }
};
