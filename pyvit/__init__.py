"""pyvit: compute kernels for vision models under attack.

Unfold-based convolution, fused patch embedding and top-k sparse attention, each with its
gradients, as functions (``pyvit.conv2d``), layers (``pyvit.nn``), vision transformers
(``pyvit.models``) and attacks (``pyvit.attacks``).
"""

from pyvit import ops
from pyvit.ops import *  # noqa: F403 - pyvit.ops says in __all__ what is public

__version__ = "0.1.0"
__all__ = ["__version__", *ops.__all__]
