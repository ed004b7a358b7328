"""pyvit: compute kernels for vision models under attack.

Unfold-based convolution, fused patch embedding and top-k sparse attention, each with its
gradients, as functions (``pyvit.conv2d``), layers (``pyvit.nn``), vision transformers
(``pyvit.models``) and attacks (``pyvit.attacks``).
"""

from pyvit import attacks, models, nn, ops
from pyvit.nn import replace_layers, restore_layers
from pyvit.ops import *  # noqa: F403 - pyvit.ops says in __all__ what is public

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "attacks",
    "models",
    "nn",
    "replace_layers",
    "restore_layers",
    *ops.__all__,
]
