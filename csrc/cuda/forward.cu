// Y = X Wᵀ + bias + s · drop(X) Aᵀ Bᵀ for sm_90a in one launch, and S = s · drop(X) Aᵀ for backward.
//
// The plan
//   CTAs 0 .. streamers - 1 stream x: they pack the adapters, then sum S [128, R] of every streamers-th row block, leave
//   it in global memory and set the row block's flag. The others run a persistent GEMM over tiles of 128 x 256: K in
//   steps of 64 over (X, W), then the tail over (S, B) in the same accumulator. One thread moves tiles by TMA through
//   four stages of 48 KiB, two warp groups multiply 64 x 256 each, the result leaves by TMA in pieces of 64 x 32 while
//   the next tile runs. x is read once more than by a plain GEMM, by SMs that the GEMM has no use for: 1,024 tiles are
//   eight waves on 128 SMs as on 132.
//
// Why nothing waits for ever
//   The grid is resident as a whole (checked at launch, cooperative). A streaming CTA waits only for the packing of the
//   others, which waits for nothing. A GEMM CTA waits for flags that streaming CTAs set. Within a CTA the producer waits
//   for stages given back, and a stage is given back once it is multiplied, whatever comes after it.
//   A row block's flag holds how many tiles have yet to see it. Each takes one away: the last leaves the 0 that the next
//   launch wants, so CUDA graphs replay. Two launches at a time need two sets of flags.
//
// The floor and the model's prediction: H100, bf16, M = 8192, K = N = 4096, R = 16 (798 TFLOP/s, 3 TB/s). Never measured.
//   floor       275 GFLOP / 798 TFLOP/s = 344 µs; bytes, 67 (x) + 34 (W) + 67 (y) MB / 3 TB/s = 56 µs, lie beneath it
//   GEMM        8 waves of 33.2 k cycles (64 steps of 512, the tail 128, some 300 to fill the ring); the result leaves in
//               2 to 3 k cycles, of which one warp group's hide nothing: + 5 to 8 %, if nothing overlaps: look here first
//   packing     0.4 MB by 4 SMs, 2 µs before the first S
//   S           4 SMs of 100 GB/s read 67 MB in 168 µs: 17 row blocks a wave, the GEMM wants 8. With dropout 75 cycles a
//               Philox call of a warp make it 335 µs, 8.2 row blocks a wave: the last wave may wait
//   tail        the flag has long been set but in the first wave, whose S takes 20 µs of its 43
//   in all      350 to 370 µs
// Where to look if it misses: tensor pipe below 90 % in the K loop -> the ring (stages, the producer's issue rate);
//   stalls at full[] with L2 busy -> GROUP; stalls on a row's flag -> SM_BYTES, SM_MASK and the split; gaps between tiles
//   -> Exit (three pieces under way), then two tiles in flight by warp group ("ping-pong").

#include "roles.cuh"

template <typename T, int RP>
DEVICE void forward(const TensorMap& x, const TensorMap& w, const TensorMap& s, const TensorMap& a, const TensorMap& b,
                    const TensorMap& y, const ForwardArgs& p) {
    extern __shared__ __align__(1024) uint8_t raw[];
    Shared& sm = start(raw);
    Ring ring(sm);
    const bool streams = cta() < p.streamers;
    constexpr int TAIL = cdiv(RP, TILE_K), SIXTEENS = RP < 64 ? RP / 16 : 4;  // stages of the tail, and what each holds

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
        if (threadIdx.x) return;
        if (streams) {
            wait_packed(p.streamers + p.others, p.streamers, p.flags);
            for (int row = cta(); row < p.rows; row += p.streamers) load_sum<RP>(ring, x, a, row * TILE_M, p.K);
            return;
        }
        for (int i = cta() - p.streamers; i < p.rows * p.columns; i += p.others) {
            const Tile tile(i, p.rows, p.columns);
            for (int step = 0; step < cdiv(p.K, TILE_K) + TAIL; step++) {
                const int tail = step - cdiv(p.K, TILE_K), k = TILE_K * (tail < 0 ? step : tail);
                if (tail == 0) wait_row(tile.row, p.flags);
                ring.fill(6);
                for (int j = 0; j < 2; j++) ring.load(j, tail < 0 ? x : s, k, tile.row * TILE_M + BOX * j);
                for (int j = 0; j < 4; j++) ring.load(2 + j, tail < 0 ? w : b, k, tile.column * TILE_N + BOX * j);
                ring.next();
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
    const Consumer me;
    pack_adapters<T>(me, p.adapters, p.N, p.K, p.R, p.S.stride_s, p.streamers + p.others, p.flags);
    if (streams) {
        for (int row = cta(); row < p.rows; row += p.streamers) {
            sum_rows<T, RP>(ring, me, p.S, row * TILE_M, p.M, p.K, p.R, p.seed, p.threshold);
            me.sync_both();
            if (me.thread == 0) flag_set(&p.flags[ROWS + row], p.columns);
        }
        return;
    }
    Exit<T> exit(sm, y);
    for (int i = cta() - p.streamers; i < p.rows * p.columns; i += p.others) {
        float d[128];
        Product<T, 128> product(d, ring);
        int left = cdiv(p.K, TILE_K);
        do product.template step<false, 4>(me.half);
        while (--left);
        for (int step = 0; step < TAIL; step++) product.template step<false, SIXTEENS>(me.half);
        product.finish();
        const Tile tile(i, p.rows, p.columns);
        exit.store(d, me, tile.row * TILE_M, tile.column * TILE_N, p.M, p.N, static_cast<const T*>(p.bias));
    }
    exit.finish(me);
}

#define KERNEL(NAME, T, RP)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                          \
        NAME##_r##RP(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,                        \
                     const __grid_constant__ TensorMap s, const __grid_constant__ TensorMap a,                        \
                     const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap y,                        \
                     const __grid_constant__ ForwardArgs p) {                                                         \
        forward<T, RP>(x, w, s, a, b, y, p);                                                                          \
    }
#define KERNELS(NAME, T) KERNEL(NAME, T, 16) KERNEL(NAME, T, 32) KERNEL(NAME, T, 64) KERNEL(NAME, T, 128)
KERNELS(forward_bf16, __nv_bfloat16)
KERNELS(forward_f16, __half)
