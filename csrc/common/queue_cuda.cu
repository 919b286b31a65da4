// What is asked of a CUDA queue before a launch.
#include "platform_cuda.cuh"

bool is_capturing(const Queue& queue) {
  const OnDevice guard(queue.device);  // the default stream is that of the current device
  cudaStreamCaptureStatus status;
  check_cuda("cudaStreamIsCapturing", cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(queue.stream), &status));
  return status != cudaStreamCaptureStatusNone;
}
