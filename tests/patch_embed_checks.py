"""Arguments of patch_embed, and what its reference makes of them."""

from __future__ import annotations

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGES = [*FORMATS, "uint8"]

# batch, channels, height, width, embed dim, patch, stride
SHAPES = {
    "vit": (1, 3, 224, 224, 192, (16, 16), None),
    "wide": (1, 3, 48, 48, 300, (16, 16), None),
    "patch 14": (2, 3, 28, 42, 33, (14, 14), None),
    "grey digits": (3, 1, 8, 8, 64, (2, 2), None),
    "uncovered edge": (2, 3, 33, 30, 19, (4, 7), None),
    "one pixel": (3, 3, 1, 1, 5, (1, 1), None),
    "one patch": (2, 3, 9, 10, 17, (9, 10), None),
    "one patch, odd planes": (2, 8, 3, 3, 17, (3, 3), None),
    "overlapping": (2, 3, 30, 31, 17, (7, 7), (5, 3)),
    "gaps": (2, 2, 40, 23, 9, (3, 2), (4, 6)),
    "wide gaps": (1, 3, 40, 90, 9, (2, 2), (9, 70)),
    "half overlapping": (2, 9, 20, 21, 40, (4, 4), (6, 2)),
    "large patch": (1, 2, 6, 600, 33, (2, 300), (2, 100)),
    # Sums longer than one packed slice, in the result's own memory: over elements, then features
    # and patches.
    "large patches": (1, 3, 144, 144, 32, (24, 24), None),
    "many of all": (1, 3, 264, 264, 1056, (8, 8), None),
    "many patches": (4, 17, 114, 115, 66, (2, 2), None),  # a GPU's larger tiles
}
# Those that Triton's interpreter is quick enough for.
INTERPRETED_SHAPES = [
    *("patch 14", "grey digits", "uncovered edge", "one pixel", "one patch", "overlapping", "gaps"),
    *("one patch, odd planes", "wide gaps"),
]
NAMES = ("image", "weight", "bias", "pos_embed", "cls_token", "mean", "std")


def arguments_of(shape, dtype, image_kind="nchw", class_token=True):
    """Leaves for every gradient, in the order of NAMES; mean and std are float32 or float64."""
    batch, channels, height, width, dim, patch, stride = shape
    stride = stride or patch
    rows, columns = ((n - p) // s + 1 for n, p, s in zip((height, width), patch, stride))
    if image_kind == "uint8":
        image = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8)
    else:
        image = torch.rand(batch, channels, height, width).to(dtype)
        image = image.contiguous(memory_format=FORMATS[image_kind])
    weight = torch.randn(dim, channels, *patch) / (channels * patch[0] * patch[1]) ** 0.5
    of_pixels = torch.float64 if dtype is torch.float64 else torch.float32
    return [
        image,
        weight.to(dtype),
        torch.randn(dim).to(dtype),
        torch.randn(1, rows * columns + class_token, dim).to(dtype),
        torch.randn(1, 1, dim).to(dtype) if class_token else None,
        torch.rand(channels, dtype=of_pixels),
        torch.rand(channels, dtype=of_pixels) + 0.5,
    ]


def with_gradients(function, arguments, stride, grad=None, wanted=NAMES):
    """{"tokens": result, and the gradient of every floating argument in wanted}."""
    leaves = {}
    for name, value in zip(NAMES, arguments):
        if value is not None:
            value = value.detach().clone(memory_format=torch.preserve_format)
            value.requires_grad_(value.is_floating_point() and name in wanted)
        leaves[name] = value
    options = {name: value for name, value in leaves.items() if name not in NAMES[:3]}
    y = function(*[leaves[name] for name in NAMES[:3]], **options, stride=stride)
    results = {"tokens": y.detach()}
    with_grad = {n: v for n, v in leaves.items() if v is not None and v.requires_grad}
    if grad is not None and with_grad:
        gradients = torch.autograd.grad(y, list(with_grad.values()), grad)
        results |= dict(zip(with_grad, gradients))
    return results


def doubled(arguments):
    return [a.double() if a is not None and a.is_floating_point() else a for a in arguments]


def magnitudes(arguments):
    """Arguments whose every product is the absolute value of the one in `arguments`."""
    image, weight, bias, pos_embed, cls_token, mean, std = arguments
    image = image / 255 if image.dtype == torch.uint8 else image
    image = (image - mean.reshape(-1, 1, 1)).abs()
    others = [None if a is None else a.abs() for a in (weight, bias, pos_embed, cls_token)]
    return [image.double(), *others, torch.zeros_like(mean), std]
