/* A GPU that computes nothing: the parts of the CUDA runtime, the driver and cuBLAS that torch and Triton call.

   Loaded before all other libraries (LD_PRELOAD) it stands in for libcudart, libcuda.so.1 and cuBLAS, so that a CUDA
   build of torch goes through all of its host code on a machine without a GPU. Device memory is host memory, copies of
   up to 64 MiB are real, kernels and products are only counted: every result is garbage. What a driver refuses (launches
   and tensor maps out of bounds, what may not be done while a graph is captured) is refused here too.

   Environment: HOLLOW_CAPABILITY (default 90), HOLLOW_MEMORY_GIB (default 80), HOLLOW_DRIVER (default: triton's headers').
   For ctypes: hollow_launches(), hollow_waits(), hollow_last_wait(), hollow_trace(of launches, of products). */

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

/* ---- the device ---- */

static int setting(const char *name, int otherwise) {
  const char *value = getenv(name);
  return value ? atoi(value) : otherwise;
}
static int capability_, memory_gib;
static void __attribute__((constructor)) read_settings(void) { /* once: the environment is slow to search */
  capability_ = setting("HOLLOW_CAPABILITY", 90), memory_gib = setting("HOLLOW_MEMORY_GIB", 80);
}
static int capability(void) { return capability_; }
static size_t total_memory(void) { return (size_t)memory_gib << 30; }

static int shared_of_multiprocessor(void) {
  switch (capability()) {
  case 75: return 64 << 10;
  case 80: return 164 << 10;
  case 86: case 89: case 120: return 100 << 10;
  default: return 228 << 10;
  }
}
static int shared_optin(void) { return shared_of_multiprocessor() - (capability() == 75 ? 0 : 1 << 10); }

static int attribute(int which) {
  switch (which) {
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 << 10;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return shared_optin();
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return shared_of_multiprocessor();
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return capability() == 80 ? 108 : capability() == 100 ? 148 : 132;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
  case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 50 << 20;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return capability() / 10;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return capability() % 10;
  case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
  case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
  case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: return 1;
  default: return 0;
  }
}

/* ---- what happened ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long launches, waits;
static const char *last_wait = "";

long hollow_launches(void) { return launches; }
long hollow_waits(void) { return waits; }
const char *hollow_last_wait(void) { return last_wait; }

/* What is handed to the driver and to cuBLAS, told to a test before it is counted. */
typedef void (*OfLaunches)(const CUlaunchConfig *, CUfunction, void **parameters);
typedef void (*OfProducts)(const char *name, int ta, int tb, int m, int n, int k, const void *a, int lda, const void *b,
                           int ldb, float beta, void *c, int ldc);
static OfLaunches of_launches;
static OfProducts of_products;
void hollow_trace(OfLaunches launches, OfProducts products) { of_launches = launches, of_products = products; }

static void waited(const char *what) {
  __atomic_add_fetch(&waits, 1, __ATOMIC_RELAXED);
  last_wait = what;
}

/* ---- streams, events, capture ---- */

typedef struct { long id; enum cudaStreamCaptureMode mode; CUstream origin; size_t nodes; int alive, spoilt; } Capture;
typedef struct { Capture *capture; unsigned flags; int priority; } Stream;
typedef struct { double milliseconds; Capture *capture; int recorded; } Event;

static Stream legacy = {0};
static Capture *capturing; /* the one that goes on, if any */
static long captures;
static __thread enum cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;
static __thread cudaError_t last_error = cudaSuccess;

