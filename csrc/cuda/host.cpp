// The host's side: checks a call, makes the tensor maps, decides the grid and launches. A plain C interface; the driver
// is opened at run time, so that it builds and loads where there is neither a GPU nor libcuda.

#include <cuda.h>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include "plan.h"

#define EMBED(NAME, FILE)                                                                                             \
    asm(".pushsection .rodata\n.balign 64\n" NAME ":\n.incbin \"" FILE "\"\n.popsection\n");                          \
    extern "C" __attribute__((visibility("hidden"))) const char
EMBED("fastlora_forward_image", FORWARD_CUBIN) fastlora_forward_image[];
EMBED("fastlora_backward_image", BACKWARD_CUBIN) fastlora_backward_image[];

// What Python passes. Strides in elements; a unit stride where none is named. Scratch is whatever it was before.
struct ForwardCall {
    const void *x, *weight, *bias, *lora_A, *lora_B;  // (M, K), (N, K), (N,) or null, (R, K), (N, R)
    const int64_t* seed;                              // where threshold > 0
    void *y, *S;                                      // (M, N), (M, R)
    void *S_rows, *packed_A, *packed_B, *bits;        // scratch: (M, stride_s) where R % 8, (R, K), (N, stride_s), mask
    int32_t* flags;                                   // zero between launches
    int64_t stride_x, stride_w, stride_y, stride_ar, stride_ak, stride_bn, stride_br;
    int32_t M, N, K, R, is_half, adapters_float, threshold;
    float scaling;
    CUstream stream;
};

struct BackwardCall {
    // x (M, K) where dA is needed, weight (N, K) where dX is
    const void *dy, *x, *weight, *lora_A, *lora_B, *S;  // (M, N), ., ., (R, K), (N, R), (M, R)
    const int64_t* seed;
    void *dX, *dA, *dB;                                 // (M, K), (R, K), (N, R) or null where not needed
    void *dS_rows, *dS_columns, *S_columns;             // scratch: (M, stride_s), (R, stride_t) twice
    void *packed_A, *packed_B, *bits;                   // scratch: (R, K), (R, N), mask
    float* partials;                                    // scratch
    int32_t* flags;
    int64_t stride_dy, stride_x, stride_w, stride_dx, stride_ar, stride_ak, stride_bn, stride_br;
    int32_t M, N, K, R, is_half, adapters_float, threshold;
    float scaling;
    CUstream stream;
};

struct Sizes {
    int32_t stride_s, stride_t, flags;  // elements; words
    int32_t mask_rows, mask_stride;     // bytes
    int64_t partials;                   // floats
};

namespace {

// An H100 as the split sees it: microseconds on one of its SMs. With four that stream, a forward pass of 8192 x 4096 x
// 4096 in bfloat16 with dropout took 1049 µs, the product alone 351. Guesses that no GPU has run since.
constexpr double SM_FLOPS = 798e6 / 132;    // of the GEMM, operations per µs
constexpr double SM_BYTES = 40e3;           // that one SM streams while the others leave it bandwidth, per µs
constexpr double SM_DROPS = 10e3;           // elements that one SM drops as it streams them, per µs
constexpr double ALL_BYTES = 3.0e6;         // that all SMs stream together, per µs

enum Refusal { NO_DRIVER = -1, OLD_DRIVER = -2, RANK = -3, SIZE = -4, ALIGNMENT = -5, OVERLAP = -6, RESIDENT = -7 };
#define OF_DRIVER(F)                                                                                                  \
    F(cuTensorMapEncodeTiled) F(cuLaunchKernelEx) F(cuLibraryLoadData) F(cuLibraryGetKernel) F(cuKernelSetAttribute)  \
    F(cuOccupancyMaxActiveBlocksPerMultiprocessor) F(cuCtxGetDevice) F(cuDeviceGetAttribute) F(cuGetErrorString)
#define MEMBER(name) decltype(&::name) name;
#define FIND(name) if (!(d.name = reinterpret_cast<decltype(d.name)>(dlsym(library, #name)))) return OLD_DRIVER;
#define TRY(call) if (const int failed = (call)) return failed

struct Driver { OF_DRIVER(MEMBER) } driver;
struct Ready { CUfunction function; int sms; };
std::mutex mutex;

// The kernel on the current device, made ready the first time: its shared memory, and whether one fits each SM.
int ready(bool backward, bool is_half, int R, Ready& out) {
    static CUlibrary libraries[2];
    static std::map<std::pair<std::string, CUdevice>, Ready> known;
    if (!driver.cuLaunchKernelEx) return NO_DRIVER;
    CUdevice device;
    TRY(driver.cuCtxGetDevice(&device));
    const std::string name = std::string(backward ? "backward_" : "forward_") + (is_half ? "f16_r" : "bf16_r") +
                             std::to_string(padded_rank(R));
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({name, device});
    if (found != known.end()) return out = found->second, 0;
    CUlibrary& library = libraries[backward];
    const void* code = backward ? fastlora_backward_image : fastlora_forward_image;
    if (!library) TRY(driver.cuLibraryLoadData(&library, code, nullptr, nullptr, 0, nullptr, nullptr, 0));
    CUkernel kernel;
    TRY(driver.cuLibraryGetKernel(&kernel, library, name.c_str()));
    TRY(driver.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, SHARED_BYTES, kernel, device));
    out.function = reinterpret_cast<CUfunction>(kernel);
    TRY(driver.cuDeviceGetAttribute(&out.sms, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device));
    int blocks;
    TRY(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, out.function, THREADS, SHARED_BYTES));
    if (blocks < 1 || out.sms < 2) return RESIDENT;
    known[{name, device}] = out;
    return 0;
}

