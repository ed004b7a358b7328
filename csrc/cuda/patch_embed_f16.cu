#include "cuda/patch_embed_products.cuh"

namespace pyvit::cuda {

template void sum_tokens<Halves<float16>>(const TokenSums& call, void* stream);
template void sum_image<Halves<float16>>(const ImageSums& call, void* stream);
template void sum_weights<Halves<float16>>(const WeightSums& call, void* stream);

}  // namespace pyvit::cuda
