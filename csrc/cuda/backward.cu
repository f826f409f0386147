// dX = dY W + drop'(dS A), dA = dSᵀ drop(X), dB = dYᵀ S with dS = s · dY B, for sm_90a in one launch.
//
// The plan
//   CTAs 0 .. streamers - 1 sum dS [128, R] row block by row block, as the forward launch sums S. The others run a GEMM
//   for dX: N in steps of 64 over (dY, W), then the tail over (dS, A) once a row block's flag is set. Whoever is done,
//   streaming CTAs first, takes items from a queue: dB, then dA, in slabs of 256 columns of dY or x, by parts of its
//   rows; S and dS also lie by columns for it. Parts are summed in order by whoever finishes a slab's last: the
//   same sum whoever that is, and no float is added atomically.
//   The mask is made as forward; a row block's flag speaks for its bits too. dX's tail cannot share the accumulator
//   then: it is multiplied 64 columns at a time and added where the bits keep. In dA they drop what is in the stage.
//   Not needed: without dX there are no tiles, without dA or dB none of its items, without both dX and dA no dS.
//
// Why nothing waits for ever
//   As forward: the grid is resident; packing and mask wait for nothing, dS for packing, its flag for the mask, tiles
//   and items for flags. Streaming CTAs finish dS before they take an item, so an item waits only for what is running.
//   Counters end at 0: a flag's readers, the queue's takers (items + CTAs), a slab's parts.
//
// The floor and the model's prediction: H100, bf16, M = 8192, K = N = 4096, R = 16 (798 TFLOP/s, 3 TB/s).
// Never measured.
//   floor     275 GFLOP, 344 µs; 67 (dY) + 34 (W) + 67 (x) + 67 (dX) MB, 78 µs, lie beneath it
//   GEMM      8 waves of 65.8 k cycles; + 8 µs for what leaves, as forward
//   dS        4 SMs of 100 GB/s read 67 MB in 168 µs, 16 row blocks a wave; the GEMM wants 8
//   dB, dA    134 MB. The 4 SMs take 70 MB of it while the GEMM runs; the rest, 64 MB, costs all SMs 21 µs after it
//   partials  9 parts of 8192 x 16 float32 and back, 10 MB in L2, within that
//   the mask  28 µs beside the first wave; in dX's tail four waits and 128 additions of a thread, 1 k cycles a tile
//   in all    365 to 385 µs, with dropout 5 more
// Where to look if it misses: as forward; then the queue's 21 µs: one read of dY for dS and dB both would halve it.

#include "roles.cuh"

// One item of the queue: slab and part of dB (P = dY, Qᵀ = Sᵀ) or of dA (P = x, Qᵀ = dSᵀ).
struct Item {
    bool of_A;
    int slab, slabs, part, row, rows;  // rows row .. of P, `rows` of them in steps of 64

    DEVICE Item(int i, const BackwardArgs& p) {
        of_A = i >= p.items_B;
        if (of_A) i -= p.items_B;
        slabs = cdiv(of_A ? p.K : p.N, TILE_N);
        slab = i % slabs, part = i / slabs;
        row = part * p.part;
        rows = p.M - row < p.part ? p.M - row : p.part;
    }
};

// The producer's part of the queue. A stage: 64 rows of four boxes of P, and their R columns of Qᵀ.
template <int RP>
DEVICE void load_items(Ring& ring, const TensorMap& dy, const TensorMap& s, const TensorMap& x, const TensorMap& ds,
                       const TensorMap& mask, const BackwardArgs& p) {
    while (true) {
        const int taken = flag_count(p.flags.queue, 1), last = p.items + p.streamers + p.others - 1;
        if (taken == last) flag_count(p.flags.queue, -1 - last);
        if (taken >= p.items) break;
        const Item item(taken, p);
        for (int m = 0; m < item.rows; m += BOX) {
            const int row = item.row + m;
            if (row % TILE_M == 0) wait_row(row / TILE_M, p.flags);
            const bool bits = item.of_A && p.mask.threshold;
            ring.fill(4 + TAIL<RP>, bits ? 2 : 0, taken);
            for (int j = 0; j < 2 && bits; j++) ring.load_piece(j, mask, item.slab * TILE_N / 8 + PIECE * j, row);
            for (int j = 0; j < 4; j++) ring.load(j, item.of_A ? x : dy, item.slab * TILE_N + BOX * j, row);
            for (int j = 0; j < TAIL<RP>; j++) ring.load(4 + j, item.of_A ? ds : s, row, BOX * j);
            ring.next();
        }
    }
    ring.fill(0, 0, -1);
}

