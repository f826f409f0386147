// The machine's words: each a function of a few lines around its PTX.

#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "plan.h"
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define MAP const __grid_constant__ TensorMap

struct alignas(64) TensorMap { char bytes[128]; };

DEVICE int cta() {  // read anew each time: to be kept it would take a register from the multiplying warps
    int id;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(id));
    return id;
}
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarriers: a phase ends when `count` have arrived and all announced bytes have come

DEVICE void barrier_init(uint64_t* bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
DEVICE void barrier_expect(uint64_t* bar, int bytes) {  // arrives, and announces bytes
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(uint64_t* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
DEVICE void barrier_wait(uint64_t* bar, int parity) {  // until the phase of this parity is over
    int done = 0;
    while (!done)
        asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     " selp.b32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory");
}
DEVICE void sync_threads(int id, int count) {  // a named barrier
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// ---- TMA, and the fence between what threads wrote and what TMA and wgmma read

DEVICE void tma_load(void* to, const TensorMap* map, int column, int row, uint64_t* bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)), "l"(map), "r"(column), "r"(row),
                 "r"(shared_address(bar)) : "memory");
}
DEVICE void tma_store(const TensorMap* map, int column, int row, const void* from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(map), "r"(column), "r"(row), "r"(shared_address(from)) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int LEFT> DEVICE void tma_store_wait() {  // until all but the last LEFT stores have read shared memory
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- flags in global memory, between CTAs

DEVICE int flag_read(const int32_t* flag) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
DEVICE void flag_set(int32_t* flag, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
DEVICE int flag_count(int32_t* flag, int value) {  // adds, orders nothing; what it was
    int old;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(flag), "r"(value) : "memory");
    return old;
}
DEVICE int flag_add(int32_t* flag, int value) {  // adds, after all written before; sees what others wrote before
    int old;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(flag), "r"(value) : "memory");
    return old;
}

// ---- wgmma: D (64, N) += A (64, 16) B (16, N), A and B in shared memory, 128 bytes a row, swizzled by 128

// The lower half of the descriptor of an operand whose 64-element rows run along the sum ("K-major"); 16 further: + 2.
DEVICE uint32_t k_major(const void* p) { return shared_address(p) >> 4 | 1 << 16; }

// Of one whose rows run across the sum ("MN-major"), the next 64 lying a box further. 16 further along the sum: + 128.
DEVICE uint32_t mn_major(const void* p) { return shared_address(p) >> 4 | (BOX_BYTES >> 4) << 16; }

#define UPPER_HALF "0x40000040"  // eight rows are 1024 bytes, swizzled by 128

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
template <int N> DEVICE void settle(float (&d)[N]) {  // nothing that reads d moves up past here
    UNROLL for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define TEN(F, t) F(t##0) F(t##1) F(t##2) F(t##3) F(t##4) F(t##5) F(t##6) F(t##7) F(t##8) F(t##9)
#define FROM_1_TO_7(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
#define FROM_1_TO_15(F) FROM_1_TO_7(F) F(8) F(9) F(10) F(11) F(12) F(13) F(14) F(15)
#define FROM_1_TO_31(F) FROM_1_TO_7(F) F(8) F(9) TEN(F, 1) TEN(F, 2) F(30) F(31)
#define FROM_1_TO_63(F)                                                                                               \
    FROM_1_TO_31(F) F(32) F(33) F(34) F(35) F(36) F(37) F(38) F(39) TEN(F, 4) TEN(F, 5) F(60) F(61) F(62) F(63)
#define FROM_1_TO_127(F)                                                                                              \
    FROM_1_TO_63(F) F(64) F(65) F(66) F(67) F(68) F(69) TEN(F, 7) TEN(F, 8) TEN(F, 9) TEN(F, 10) TEN(F, 11)           \
    F(120) F(121) F(122) F(123) F(124) F(125) F(126) F(127)
#define NAME(i) ", %" #i
#define REGISTER(i) , "+f"(d[i])

// `more` = 0: D starts at zero. TRANS: the operand is MN-major. A, B, ...: which of asm's arguments, after the d's.
#define WGMMA(TYPE, N, LAST, A, B, MORE, TRANS_A, TRANS_B)                                                            \
    asm volatile("{\n .reg .pred p;\n .reg .b64 a, b;\n setp.ne.b32 p, %" #MORE ", 0;\n"                             \
                 " mov.b64 a, {%" #A ", " UPPER_HALF "};\n mov.b64 b, {%" #B ", " UPPER_HALF "};\n"                    \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {%0" FROM_1_TO_##LAST(NAME)       \
                 "}, a, b, p, 1, 1, %" #TRANS_A ", %" #TRANS_B ";\n}"                                                 \
                 : "+f"(d[0]) FROM_1_TO_##LAST(REGISTER)                                                              \
                 : "r"(a), "r"(b), "r"(more), "n"(TA), "n"(TB))
#define WGMMA_OF(TYPE)                                                                                                \
    if constexpr (COUNT == 8) WGMMA(TYPE, 16, 7, 8, 9, 10, 11, 12);                                                   \
    if constexpr (COUNT == 16) WGMMA(TYPE, 32, 15, 16, 17, 18, 19, 20);                                               \
    if constexpr (COUNT == 32) WGMMA(TYPE, 64, 31, 32, 33, 34, 35, 36);                                               \
    if constexpr (COUNT == 64) WGMMA(TYPE, 128, 63, 64, 65, 66, 67, 68);                                              \
    if constexpr (COUNT == 128) WGMMA(TYPE, 256, 127, 128, 129, 130, 131, 132)

// Of D (64, 2 COUNT), thread t of the warp group holds rows 16 (t / 32) + t % 32 / 4 (+ 8 for the odd pairs of d) and
// columns 2 (t % 4) + 8 (i / 4) + i % 2.
template <typename T, bool TA, bool TB, int COUNT>
DEVICE void wgmma(float (&d)[COUNT], uint32_t a, uint32_t b, int more) {
    if constexpr (__is_same(T, __half)) { WGMMA_OF("f16"); }
    else { WGMMA_OF("bf16"); }
}

// ---- numbers

DEVICE uint32_t pack_two(__nv_bfloat16, float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
DEVICE uint32_t pack_two(__half, float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DEVICE float to_float(__half x) { return __half2float(x); }
DEVICE float to_float(float x) { return x; }
DEVICE void add_if(uint32_t any, float& d, float u, float scale) {  // in place: a select would take a register more
    asm("{\n .reg .pred p;\n setp.ne.u32 p, %1, 0;\n @p fma.rn.f32 %0, %2, %3, %0;\n}"
        : "+f"(d) : "r"(any), "f"(u), "f"(scale));
}

// Philox-4x32 with 7 rounds (Salmon et al. 2011), counter (column / 8, row, 0, 0): 16 bits for each of eight columns,
// two in each word, in the order of their columns.
DEVICE void philox(uint64_t seed, uint32_t eighth, uint32_t row, uint32_t (&w)[4]) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = eighth, c1 = row, c2 = 0, c3 = 0;
    UNROLL for (int i = 0; i < 7; i++) {
        const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(b);
        c3 = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    w[0] = c0, w[1] = c2, w[2] = c1, w[3] = c3;  // in the order of their columns
}

// A word's 16 bits reach the threshold, t, where they stand above t * 65536 - 1 in the upper half of 32 bits.
DEVICE uint32_t keep_limit(uint32_t threshold) { return (threshold << 16) - 1; }
DEVICE bool keep_low(uint32_t word, uint32_t limit) { return word << 16 > limit; }
DEVICE bool keep_high(uint32_t word, uint32_t limit) { return word > limit; }
DEVICE float keep_scale(uint32_t threshold) {  // of what is kept; finite at p = 1, where nothing is
    return 65536.0f / static_cast<float>(threshold < 65536 ? 65536 - threshold : 1);
}
