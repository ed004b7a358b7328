// Which element type a call's dtype names.
#pragma once

#include <stdexcept>

#include "cuda/hardware.h"
#include "shapes.h"

namespace pyvit::cuda {

// f(T{}) with the type that `dtype` names.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bfloat16{});
    case DType::f16: return f(float16{});
    case DType::f64: throw std::runtime_error("pyvit: no CUDA kernel computes in float64");
  }
}

}  // namespace pyvit::cuda
