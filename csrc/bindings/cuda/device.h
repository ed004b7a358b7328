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
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
#else
  (void)tensor;
#endif
  return stream;
}

// Memory that a launch needs for itself, on the tensor's device; null where it needs none. torch
// gives it to nobody else before what was launched on the stream has run.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t bytes) {
    if (bytes > 0) memory_ = empty_of(like, {bytes}, ScalarType::Byte);
  }
  void* data() const { return memory_ ? memory_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

}  // namespace pyvit
