#include "cuda/conv2d_product.cuh"

namespace pyvit::cuda {

template void sum_over_taps<Halves<float16>>(const TapSums&, void*);
template void sum_over_pixels<Halves<float16>>(const PixelSums&, void*);

}  // namespace pyvit::cuda
