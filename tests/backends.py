"""What can run an op where the tests run; names as in the tests' ids."""

from __future__ import annotations

import importlib.util
import platform

import torch

from pyvit.ops import _backends

INTERPRETED = "triton-interpreted"
EMULATED = "cuda-emulated"
ON_PROCESSOR = (INTERPRETED, EMULATED)  # GPU kernels without a GPU: a thousand times slower
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()
CAN_EMULATE = platform.system() == "Linux" and platform.machine() == "x86_64"
BACKENDS = ["cpu"]
if HAS_GPU:
    BACKENDS += ["triton", *([] if _backends.cuda_problem() else ["cuda"])]
else:
    BACKENDS += [*([INTERPRETED] if HAS_TRITON else []), *([EMULATED] if CAN_EMULATE else [])]
