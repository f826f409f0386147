/* A driver without a GPU: what csrc/cuda/host.cpp asks of libcuda. Maps are kept as they were asked for, a launch calls
   back to Python. */

#include <cuda.h>
#include <string.h>

typedef int (*Launch)(const char *name, unsigned grid, unsigned threads, unsigned shared, int cooperative, void **arguments);
static Launch on_launch;
static int multiprocessors, blocks = 1;
static const char *reported = "no error";

void driver_set(Launch launch, int sms, int fitting) { on_launch = launch, multiprocessors = sms, blocks = fitting; }

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *data,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)promotion;
  if (rank != 2 || (unsigned long long)data % 16 || strides[0] % 16 || strides[0] >> 40 || !sizes[0] || !sizes[1] ||
      sizes[0] >> 32 || sizes[1] >> 32 || box[0] > 256 || box[1] > 256 || steps[0] != 1 || steps[1] != 1 ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
      (type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
       type != CU_TENSOR_MAP_DATA_TYPE_UINT8))
    return CUDA_ERROR_INVALID_VALUE;
  const cuuint64_t kept[] = {(cuuint64_t)data, sizes[0], sizes[1], strides[0], box[0], box[1], swizzle, type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2};
  memcpy(map, kept, sizeof kept);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  int cooperative = 0;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) cooperative = config->attrs[i].value.cooperative;
  if (extra || config->gridDimY * config->gridDimZ * config->blockDimY * config->blockDimZ != 1)
    return CUDA_ERROR_INVALID_VALUE;
  if (cooperative && (int)config->gridDimX > multiprocessors * blocks) return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
  return on_launch((const char *)function, config->gridDimX, config->blockDimX, config->sharedMemBytes, cooperative,
                   arguments);
}

CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *o, void **v, unsigned n,
                           CUlibraryOption *p, void **w, unsigned m) {
  (void)o, (void)v, (void)n, (void)p, (void)w, (void)m;
  *library = (CUlibrary)code;
  return CUDA_SUCCESS;
}

CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
  (void)library;
  *kernel = (CUkernel)strdup(name);
  return CUDA_SUCCESS;
}

CUresult cuKernelSetAttribute(CUfunction_attribute which, int value, CUkernel kernel, CUdevice device) {
  (void)kernel, (void)device;
  return which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value <= 227 << 10 ? CUDA_SUCCESS
                                                                                       : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *out, CUfunction function, int threads, size_t shared) {
  (void)function;
  *out = threads <= 1024 && shared <= 227 << 10 ? blocks : 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {  /* each number of multiprocessors is a device of its own */
  *device = multiprocessors + 1000 * blocks;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  (void)which, (void)device;
  *value = multiprocessors;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  (void)error;
  *text = reported;
  return CUDA_SUCCESS;
}