static Stream *stream_of(void *handle) { return (size_t)handle <= 2 ? &legacy : (Stream *)handle; }
static Capture *capture_of(void *handle) {
  Capture *capture = stream_of(handle)->capture;
  return capture && capture->alive ? capture : NULL;
}
static cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
/* What the driver forbids between the begin and the end of a capture, unless the thread took it upon itself. */
static cudaError_t unsafe(void) {
  int forbidden = capturing && mode_of_thread != cudaStreamCaptureModeRelaxed &&
                  capturing->mode != cudaStreamCaptureModeRelaxed;
  if (forbidden) capturing->spoilt = 1;
  return forbidden ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
static cudaError_t counted(void *stream, dim3 grid, dim3 block, size_t shared) {
  size_t threads = (size_t)block.x * block.y * block.z;
  if (!threads || threads > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > 2147483647u ||
      grid.y > 65535 || grid.z > 65535 || shared > (size_t)shared_optin())
    return failed(cudaErrorInvalidConfiguration);
  __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
  Capture *capture = capture_of(stream);
  if (capture) capture->nodes++;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  Stream *made = calloc(1, sizeof *made);
  made->flags = flags, made->priority = priority;
  *stream = (cudaStream_t)made;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  waited("cudaStreamSynchronize");
  if (capture_of(stream)) capture_of(stream)->spoilt = 1;
  return capture_of(stream) ? failed(cudaErrorStreamCaptureUnsupported) : unsafe();
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return unsafe(); }
cudaError_t cudaDeviceSynchronize(void) { waited("cudaDeviceSynchronize"); return unsafe(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Event *waited_for = (Event *)event;
  if (!waited_for->capture || !waited_for->capture->alive) return cudaSuccess;
  if ((size_t)stream <= 1) { /* the default stream, which others wait for */
    waited_for->capture->spoilt = 1;
    return failed(cudaErrorStreamCaptureImplicit);
  }
  stream_of(stream)->capture = waited_for->capture;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  if (!capture_of(stream)) function(data);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = (cudaEvent_t)calloc(1, sizeof(Event));
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *(Event *)event = (Event){now.tv_sec * 1e3 + now.tv_nsec / 1e6, capture_of(stream), 1};
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
static cudaError_t asked(Event *event) {
  return event->capture && event->capture->alive ? failed(cudaErrorCapturedEvent) : unsafe();
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return asked((Event *)event); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { waited("cudaEventSynchronize"); return asked((Event *)event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  Event *first = (Event *)start, *last = (Event *)end;
  if (!first->recorded || !last->recorded) return failed(cudaErrorInvalidResourceHandle);
  *milliseconds = (float)(last->milliseconds - first->milliseconds);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = mode_of_thread;
  mode_of_thread = *mode, *mode = before;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if ((size_t)stream <= 1) return failed(cudaErrorStreamCaptureUnsupported);
  if (capturing) return failed(cudaErrorIllegalState);
  Capture *made = calloc(1, sizeof *made);
  *made = (Capture){++captures, mode, (CUstream)stream, 0, 1, 0};
  capturing = stream_of(stream)->capture = made;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  Capture *capture = capture_of(stream);
  if (!capture || capture->origin != (CUstream)stream) return failed(cudaErrorIllegalState);
  capture->alive = 0, capturing = NULL;
  *graph = capture->spoilt ? NULL : (cudaGraph_t)capture;
  return capture->spoilt ? failed(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                            cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                            const cudaGraphEdgeData **edges, size_t *count) {
  Capture *capture = capture_of(stream);
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = (cudaGraph_t)capture;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = ((Capture *)graph)->nodes;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  *made = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  __atomic_add_fetch(&launches, ((Capture *)graph)->nodes, __ATOMIC_RELAXED);
  return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t *made, void *p, cudaHostFn_t f, unsigned n, unsigned flags) {
  *made = (cudaUserObject_t)p;
  return cudaSuccess;
}

/* ---- memory: pages of the host that cost nothing until they are written ---- */

typedef struct Block { char *start; size_t size; int kind; struct Block *next; } Block; /* kind: cudaMemoryType */
static Block *blocks;
static size_t used;
static const size_t LARGE = 64 << 20; /* beyond it numbers are not moved: there are none */

static Block *block_of(const void *p) {
  Block *found;
  pthread_mutex_lock(&lock);
  for (found = blocks; found; found = found->next)
    if ((char *)p >= found->start && (char *)p < found->start + found->size) break;
  pthread_mutex_unlock(&lock);
  return found;
}
static int kind_of(const void *p) {
  Block *found = block_of(p);
  return found ? found->kind : cudaMemoryTypeUnregistered;
}
static void remember(void *start, size_t size, int kind) {
  Block *made = malloc(sizeof *made);
  pthread_mutex_lock(&lock);
  *made = (Block){start, size, kind, blocks};
  blocks = made;
  pthread_mutex_unlock(&lock);
}
static cudaError_t take(void **p, size_t size, int kind) {
  size_t rounded = (size + (2 << 20) - 1) & ~(size_t)((2 << 20) - 1);
  if (unsafe()) return last_error;
  *p = NULL;
  if (!size) return cudaSuccess;
  if (kind == cudaMemoryTypeDevice && used + rounded > total_memory()) return failed(cudaErrorMemoryAllocation);
  *p = mmap(NULL, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*p == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  if (kind == cudaMemoryTypeDevice) used += rounded;
  remember(*p, rounded, kind);
  return cudaSuccess;
}
static cudaError_t give_back(void *p, int map) {
  if (!p) return cudaSuccess;
  if (unsafe()) return last_error;
  pthread_mutex_lock(&lock);
  Block **at = &blocks, *found;
  while (*at && (*at)->start != (char *)p) at = &(*at)->next;
  found = *at;
  if (found) *at = found->next;
  pthread_mutex_unlock(&lock);
  if (!found) return failed(cudaErrorInvalidValue);
  if (found->kind == cudaMemoryTypeDevice) used -= found->size;
  if (map) munmap(found->start, found->size);
  free(found);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void **p, size_t size) { return take(p, size, cudaMemoryTypeDevice); }
cudaError_t cudaFree(void *p) { waited("cudaFree"); return give_back(p, 1); }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) { return take(p, size, cudaMemoryTypeHost); }
cudaError_t cudaFreeHost(void *p) { return give_back(p, 1); }
cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) {
  remember(p, size, cudaMemoryTypeHost);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *p) { return give_back(p, 0); }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = total_memory(), *unused = *total - used;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p) {
  memset(found, 0, sizeof *found);
  found->type = kind_of(p);
  if (found->type == cudaMemoryTypeDevice) found->devicePointer = (void *)p;
  if (found->type != cudaMemoryTypeDevice) found->hostPointer = (void *)p;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t s) {
  int pageable = kind_of(to) == cudaMemoryTypeUnregistered || kind_of(from) == cudaMemoryTypeUnregistered;
  if (pageable && size) waited("cudaMemcpyAsync of memory that is not pinned");
  Capture *capture = capture_of(s);
  if (capture) return capture->nodes++, pageable ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
  if (size <= LARGE) memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  waited("cudaMemcpy");
  if (unsafe()) return last_error;
  if (size <= LARGE) memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream) {
  Capture *capture = capture_of(stream);
  if (kind_of(p) != cudaMemoryTypeDevice) return failed(cudaErrorInvalidValue);
  __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
  if (capture) capture->nodes++;
  else if (size <= LARGE) memset(p, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int value, size_t size) { return cudaMemsetAsync(p, value, size, NULL); }

/* ---- the runtime ---- */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? failed(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDA_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "hollow GPU error" : "no error"; }
const char *cudaGetErrorString(cudaError_t error) {
  static __thread char text[64];
  switch ((int)error) {
  case cudaSuccess: return "no error";
  case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  case cudaErrorMemoryAllocation: return "out of memory";
  case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
  case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
  default: snprintf(text, sizeof text, "hollow GPU: error %d", (int)error); return text;
  }
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  *value = attribute(which); /* the numbers are the driver's */
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Hollow GPU sm_%d", capability());
  p->totalGlobalMem = total_memory();
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = shared_optin();
  p->sharedMemPerMultiprocessor = shared_of_multiprocessor(), p->reservedSharedMemPerBlock = 1 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = capability() / 10, p->minor = capability() % 10;
  p->multiProcessorCount = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  p->l2CacheSize = 50 << 20, p->memoryBusWidth = 5120, p->textureAlignment = 512, p->totalConstMem = 65536;
  p->concurrentKernels = p->unifiedAddressing = p->cooperativeLaunch = p->streamPrioritiesSupported = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
  snprintf(text, length, "0000:00:00.0");
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterFunction() {}
void __cudaRegisterVar() {}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid, configuration.block = block;
  configuration.shared = shared, configuration.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid, *block = configuration.block;
  *shared = configuration.shared, *(void **)stream = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *entry) {
  *kernel = (cudaKernel_t)entry;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
  return counted(s, grid, block, shared);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
  return counted(s, grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) {
  return counted(config->stream, config->gridDim, config->blockDim, config->dynamicSmemBytes);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *f) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 64;
  found->ptxVersion = found->binaryVersion = capability();
  found->maxDynamicSharedSizeBytes = 48 << 10;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *f, int threads,
                                                                          size_t shared, unsigned flags) {
  *count = threads > 0 ? 2048 / threads : 0;
  return cudaSuccess;
}

/* ---- the driver ---- */

CUresult cuDriverGetVersion(int *version) { *version = setting("HOLLOW_DRIVER", CUDA_VERSION); return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS ? "no error" : error == CUDA_ERROR_INVALID_VALUE ? "invalid argument"
          : cudaGetErrorString((cudaError_t)error);
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}
static int a_context;
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)&a_context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit which) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSynchronize(void) { waited("cuCtxSynchronize"); return (CUresult)unsafe(); }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return (CUresult)cudaStreamIsCapturing((cudaStream_t)stream, (enum cudaStreamCaptureStatus *)status);
}
CUresult cuStreamWriteValue64(CUstream stream, CUdeviceptr address, cuuint64_t value, unsigned flags) {
  if (capture_of((cudaStream_t)stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *(cuuint64_t *)address = value;
  return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) { return (CUresult)cudaStreamSynchronize((cudaStream_t)stream); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p) {
  if (which != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || kind_of((void *)p) == cudaMemoryTypeUnregistered)
    return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = p;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *which, void **values, CUdeviceptr p) {
  for (unsigned i = 0; i < n; i++)
    if (which[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
      *(CUdeviceptr *)values[i] = kind_of((void *)p) == cudaMemoryTypeUnregistered ? 0 : p;
    else if (which[i] == CU_POINTER_ATTRIBUTE_RANGE_SIZE)
      *(size_t *)values[i] = block_of((void *)p) ? block_of((void *)p)->size : 0;
    else
      return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}

typedef struct { int dynamic_shared; } Function;
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (unsafe()) return (CUresult)last_error;
  if (memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)calloc(1, sizeof(Function));
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned n, CUjit_option *o, void **values) {
  return cuModuleLoadData(m, image);
}
CUresult cuModuleLoad(CUmodule *module, const char *file) {
  return cuModuleLoadData(module, "\177ELF");
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Function *made = calloc(1, sizeof *made);
  made->dynamic_shared = 48 << 10;
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value < 0 || value > shared_optin()) return CUDA_ERROR_INVALID_VALUE;
    ((Function *)function)->dynamic_shared = value;
    return CUDA_SUCCESS;
  }
  return which < CU_FUNC_ATTRIBUTE_MAX ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                               unsigned bz, unsigned shared, CUstream stream, void **args, void **extra) {
  if (shared > (unsigned)((Function *)function)->dynamic_shared) return CUDA_ERROR_INVALID_VALUE;
  dim3 grid = {gx, gy, gz}, block = {bx, by, bz};
  return counted(stream, grid, block, shared) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                          unsigned by, unsigned bz, unsigned shared, CUstream stream, void **args) {
  return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, args, NULL);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **args, void **extra) {
  if (of_launches) of_launches(c, function, args);
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, args, extra);
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int threads, size_t s) {
  *count = threads > 0 ? 2048 / threads : 0;
  return CUDA_SUCCESS;
}
/* What the documentation of cuTensorMapEncodeTiled asks of its arguments. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                       const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  static const int bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned span[] = {1u << 30, 32, 64, 128, 128, 128, 128};
  if (capability() < 90 || rank < 1 || rank > 5 || (unsigned)type > 12 || (unsigned)swizzle > 6 || (size_t)map % 64 ||
      (size_t)address % 16 || kind_of(address) == cudaMemoryTypeUnregistered || box[0] * bytes_of[type] % 16 ||
      box[0] * bytes_of[type] > span[swizzle])
    return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < rank; i++)
    if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256 || !steps[i] || steps[i] > 8 ||
        (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)))
      return CUDA_ERROR_INVALID_VALUE;
  struct { /* all that was asked for, and a bit that Triton clears for small tensors of some drivers */
    cuuint64_t address, kinds, sizes[5], strides[4];
    cuuint32_t box[5], steps[5];
  } told = {(cuuint64_t)address, 1 << 21 | type | rank << 4 | swizzle << 8 | promotion << 12 | fill << 16 | interleave << 18};
  _Static_assert(sizeof told == sizeof *map, "a tensor map is full");
  for (unsigned i = 0; i < rank; i++) {
    told.sizes[i] = sizes[i], told.box[i] = box[i], told.steps[i] = steps[i];
    if (i + 1 < rank) told.strides[i] = strides[i];
  }
  memcpy(map, &told, sizeof told);
  return CUDA_SUCCESS;
}