// (rows, columns) elements, moved in boxes of 64 x `wide` of which a row has 128 bytes or fewer.
int encode(CUtensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t stride, CUtensorMapDataType type,
           int wide = BOX) {
    const int size = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
    if (reinterpret_cast<uintptr_t>(data) % 16 || stride * size % 16) return ALIGNMENT;
    if (stride < columns) return OVERLAP;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t bytes[] = {static_cast<cuuint64_t>(stride) * size};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(wide), BOX}, steps[] = {1, 1};
    const auto swizzle = size == 1 ? CU_TENSOR_MAP_SWIZZLE_NONE
                         : wide == BOX ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    return driver.cuTensorMapEncodeTiled(&map, type, 2, const_cast<void*>(data), sizes, bytes, box, steps,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

int encode_mask(CUtensorMap& map, const void* bits, const void* otherwise, const Sizes& sizes) {
    const int width = bits ? sizes.mask_stride : PIECE, rows = bits ? sizes.mask_rows : 1;
    return encode(map, bits ? bits : otherwise, rows, width, width, CU_TENSOR_MAP_DATA_TYPE_UINT8, PIECE);
}

Flags flags_of(int32_t* words, int rows) {
    return {words, words + 1, words + 2, words + 2 + rows, words + 2 + 2 * rows};
}

CUtensorMapDataType type_of(bool is_half) {
    return is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

template <typename Call> int check(const Call& c) {
    if (c.R < 1 || c.R > MAX_RANK) return RANK;
    const int most = 1 << 30;
    if (c.M < 1 || c.N < 1 || c.K < 1 || c.M > most || c.N > most || c.K > most) return SIZE;
    if (static_cast<int64_t>(cdiv(c.M, TILE_M)) * (cdiv(c.N, TILE_N) + cdiv(c.K, TILE_N)) > most) return SIZE;
    if (static_cast<int64_t>(c.R) * (c.N > c.K ? c.N : c.K) > most) return SIZE;
    return c.N % 8 || c.K % 8 ? ALIGNMENT : 0;
}

// Cooperative: the driver starts all CTAs together or refuses.
int launch(const Ready& kernel, int grid, void** arguments, CUstream stream) {
    CUlaunchAttribute together = {};
    together.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    together.value.cooperative = 1;
    CUlaunchConfig config = {};
    config.gridDimX = grid, config.gridDimY = config.gridDimZ = 1;
    config.blockDimX = THREADS, config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = SHARED_BYTES;
    config.hStream = stream;
    config.attrs = &together, config.numAttrs = 1;
    return driver.cuLaunchKernelEx(&config, kernel.function, arguments, nullptr);
}

int smaller(int a, int b) { return a < b ? a : b; }
}  // namespace

extern "C" {

// Opens libcuda, by name or path. Errors are the driver's (positive) or ours (negative): fastlora_cuda_error tells.
int fastlora_cuda_open(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return NO_DRIVER;
    Driver d;
    OF_DRIVER(FIND)
    driver = d;
    return 0;
}

const char* fastlora_cuda_error(int code) {
    static const char* const ours[] = {
        "libcuda cannot be opened", "the driver is older than CUDA 12", "R is not from 1 to 128",
        "M, N or K is 0 or too large", "rows do not begin at multiples of 16 bytes", "rows overlap",
        "the kernel does not fit the GPU's multiprocessors"};
    if (code < 0) return ours[-1 - code];
    const char* text = nullptr;
    if (driver.cuGetErrorString) driver.cuGetErrorString(static_cast<CUresult>(code), &text);
    return text ? text : "unknown error";
}

// The time of a launch if `streamers` of `sms` CTAs stream: S, sums over L; a GEMM of `tiles` tiles, sums over `depth`;
// then `queue` bytes of work that whoever is free takes.
double fastlora_cuda_predicted_us(int streamers, int sms, int M, int L, int tiles, int depth, int mask, double queue) {
    const double row = 1.0 * TILE_M * L * (2 / SM_BYTES > mask / SM_DROPS ? 2 / SM_BYTES : mask / SM_DROPS);
    const double stream = cdiv(cdiv(M, TILE_M), streamers) * row;
    const double tile = 2.0 * TILE_M * TILE_N * depth / SM_FLOPS;
    const double gemm = tiles ? cdiv(tiles, sms - streamers) * tile : 0;
    const double last = tiles ? stream + tile / 2 : stream, both = gemm > last ? gemm : last;
    const double aside = streamers * (both - stream) * SM_BYTES;
    return both + (queue > aside ? (queue - aside) / ALL_BYTES : 0);
}

// How many CTAs stream: the fewest microseconds; of equals the most, which come first to their ends.
int fastlora_cuda_split(int sms, int M, int L, int tiles, int depth, int mask, double queue) {
    const int rows = cdiv(M, TILE_M);
    int best = 1;
    double least = fastlora_cuda_predicted_us(1, sms, M, L, tiles, depth, mask, queue);
    for (int s = 2; s <= rows && s < sms; s++) {
        const double us = fastlora_cuda_predicted_us(s, sms, M, L, tiles, depth, mask, queue);
        if (us <= least) best = s, least = us;
    }
    return best;
}

void fastlora_cuda_sizes(int M, int N, int K, int R, Sizes* out) {
    const int slabs = cdiv(N, TILE_N) + cdiv(K, TILE_N);
    out->stride_s = round_up(R, 8), out->stride_t = round_up(M, 8);
    out->flags = 2 + 2 * cdiv(M, TILE_M) + slabs;
    out->mask_rows = round_up(M, TILE_M), out->mask_stride = round_up(K, TILE_N) / 8;
    out->partials = static_cast<int64_t>(cdiv(M, part_rows(M, slabs))) * slabs * TILE_N * padded_rank(R);
}

int fastlora_cuda_forward(const ForwardCall* call) {
    const ForwardCall& c = *call;
    TRY(check(c));
    Ready kernel;
    TRY(ready(false, c.is_half, c.R, kernel));
    Sizes sizes;
    fastlora_cuda_sizes(c.M, c.N, c.K, c.R, &sizes);
    if (reinterpret_cast<uintptr_t>(c.bias) % 4) return ALIGNMENT;
    const int rows = cdiv(c.M, TILE_M), columns = cdiv(c.N, TILE_N), tiles = rows * columns;
    const int streamers = fastlora_cuda_split(kernel.sms, c.M, c.K, tiles, c.K, c.threshold > 0, 0);
    void* rows_of_S = c.R % 8 ? c.S_rows : c.S;
    const auto type = type_of(c.is_half);
    CUtensorMap x, w, s, a, b, y, mask;
    TRY(encode(x, c.x, c.M, c.K, c.stride_x, type));
    TRY(encode(w, c.weight, c.N, c.K, c.stride_w, type));
    TRY(encode(s, rows_of_S, c.M, c.R, sizes.stride_s, type));
    TRY(encode(a, c.packed_A, c.R, c.K, c.K, type));
    TRY(encode(b, c.packed_B, c.N, c.R, sizes.stride_s, type));
    TRY(encode(y, c.y, c.M, c.N, c.stride_y, type, CUT));
    TRY(encode_mask(mask, c.bits, c.packed_A, sizes));
    ForwardArgs p = {};
    p.adapters = {c.lora_A,    c.lora_B,    c.stride_ar,  c.stride_ak,      c.stride_bn,
                  c.stride_br, c.packed_A, c.packed_B, c.adapters_float};
    p.S = {rows_of_S, c.R % 8 ? c.S : nullptr, c.R, 1, sizes.stride_s, c.scaling};
    p.mask = {c.seed, static_cast<uint8_t*>(c.bits), sizes.mask_stride, static_cast<uint32_t>(c.threshold)};
    p.bias = c.bias, p.flags = flags_of(c.flags, rows);
    p.M = c.M, p.N = c.N, p.K = c.K, p.R = c.R, p.rows = rows, p.columns = columns;
    p.streamers = streamers, p.others = smaller(tiles, kernel.sms - streamers);
    void* arguments[] = {&x, &w, &s, &a, &b, &y, &mask, &p};
    return launch(kernel, streamers + p.others, arguments, c.stream);
}

int fastlora_cuda_backward(const BackwardCall* call) {
    const BackwardCall& c = *call;
    TRY(check(c));
    Ready kernel;
    TRY(ready(true, c.is_half, c.R, kernel));
    Sizes sizes;
    fastlora_cuda_sizes(c.M, c.N, c.K, c.R, &sizes);
    BackwardArgs p = {};
    const int slabs_A = cdiv(c.K, TILE_N), slabs_B = cdiv(c.N, TILE_N);
    p.rows = cdiv(c.M, TILE_M), p.columns = slabs_A, p.tiles = c.dX ? p.rows * p.columns : 0;
    p.sums = c.dX || c.dA, p.readers = slabs_A * ((c.dX != nullptr) + (c.dA != nullptr)) + (c.dB ? slabs_B : 0);
    p.part = part_rows(c.M, slabs_A + slabs_B), p.parts = cdiv(c.M, p.part);
    p.items_B = c.dB ? p.parts * slabs_B : 0, p.items = p.items_B + (c.dA ? p.parts * slabs_A : 0);
    const double queue = 2.0 * c.M * ((c.dA ? c.K : 0.0) + (c.dB ? c.N : 0.0));
    p.streamers = fastlora_cuda_split(kernel.sms, c.M, p.sums ? c.N : 1, p.tiles, c.N, false, queue);
    // what a launch does not use is mapped to something that is there
    const auto type = type_of(c.is_half);
    CUtensorMap dy, w, ds, a, b, x, s, dst, dx, mask;
    TRY(encode_mask(mask, c.bits, c.packed_A, sizes));
    TRY(encode(dy, c.dy, c.M, c.N, c.stride_dy, type));
    TRY(encode(w, c.dX ? c.weight : c.packed_A, c.dX ? c.N : c.R, c.K, c.dX ? c.stride_w : c.K, type));
    TRY(encode(ds, c.dS_rows, c.M, c.R, sizes.stride_s, type));
    TRY(encode(a, c.packed_A, c.R, c.K, c.K, type));
    TRY(encode(b, c.packed_B, c.R, c.N, c.N, type));
    TRY(encode(x, c.dA ? c.x : c.packed_A, c.dA ? c.M : c.R, c.K, c.dA ? c.stride_x : c.K, type));
    TRY(encode(s, c.S_columns, c.R, c.M, sizes.stride_t, type));
    TRY(encode(dst, c.dS_columns, c.R, c.M, sizes.stride_t, type));
    TRY(encode(dx, c.dX ? c.dX : c.packed_A, c.dX ? c.M : c.R, c.K, c.dX ? c.stride_dx : c.K, type, CUT));
    p.adapters = {c.lora_A,    c.lora_B,    c.stride_ar,  c.stride_ak,      c.stride_bn,
                  c.stride_br, c.packed_A, c.packed_B, c.adapters_float};
    p.dS = {c.dS_rows, c.dS_columns, 1, sizes.stride_t, sizes.stride_s, c.scaling};
    p.S = c.S, p.S_columns = c.S_columns, p.stride_t = sizes.stride_t;
    p.dA = c.dA, p.dB = c.dB, p.partials = c.partials, p.flags = flags_of(c.flags, p.rows);
    p.mask = {c.seed, static_cast<uint8_t*>(c.bits), sizes.mask_stride, static_cast<uint32_t>(c.threshold)};
    p.M = c.M, p.N = c.N, p.K = c.K, p.R = c.R;
    p.others = smaller(p.tiles > p.items ? p.tiles : p.items, kernel.sms - p.streamers);
    void* arguments[] = {&dy, &w, &ds, &a, &b, &x, &s, &dst, &dx, &mask, &p};
    return launch(kernel, p.streamers + p.others, arguments, c.stream);
}
}
