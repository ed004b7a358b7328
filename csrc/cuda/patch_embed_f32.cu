#include "cuda/patch_embed_products.cuh"

namespace pyvit::cuda {

template void sum_tokens<Tf32>(const TokenSums& call, void* stream);
template void sum_tokens<Fused>(const TokenSums& call, void* stream);
template void sum_image<Tf32>(const ImageSums& call, void* stream);
template void sum_image<Fused>(const ImageSums& call, void* stream);
template void sum_weights<Tf32>(const WeightSums& call, void* stream);
template void sum_weights<Fused>(const WeightSums& call, void* stream);

}  // namespace pyvit::cuda
