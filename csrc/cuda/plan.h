// What the host and the kernels agree on: sizes, arguments, and the arithmetic that shares out a launch.

#pragma once
#include <stdint.h>

#ifndef __CUDACC__
#define __host__
#define __device__
#endif

constexpr int TILE_M = 128, TILE_N = 256, TILE_K = 64;  // of the output, and a step of the sum
constexpr int BOX = 64, BOX_BYTES = BOX * BOX * 2;       // TMA moves 64 x 64 elements: 64 rows of 128 bytes
constexpr int STAGES = 4, STAGE_BYTES = 6 * BOX_BYTES;   // a ring of 48 KiB stages
constexpr int PIECE = 16, PIECE_BYTES = BOX * PIECE;     // mask bits, with a stage's boxes: 64 rows of 128 columns
constexpr int CUT = 32, CUT_BYTES = BOX * CUT * 2;       // results leave in pieces of 64 x 32
constexpr int CUTS = 3;                                  // pieces of a warp group under way
constexpr int THREADS = 384;                             // a producer's warp group and two that multiply
constexpr int FEW = 56, MANY = 224;                      // registers of a thread that does not, and does multiply
constexpr int GROUP = 16;                                // columns of tiles walked together: they share W in L2
constexpr int MAX_RANK = 128;
constexpr int SHARED_BYTES = 227 * 1024;                 // all that a CTA can have: one CTA an SM

static_assert(FEW + 2 * MANY <= 3 * 168, "a CTA starts with 168 a thread; a warp group that asks for more waits");

__host__ __device__ constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return cdiv(a, b) * b; }
constexpr int padded_rank(int R) { return R <= 16 ? 16 : R <= 32 ? 32 : R <= 64 ? 64 : 128; }

// Words that are zero between launches: all who write or read a word count in it, the last leaves 0.
struct Flags {
    int32_t *packed, *queue;  // CTAs that have packed their part, then those that stream and have seen it; items taken
    int32_t *rows, *made;     // of each row block: readers still to come once its S is there; warps that made its mask
    int32_t* done;            // of each slab of the queue: parts that are summed
};

struct Adapters {           // lora_A (R, K) and lora_B (N, R), any strides, T or float; packed by the streaming CTAs
    const void *lora_A, *lora_B;
    int64_t stride_ar, stride_ak, stride_bn, stride_br;
    void *packed_A, *packed_B;  // T: A (R, K); B (N, stride_s) forward, Bᵀ (R, N) backward
    int32_t is_float;
};

struct Rank {              // S forward, dS backward, twice
    void* rows;            // (M, stride_s), rows at multiples of 16 bytes: the tail's
    void* again;           // (M, R) with these strides, or null: S for backward; dS by columns, for dA
    int64_t stride_am, stride_ar;
    int32_t stride_s;
    float factor;
};

struct Mask {              // bit k % 8 of byte k / 8 of a row; made by all CTAs where threshold > 0
    const int64_t* seed;
    uint8_t* bits;         // (row blocks * TILE_M, stride)
    int32_t stride;        // bytes, of K rounded up to TILE_N
    uint32_t threshold;    // an element is kept when its 16 bits reach it
};

struct ForwardArgs {
    Adapters adapters;
    Rank S;
    Mask mask;
    const void* bias;          // (N,) or null
    Flags flags;
    int32_t M, N, K, R, streamers, others;  // CTAs that stream, and that do not
    int32_t rows, columns;     // of tiles
};

struct BackwardArgs {
    Adapters adapters;
    Rank dS;
    Mask mask;
    const void* S;             // (M, R)
    void* S_columns;           // (R, stride_t): S for dB; stride_t is dS's too
    int32_t stride_t;
    void *dA, *dB;             // (R, K), (N, R), contiguous, the adapters' dtype
    float* partials;           // items x TILE_N x padded_rank(R)
    Flags flags;
    int32_t M, N, K, R, streamers, others;  // CTAs that stream, and that do not
    int32_t rows, columns, tiles;  // of dX; no tiles where dX is not needed
    int32_t sums, readers;     // whether dS is wanted, and how many tiles and items read each row block of it
    int32_t items_B, items;    // of the queue: dB's, and dA's after them
    int32_t part, parts;       // rows of an item, and how many items make up a slab of dA or dB
};

// Rows of an item of the queue: as few parts as give every SM two, since each part costs a partial sum in float32.
inline int part_rows(int M, int slabs) {
    const int rows = cdiv(M, TILE_M), wanted = cdiv(264, slabs);
    return cdiv(rows, wanted < rows ? wanted : rows) * TILE_M;
}
