// Where the kernels of csrc/cuda run: a GPU; or, in the tests' emulation, the host.
//
// They are ops of a library of their own, pyvit_cuda, with the schemas of pyvit's: pyvit/ops calls
// them where they are the backend that was chosen, with the tensors' device current.
#pragma once

#include "bindings/tensors.h"

#if defined(PYVIT_EMULATED)
#define PYVIT_CUDA_KEY CPU
#else
#define PYVIT_CUDA_KEY CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace pyvit {

// The cudaStream_t that torch is using on the tensor's device.
inline void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
#if !defined(PYVIT_EMULATED)
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
#else
  (void)tensor;
#endif
  return stream;
}

}  // namespace pyvit
