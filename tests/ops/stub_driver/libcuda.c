// A CUDA driver that records launches and runs nothing: what lies before a launch can be tried, and timed, where there is no GPU.
//
// Built and loaded by tests/ops/stub_driver/__init__.py. It reports two devices of compute capability 9.0, takes any module for
// good, and keeps name, grid, block, stream and device of every launch. It has what Triton's driver and launcher ask for, and
// runtime_on_stub.cpp, which stands for the CUDA runtime: the real one talks to the real driver by tables without a declaration.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
typedef int Result;
enum { kSuccess = 0, kInvalidValue = 1, kDevices = 2, kNames = 4096, kLaunches = 1 << 16 };

// ---- what is recorded ----

struct Kernel {
  char name[512];
  const void* module;
};
struct Launch {
  const struct Kernel* kernel;
  unsigned grid[3], block[3];
  uintptr_t stream;
  int device;
};
static struct Kernel kernels[kNames];
static int kernel_count;
static struct Launch launches[kLaunches];
static int launch_count;   // all since the last clear; the first kLaunches are kept
static uintptr_t capturing;  // the stream that counts as capturing; 0: none

static const void* kernel_named(const void* module, const char* name) {
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].module == module && strcmp(kernels[i].name, name) == 0) return &kernels[i];
  if (kernel_count == kNames) abort();
  struct Kernel* kernel = &kernels[kernel_count++];
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->module = module;
  return kernel;
}

// For the tests.
EXPORT int stub_launch_count(void) { return launch_count; }
EXPORT void stub_clear(void) { launch_count = 0; }
EXPORT void stub_capture(uintptr_t stream) { capturing = stream; }
EXPORT const char* stub_launch(int index, unsigned* numbers, uintptr_t* stream) {
  if (index >= launch_count || index >= kLaunches) return NULL;
  memcpy(numbers, launches[index].grid, sizeof(unsigned[6]));
  numbers[6] = (unsigned)launches[index].device;
  *stream = launches[index].stream;
  return launches[index].kernel->name;
}

// ---- devices and contexts ----

static char contexts[kDevices];  // a context is an address in here
static __thread void* current;

EXPORT Result cuInit(unsigned flags) { return flags ? kInvalidValue : kSuccess; }
EXPORT Result cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
EXPORT Result cuDeviceGetCount(int* count) { return *count = kDevices, kSuccess; }
EXPORT Result cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= kDevices) return 101;
  return *device = ordinal, kSuccess;
}
EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 1: return *value = 1024, kSuccess;     // threads per block
    case 2: case 3: return *value = 1024, kSuccess;
    case 4: return *value = 64, kSuccess;
    case 5: return *value = 2147483647, kSuccess;  // grid
    case 6: case 7: return *value = 65535, kSuccess;
    case 8: return *value = 49152, kSuccess;    // shared memory per block
    case 10: return *value = 32, kSuccess;      // warp
    case 12: case 82: return *value = 65536, kSuccess;  // registers
    case 13: return *value = 1700000, kSuccess;  // kHz
    case 16: return *value = 132, kSuccess;     // processors
    case 36: return *value = 2600000, kSuccess;
    case 37: return *value = 5120, kSuccess;
    case 39: return *value = 2048, kSuccess;    // threads per processor
    case 41: return *value = 1, kSuccess;       // unified addressing
    case 75: return *value = 9, kSuccess;       // compute capability
    case 76: return *value = 0, kSuccess;
    case 81: case 97: return *value = 232448, kSuccess;  // shared memory, opted in
    case 115: return *value = 1, kSuccess;      // memory pools
    default: return *value = 0, kSuccess;
  }
}
EXPORT Result cuDevicePrimaryCtxRetain(void** context, int device) {
  if (device < 0 || device >= kDevices) return 101;
  return *context = &contexts[device], kSuccess;
}
EXPORT Result cuCtxGetCurrent(void** context) { return *context = current, kSuccess; }
EXPORT Result cuCtxSetCurrent(void* context) { return current = context, kSuccess; }
EXPORT Result cuCtxGetDevice(int* device) {
  if (!current) return 201;
  return *device = (int)((char*)current - contexts), kSuccess;
}
EXPORT Result cuCtxGetLimit(size_t* value, int limit) { return (void)limit, *value = 1 << 20, kSuccess; }
EXPORT Result cuCtxSetLimit(int limit, size_t value) { return (void)limit, (void)value, kSuccess; }
EXPORT Result cuGetErrorString(Result error, const char** text) { return *text = error ? "an error of the stub driver" : "no error", kSuccess; }
EXPORT Result cuGetErrorName(Result error, const char** text) { return *text = error ? "STUB_ERROR" : "CUDA_SUCCESS", kSuccess; }

// ---- code ----

static Result new_module(const void** module) {
  static char modules[kNames];
  static int count;
  if (count == kNames) abort();
  return *module = &modules[count++], kSuccess;
}
EXPORT Result cuModuleLoadData(const void** module, const void* image) { return (void)image, new_module(module); }
EXPORT Result cuModuleUnload(const void* module) { return (void)module, kSuccess; }
EXPORT Result cuModuleGetFunction(const void** function, const void* module, const char* name) {
  return *function = kernel_named(module, name), kSuccess;
}
EXPORT Result cuFuncGetAttribute(int* value, int attribute, const void* function) {
  (void)function;
  return *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : attribute == 5 || attribute == 6 ? 90 : 0, kSuccess;
}
EXPORT Result cuFuncSetAttribute(const void* function, int attribute, int value) {
  return (void)function, (void)attribute, (void)value, kSuccess;
}
EXPORT Result cuFuncSetCacheConfig(const void* function, int config) { return (void)function, (void)config, kSuccess; }
EXPORT Result cuOccupancyMaxActiveClusters(int* clusters, const void* function, const void* config) {
  return (void)function, (void)config, *clusters = 1, kSuccess;
}
EXPORT Result cuTensorMapEncodeTiled(void) { return kSuccess; }
EXPORT Result cuTensorMapEncodeIm2col(void) { return kSuccess; }
EXPORT Result cuPointerGetAttribute(void* data, int attribute, unsigned long long pointer) {
  if (attribute == 3) *(unsigned long long*)data = pointer;  // the device's address of a pointer: the same
  return kSuccess;
}

// ---- launches ----

static Result record(const void* kernel, const unsigned* grid, const unsigned* block, void* stream) {
  if (!kernel || grid[0] * grid[1] * grid[2] == 0 || block[0] * block[1] * block[2] > 1024) return kInvalidValue;
  if (launch_count < kLaunches) {
    struct Launch* launch = &launches[launch_count];
    launch->kernel = kernel;
    memcpy(launch->grid, grid, sizeof launch->grid);
    memcpy(launch->block, block, sizeof launch->block);
    launch->stream = (uintptr_t)stream;
    launch->device = current ? (int)((char*)current - contexts) : -1;
  }
  ++launch_count;
  return kSuccess;
}
EXPORT Result cuLaunchKernel(const void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                             unsigned shared, void* stream, void** parameters, void** extra) {
  (void)shared, (void)parameters, (void)extra;
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  return record(kernel, grid, block, stream);
}
struct Config {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};
EXPORT Result cuLaunchKernelEx(const struct Config* config, const void* kernel, void** parameters, void** extra) {
  (void)parameters, (void)extra;
  return record(kernel, config->grid, config->block, config->stream);
}
EXPORT Result cuStreamIsCapturing(void* stream, int* status) {
  return *status = capturing && (uintptr_t)stream == capturing, kSuccess;
}
