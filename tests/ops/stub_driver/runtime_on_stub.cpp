// The CUDA runtime, as far as csrc/ uses it, on top of the stub driver, in place of what cuda_on_cpu.cpp has of it; linked to
// libcuda.so.1. Devices, contexts and captures are the driver's; a launch is recorded there under its name and runs nothing.
#include "../cuda_on_cpu.h"

extern "C" {
int cuDevicePrimaryCtxRetain(void** context, int device);
int cuCtxGetCurrent(void** context);
int cuCtxSetCurrent(void* context);
int cuStreamIsCapturing(void* stream, int* status);
int cuModuleGetFunction(const void** function, const void* module, const char* name);
int cuLaunchKernel(const void* kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* stream, void**, void**);
}

void* current_context() {
  void* current = nullptr;
  cuCtxGetCurrent(&current);
  return current;
}
void set_current_context(void* context) { cuCtxSetCurrent(context); }
cudaError_t cudaSetDevice(int device) {
  void* context = nullptr;
  return cudaError_t(cuDevicePrimaryCtxRetain(&context, device) || cuCtxSetCurrent(context));
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  int found = 0;
  const int error = cuStreamIsCapturing(stream, &found);
  *status = cudaStreamCaptureStatus(found);
  return cudaError_t(error);
}

void cuda_on_cpu::launch(const char* name, unsigned blocks, unsigned threads, cudaStream_t stream, const std::function<void()>&) {
  const void* kernel = nullptr;
  cuModuleGetFunction(&kernel, nullptr, name);
  if (cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, nullptr, nullptr) != 0)
    throw std::runtime_error(std::string("stub driver: ") + name + ": refused");
}