static CUresult not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }
#define ABSENT(name) extern __typeof__(name) name __attribute__((alias("not_supported")));
ABSENT(cuTensorMapEncodeIm2col) ABSENT(cuLinkCreate_v2) ABSENT(cuLinkAddData_v2) ABSENT(cuLinkComplete)
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
  void *found = dlsym(RTLD_DEFAULT, name);
  *entry = found ? found : (void *)not_supported;
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

/* ---- cuBLAS: every product is one launch ---- */

#define MAKES(name) int name(void **made) { static long long a[64]; *made = a; return 0; }
#define PRODUCT(name) int name(void *handle) { dim3 one = {1, 1, 1}; return counted(of_cublas, one, one, 0); }
static __thread void *of_cublas; /* the stream that this thread last gave a handle */
int cublasSetStream_v2(void *handle, void *stream) { of_cublas = stream; return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130101; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *op, void *a, void *b, void *c, void *d, void *preference,
                                          int asked_for, void *results, int *count) {
  *count = 1; /* `results` is zero as torch hands it over: success, and no workspace */
  return 0;
}
MAKES(cublasCreate_v2) MAKES(cublasLtCreate) MAKES(cublasLtMatmulDescCreate) MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatrixLayoutCreate)
PRODUCT(cublasDgemm_v2) PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasDgemmStridedBatched) PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemv_v2) PRODUCT(cublasDgemv_v2) PRODUCT(cublasSdot_v2) PRODUCT(cublasDdot_v2) PRODUCT(cublasDotEx)
static int product(const char *name, int ta, int tb, int m, int n, int k, const void *a, int lda, const void *b, int ldb,
                   const float *beta, void *c, int ldc) {
  dim3 one = {1, 1, 1};
  if (of_products) of_products(name, ta, tb, m, n, k, a, lda, b, ldb, *beta, c, ldc);
  return counted(of_cublas, one, one, 0);
}
int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda, const float *b,
                   int ldb, const float *beta, float *c, int ldc) {
  return product("cublasSgemm_v2", ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc);
}
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int a_type, int lda,
                 const void *b, int b_type, int ldb, const void *beta, void *c, int c_type, int ldc, int compute, int how) {
  return product("cublasGemmEx", ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc);
}
int cublasLtMatmul(void *h, void *op, void *alpha, void *a, void *la, void *b, void *lb, void *beta, void *c,
                          void *lc, void *d, void *ld, void *algorithm, void *space, size_t size, void *stream) {
  dim3 one = {1, 1, 1};
  return counted(stream, one, one, 0);
}

