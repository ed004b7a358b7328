#include "cuda/conv2d_product.cuh"

namespace pyvit::cuda {

template void sum_over_taps<Fused>(const TapSums&, void*);
template void sum_over_pixels<Fused>(const PixelSums&, void*);
template void sum_over_taps<Tf32>(const TapSums&, void*);
template void sum_over_pixels<Tf32>(const PixelSums&, void*);

}  // namespace pyvit::cuda
