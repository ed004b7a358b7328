"""pyvit: compute kernels for vision models under attack.

Unfold-based convolution, fused patch embedding and top-k sparse attention, each with its
gradients, as functions (``pyvit.conv2d``), layers (``pyvit.nn``), vision transformers
(``pyvit.models``) and attacks (``pyvit.attacks``).
"""

__version__ = "0.1.0"
