// The patches that a convolution's forward pass reads, and its weight gradient again.
#pragma once

#include "conv2d.h"
#include "patches.h"

namespace pyvit {

template <class S>
PatchSource<S> forward_patches(const Conv2dShape& shape, View4 x) {
  PatchSource<S> source{static_cast<const S*>(x.data),
                        shape.in_channels / shape.groups,
                        shape.height,
                        shape.width,
                        {x.stride[0], x.stride[1], x.stride[2], x.stride[3]},
                        {shape.out_height, shape.out_width},
                        {shape.stride[0], shape.stride[1]},
                        {}};
  for (int axis = 0; axis < 2; ++axis)
    for (int64_t i = 0; i < shape.kernel[axis]; ++i)
      source.taps[axis].push_back({i, i * shape.dilation[axis] - shape.padding[axis]});
  return source;
}

}  // namespace pyvit