// What is done with the items: D [columns of P, R] = drop(P)ᵀ Q, 64 x R twice for each warp group.
template <typename T, int RP>
DEVICE void multiply_items(Ring& ring, const Consumer& me, const BackwardArgs& p) {
    Shared& sm = ring.sm;
    while (true) {
        ring.wait();
        if (sm.note[ring.stage] < 0) break;
        const Item item(sm.note[ring.stage], p);
        const bool drops = item.of_A && p.mask.threshold;
        float d[2][RP / 2];
        for (int m = 0; m < item.rows; m += BOX) {
            ring.wait();
            if (drops) {
                for (int j = 0; j < 2; j++)
                    drop_box(ring.box(2 * me.half + j), sm.kept[ring.stage][me.half], j, me.thread);
                fence_async_proxy();
                me.sync_half();
            }
            wgmma_fence();
            UNROLL for (int i = 0; i < 8; i++)
                wgmma<T, true, false>(d[i / 4], mn_major(ring.box(2 * me.half + i / 4)) + i % 4 * 128,
                                      k_major(ring.box(4)) + i % 4 * 2, m + i % 4);
            wgmma_commit();
            wgmma_wait<0>();
            settle(d[0]);
            settle(d[1]);
            ring.give_back(ring.stage);
            ring.next();
        }

        if (p.parts > 1) {  // each thread's sums where it finds them again; the last to come adds them in order
            const int number = (item.of_A ? cdiv(p.N, TILE_N) : 0) + item.slab;
            float* slab = p.partials + static_cast<int64_t>(number) * p.parts * (TILE_N * RP) + me.thread;
            float* mine = slab + static_cast<int64_t>(item.part) * (TILE_N * RP);
            UNROLL for (int i = 0; i < RP; i++) mine[256 * i] = d[i / (RP / 2)][i % (RP / 2)];
            me.sync_both();
            if (me.thread == 0) {
                sm.last = flag_add(&p.flags.done[number], 1) == p.parts - 1;
                if (sm.last) flag_count(&p.flags.done[number], -p.parts);
            }
            me.sync_both();
            if (!sm.last) continue;
            UNROLL for (int i = 0; i < RP; i++) d[i / (RP / 2)][i % (RP / 2)] = 0;
            for (int part = 0; part < p.parts; part++, slab += TILE_N * RP)
                UNROLL for (int i = 0; i < RP; i++) d[i / (RP / 2)][i % (RP / 2)] += slab[256 * i];
        }
        const float scale = drops ? keep_scale(p.mask.threshold) : 1.0f;
        const int64_t stride_c = item.of_A ? 1 : p.R, stride_r = item.of_A ? p.K : 1;
        UNROLL for (int rows = 0; rows < 4; rows++) {  // of D: columns of P
            const int c = item.slab * TILE_N + 128 * me.half + 64 * (rows / 2) + me.row + 8 * (rows % 2);
            if (c >= (item.of_A ? p.K : p.N)) continue;
            int64_t at = c * stride_c + me.column * stride_r;
            UNROLL for (int i = 0; i < RP / 4; at += (i % 2 ? 7 : 1) * stride_r, i++) {
                if (8 * (i / 2) + me.column + i % 2 >= p.R) continue;
                const float value = d[rows / 2][i / 2 * 4 + 2 * (rows % 2) + i % 2] * scale;
                void* out = item.of_A ? p.dA : p.dB;
                if (p.adapters.is_float) static_cast<float*>(out)[at] = value;
                else static_cast<T*>(out)[at] = T(value);
            }
        }
    }
}

// The tail where the mask drops: U = dS A, 64 columns at a time, added to D where kept.
template <typename T, int RP>
DEVICE void add_kept(float (&d)[128], Ring& ring, const Consumer& me, uint32_t threshold) {
    constexpr int EACH = SIXTEENS<RP>;
    Shared& sm = ring.sm;
    const int first = ring.stage, second = (ring.stage + 1) % STAGES;
    const float scale = keep_scale(threshold);
    for (int i = 0; i < 2; i++) {
        ring.wait();
        ring.next();
    }
    UNROLL for (int c = 0; c < TILE_N / BOX; c++) {
        float u[32];
        wgmma_fence();
#pragma unroll 1  // or the descriptors of all four pieces are kept in registers
        for (int k = 0; k < TAIL<RP> * EACH; k++) {
            const uint8_t* stage = sm.stages[k < EACH ? first : second];
            wgmma<T, false, true>(u, k_major(stage + me.half * BOX_BYTES) + k % EACH * 2,
                                  mn_major(stage + (2 + c) * BOX_BYTES) + k % EACH * 128, k);
        }
        wgmma_commit();
        wgmma_wait<0>();
        settle(u);
        UNROLL for (int h = 0; h < 2; h++) {
            const uint8_t* bits = &sm.kept[c < 2 ? first : second][me.half][me.row + 8 * h][8 * (c % 2)];
            const uint2 kept = *reinterpret_cast<const uint2*>(bits);
            const uint32_t low = kept.x >> me.column, high = kept.y >> me.column;
            UNROLL for (int j = 0; j < 8; j++)
                UNROLL for (int e = 0; e < 2; e++) {
                    const int i = 4 * j + 2 * h + e;
                    add_if((j < 4 ? low : high) & 1u << (8 * (j % 4) + e), d[32 * c + i], u[i], scale);
                }
        }
    }
    ring.give_back(first);
    ring.give_back(second);
}

