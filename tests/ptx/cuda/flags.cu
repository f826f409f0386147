// What thread blocks may say to each other: small kernels for test_flags.py, each right, and one macro away from wrong.

#include <stdint.h>

#ifndef RELEASE
#define RELEASE "st.release.gpu.global.u32"
#endif
#ifndef ACQUIRE
#define ACQUIRE "ld.acquire.gpu.global.u32"
#endif
#ifndef FENCE
#define FENCE __threadfence()
#endif
#ifndef SYNC
#define SYNC __syncthreads()
#endif

__device__ uint32_t acquire(const uint32_t* p) {
    uint32_t v;
    asm volatile(ACQUIRE " %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Block 0 makes y = 2 x, the others z = y + 1 once its flag is up; n threads a block.
extern "C" __global__ void produce(const float* x, float* y, float* z, uint32_t* flag) {
    const int i = threadIdx.x;
    if (blockIdx.x == 0) {
        y[i] = 2 * x[i];
        SYNC;
        if (i == 0) asm volatile(RELEASE " [%0], %1;" ::"l"(flag), "r"(1) : "memory");
        return;
    }
    if (i == 0)
        while (acquire(flag) == 0) __nanosleep(64);
    SYNC;
    z[(blockIdx.x - 1) * blockDim.x + i] = y[(i + 37) % blockDim.x] + 1;
}

// The last block to count itself in adds up what all have left, in order.
extern "C" __global__ void last_adds(const float* x, float* partial, float* out, uint32_t* count) {
    __shared__ uint32_t ticket;
    if (threadIdx.x == 0) {
        float sum = 0;
        for (int i = 0; i < 8; i++) sum += x[blockIdx.x * 8 + i];
        partial[blockIdx.x] = sum;
        FENCE;
        ticket = atomicAdd(count, 1);
    }
    SYNC;
    if (ticket == gridDim.x - 1 && threadIdx.x == 0) {
        FENCE;
        float sum = 0;
        for (int i = 0; i < gridDim.x; i++) sum += partial[i];
        *out = sum;
        *count = 0;
    }
}

// All blocks wait for each other: right only while all are there at once.
extern "C" __global__ void meet(uint32_t* count, uint32_t* seen) {
    if (threadIdx.x == 0) {
        atomicAdd(count, 1);
        while (acquire(count) < gridDim.x) {}
        seen[blockIdx.x] = acquire(count);
    }
}

__device__ __noinline__ int twice(int n, int* where) {
    where[n & 3] = n;
    return 2 * n;
}

// A call that is not inlined, local memory with an index known late, an atomic of each kind in shared and global memory.
extern "C" __global__ void odds(int* out, int* total) {
    __shared__ int sum, most;
    if (threadIdx.x == 0) sum = 0, most = -1;
    __syncthreads();
    int local[4] = {7, 7, 7, 7};
    int n = twice(threadIdx.x, local);
    atomicAdd(&sum, n);
    atomicMax(&most, n);
    __syncthreads();
    out[threadIdx.x] = local[(threadIdx.x + out[threadIdx.x]) & 3];
    if (threadIdx.x == 0) {
        atomicAdd(total, sum);
        atomicExch(total + 1, most);
        atomicCAS(total + 2, 5, 6);
        atomicInc(reinterpret_cast<unsigned*>(total) + 3, 2);
    }
}
