"""What can run an op where the tests run; names as in the tests' ids."""

from __future__ import annotations

import importlib.util

import torch

INTERPRETED = "triton-interpreted"
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()
BACKENDS = ["cpu", *(["triton"] if HAS_GPU else [INTERPRETED] if HAS_TRITON else [])]
