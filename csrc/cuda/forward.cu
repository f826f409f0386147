// Y = X Wᵀ + bias + s · drop(X) Aᵀ Bᵀ for sm_90a in one launch, and S = s · drop(X) Aᵀ for backward.
//
// The plan
//   CTAs 0 .. streamers - 1 stream x: each sums S [128, R] of every streamers-th row block, leaves it in global memory
//   and sets the row block's flag. The others run a persistent GEMM over tiles of 128 x 256: K in steps of 64 over
//   (X, W), then the tail over (S, B) in the same accumulator. One thread moves tiles by TMA through four stages of
//   48 KiB, two warp groups multiply 64 x 256 each, the result leaves by TMA in pieces of 64 x 32 while the next tile
//   runs. x is read once more than by a plain GEMM, by SMs that the GEMM has no use for: 1,024 tiles are eight waves on
//   128 SMs as on 132. With dropout the three warps beside each producer make the mask of all of x, a bit an element.
//
// Why nothing waits for ever
//   The grid is resident as a whole (checked at launch, cooperative). All CTAs pack a part of the adapters and make a
//   part of the mask, waiting for nothing; streaming CTAs wait for that, GEMM CTAs for the flags of streaming CTAs.
//   Within a CTA the producer waits for stages to be given back, which they are once multiplied, whatever comes next.
//   A row block's flag holds how many tiles have yet to see it. Each takes one away: the last leaves the 0 that the
//   next launch wants, so CUDA graphs replay. Two launches at a time need two sets of flags.
//
// The floor and the model's prediction: H100, bf16, M = 8192, K = N = 4096, R = 16 (798 TFLOP/s, 3 TB/s).
// Never measured.
//   floor    275 GFLOP / 798 TFLOP/s = 344 µs; 67 (x) + 34 (W) + 67 (y) MB / 3 TB/s = 56 µs lie beneath it
//   GEMM     8 waves of 65.8 k cycles, 43 µs: 64 steps of 1,024, a tail of 256
//   leaving  eight pieces of some 200 cycles in which no product runs: + 2.4 %, 8 µs, partly in a plain GEMM's time too
//   packing  0.3 MB by all CTAs while their first tiles come: 1 µs
//   the mask 4.2 M Philox calls by 396 warps, 28 µs in all; that of a row block 0.4 µs
//   S        4 SMs of 100 GB/s read 67 MB in 168 µs, 16 row blocks a wave; the GEMM wants 8. With dropout 21 integer
//            instructions for eight elements make it 86 GB/s
//   flags    long set but in the first wave, whose S is there after 11 of its 43 µs
//   in all   345 to 360 µs, with dropout 5 more
// Where to look if it misses: tensor pipe below 90 % in the K loop -> the ring (stages, the producer's rate); stalls at
//   full[] with L2 busy -> GROUP; on a row's flag -> SM_BYTES, SM_DROPS, the split; gaps between tiles -> Exit.

#include "roles.cuh"

template <typename T, int RP>
DEVICE void forward(const TensorMap& x, const TensorMap& w, const TensorMap& s, const TensorMap& a, const TensorMap& b,
                    const TensorMap& y, const TensorMap& mask, const ForwardArgs& p) {
    extern __shared__ __align__(1024) uint8_t raw[];
    Shared& sm = start(raw);
    Ring ring{sm};
    const bool streams = cta() < p.streamers;
    const int ctas = p.streamers + p.others;

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
        if (threadIdx.x >= 32 && p.mask.threshold) make_mask(p.mask, p.rows, ctas, p.flags.made);
        if (threadIdx.x) return;
        if (streams) {
            wait_packed(ctas, p.streamers, p.flags);
            for (int row = cta(); row < p.rows; row += p.streamers) {
                if (p.mask.threshold) {
                    wait_mask(ctas, &p.flags.made[row]);
                    fence_async_proxy();
                }
                load_sum<RP>(ring, x, a, p.mask.threshold ? &mask : nullptr, row * TILE_M, p.K);
            }
            return;
        }
        for (int i = cta() - p.streamers; i < p.rows * p.columns; i += p.others)
            load_tile<RP, false>(ring, Tile(i, p.rows, p.columns), x, w, s, b, nullptr, p.K, p.flags);
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
    const Consumer me;
    pack_adapters<T>(me, p.adapters, p.N, p.K, p.R, p.S.stride_s, ctas, p.flags);
    if (streams) {
        for (int row = cta(); row < p.rows; row += p.streamers) {
            sum_rows<T, RP>(ring, me, p.S, row * TILE_M, p.M, p.K, p.R, p.mask.threshold);
            me.sync_both();
            if (me.thread == 0) flag_set(&p.flags.rows[row], p.columns);
        }
        return;
    }
    Exit<T> exit{sm, y};
    for (int i = cta() - p.streamers; i < p.rows * p.columns; i += p.others) {
        float d[128];
        Product<T, 128> product{d, ring};
        product.template run<false>(cdiv(p.K, TILE_K), me.half);
        for (int step = 0; step < TAIL<RP>; step++) product.template step<false, SIXTEENS<RP>>(me.half);
        product.finish();
        const Tile tile(i, p.rows, p.columns);
        exit.store(d, me, tile.row * TILE_M, tile.column * TILE_N, p.M, p.N, static_cast<const T*>(p.bias));
    }
    exit.finish(me);
}

#define KERNEL(NAME, T, RP)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                          \
        NAME##_r##RP(MAP x, MAP w, MAP s, MAP a, MAP b, MAP y, MAP mask, const __grid_constant__ ForwardArgs p) {     \
        forward<T, RP>(x, w, s, a, b, y, mask, p);                                                                    \
    }
#define KERNELS(NAME, T) KERNEL(NAME, T, 16) KERNEL(NAME, T, 32) KERNEL(NAME, T, 64) KERNEL(NAME, T, 128)
KERNELS(forward_bf16, __nv_bfloat16)
KERNELS(forward_f16, __half)
