// The CUDA runtime, as far as csrc/ uses it, on top of the stub driver: in front of the .cu sources compiled as C++, linked to
// libcuda.so.1. Devices, contexts and captures are the driver's; a launch is recorded there under its name and runs nothing.
#pragma once

#include "../cuda_on_cpu.h"

extern "C" {
int cuDevicePrimaryCtxRetain(void** context, int device);
int cuCtxGetCurrent(void** context);
int cuCtxSetCurrent(void* context);
int cuStreamIsCapturing(void* stream, int* status);
int cuModuleGetFunction(const void** function, const void* module, const char* name);
int cuLaunchKernel(const void* kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* stream, void**, void**);
}

namespace runtime_on_stub {

inline void* context() {
  void* current = nullptr;
  cuCtxGetCurrent(&current);
  return current;
}
inline void set_context(void* context) { cuCtxSetCurrent(context); }
inline cudaError_t set_device(int device) {
  void* context = nullptr;
  return cudaError_t(cuDevicePrimaryCtxRetain(&context, device) || cuCtxSetCurrent(context));
}
inline cudaError_t is_capturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  int found = 0;
  const int error = cuStreamIsCapturing(stream, &found);
  *status = cudaStreamCaptureStatus(found);
  return cudaError_t(error);
}
inline void launch(const char* name, unsigned blocks, unsigned threads, cudaStream_t stream) {
  const void* kernel = nullptr;
  cuModuleGetFunction(&kernel, nullptr, name);
  if (cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, nullptr, nullptr) != 0)
    throw std::runtime_error(std::string("stub driver: ") + name + ": refused");
}

}  // namespace runtime_on_stub

#define current_context runtime_on_stub::context
#define set_current_context runtime_on_stub::set_context
#define cudaSetDevice runtime_on_stub::set_device
#define cudaStreamIsCapturing runtime_on_stub::is_capturing
#undef FK_LAUNCH  // `name` is launch's own argument
#define FK_LAUNCH(kernel, blocks, threads, stream, arguments) ((void)(kernel), (void)(arguments), runtime_on_stub::launch(name, blocks, threads, stream))
