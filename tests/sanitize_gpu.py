"""Every op once by each kind of kernels, small, with its gradients: for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python sanitize_gpu.py

``make gpu`` runs it. Without torch's cache each tensor is an allocation of its own, and what lies
past its end is nobody's.
"""

from __future__ import annotations

import itertools
import sys

import torch
from gpu_calls import CALLS

import pyvit
from pyvit.ops import _backends


def main(device: str, names: list[str]) -> None:
    kinds = ["triton", *([] if _backends.cuda_problem() else ["cuda"])]
    for name, kind in itertools.product(names, kinds):
        with torch.device(device), pyvit.backend(kind):
            finite = all(bool(r.isfinite().all()) for r in CALLS[name](torch.bfloat16).results())
        print(f"{name}, {kind}: {'finite' if finite else 'NOT FINITE'}", flush=True)
        assert finite, name


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda", sys.argv[2:] or list(CALLS))