DEVICE int first_tile(const BackwardArgs& p) {  // none for a CTA that streams
    const int id = cta() - p.streamers;
    return id < 0 ? p.tiles : id;
}

template <typename T, int RP>
DEVICE void backward(const TensorMap& dy, const TensorMap& w, const TensorMap& ds, const TensorMap& a,
                     const TensorMap& b, const TensorMap& x, const TensorMap& s, const TensorMap& ds_columns,
                     const TensorMap& dx, const TensorMap& mask, const BackwardArgs& p) {
    extern __shared__ __align__(1024) uint8_t raw[];
    Shared& sm = start(raw);
    Ring ring{sm};
    const bool streams = cta() < p.streamers, sums = streams && p.sums, masks = p.sums && p.mask.threshold;
    const int ctas = p.streamers + p.others;

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
        if (threadIdx.x >= 32 && masks) make_mask(p.mask, p.rows, ctas, p.flags.made);
        if (threadIdx.x) return;
        if (sums) {
            wait_packed(ctas, p.streamers, p.flags);
            for (int row = cta(); row < p.rows; row += p.streamers)
                load_sum<RP>(ring, dy, b, nullptr, row * TILE_M, p.N);
        }
        for (int i = first_tile(p); i < p.tiles; i += p.others)
            load_tile<RP, true>(ring, Tile(i, p.rows, p.columns), dy, w, ds, a, masks ? &mask : nullptr, p.N, p.flags);
        load_items<RP>(ring, dy, s, x, ds_columns, mask, p);
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
    const Consumer me;
    if (p.sums) pack_adapters<T>(me, p.adapters, p.N, p.K, p.R, 0, ctas, p.flags);
    for (int row = cta(); streams && row < p.rows; row += p.streamers) {
        if (p.sums) sum_rows<T, RP>(ring, me, p.dS, row * TILE_M, p.M, p.N, p.R, 0);
        const int m = row * TILE_M, high = p.M - m < TILE_M ? p.M - m : TILE_M;
        const T* S = static_cast<const T*>(p.S) + static_cast<int64_t>(m) * p.R;
        pack<T>(static_cast<T*>(p.S_columns) + m, p.stride_t, S, false, p.R, high, 1, p.R, me.thread, 256);
        me.sync_both();
        if (me.thread == 0) {
            if (masks) wait_mask(ctas, &p.flags.made[row]);  // so that the flag speaks for the mask too
            flag_set(&p.flags.rows[row], p.readers);
        }
    }
    Exit<T> exit{sm, dx};
    for (int i = first_tile(p); i < p.tiles; i += p.others) {
        float d[128];
        Product<T, 128> product{d, ring};
        product.template run<true>(cdiv(p.N, TILE_K), me.half);
        if (p.mask.threshold) {
            product.finish();
            add_kept<T, RP>(d, ring, me, p.mask.threshold);
        } else {
            for (int step = 0; step < TAIL<RP>; step++) product.template step<true, SIXTEENS<RP>>(me.half);
            product.finish();
        }
        const Tile tile(i, p.rows, p.columns);
        exit.store(d, me, tile.row * TILE_M, tile.column * TILE_N, p.M, p.K, nullptr);
    }
    multiply_items<T, RP>(ring, me, p);
    exit.finish(me);
}

#define KERNEL(NAME, T, RP)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                          \
        NAME##_r##RP(MAP dy, MAP w, MAP ds, MAP a, MAP b, MAP x, MAP s, MAP ds_columns, MAP dx,                       \
                     MAP mask, const __grid_constant__ BackwardArgs p) {                                              \
        backward<T, RP>(dy, w, ds, a, b, x, s, ds_columns, dx, mask, p);                                              \
    }
#define KERNELS(NAME, T) KERNEL(NAME, T, 16) KERNEL(NAME, T, 32) KERNEL(NAME, T, 64) KERNEL(NAME, T, 128)
KERNELS(backward_bf16, __nv_bfloat16)
KERNELS(backward_f16, __half)