/* ---- what only has to succeed ---- */

static int succeed() { return 0; }
#define SUCCEEDS(name) extern __typeof__(name) name __attribute__((alias("succeed")));
#define SUCCEEDS_UNDECLARED(name) extern int name() __attribute__((alias("succeed")));
SUCCEEDS(cudaStreamDestroy) SUCCEEDS(cudaGraphDestroy) SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cudaGraphRetainUserObject) SUCCEEDS(cudaUserObjectRelease) SUCCEEDS(cudaMemcpy2DAsync)
SUCCEEDS_UNDECLARED(cudaProfilerStart) SUCCEEDS_UNDECLARED(cudaProfilerStop)
SUCCEEDS(cudaFuncSetAttribute) SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent) SUCCEEDS(cuCtxSetLimit) SUCCEEDS(cuModuleUnload) SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS_UNDECLARED(cublasDestroy_v2) SUCCEEDS_UNDECLARED(cublasSetMathMode)
SUCCEEDS_UNDECLARED(cublasSetPointerMode_v2) SUCCEEDS_UNDECLARED(cublasSetWorkspace_v2)
SUCCEEDS_UNDECLARED(cublasSetSmCountTarget) SUCCEEDS_UNDECLARED(cublasLtMatmulDescDestroy)
SUCCEEDS_UNDECLARED(cublasLtMatmulDescSetAttribute) SUCCEEDS_UNDECLARED(cublasLtMatmulPreferenceDestroy)
SUCCEEDS_UNDECLARED(cublasLtMatmulPreferenceSetAttribute) SUCCEEDS_UNDECLARED(cublasLtMatrixLayoutDestroy)
SUCCEEDS_UNDECLARED(cublasLtMatrixLayoutSetAttribute)
