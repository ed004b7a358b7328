"""Every op once, small, with its gradients: for compute-sanitizer (``make gpu`` runs it).

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python sanitize_gpu.py

Without torch's cache each tensor is an allocation of its own, and what lies past its end is
nobody's.
"""

from __future__ import annotations

import sys

import torch
from gpu_calls import CALLS


def main(device: str, names: list[str]) -> None:
    for name in names:
        with torch.device(device):
            finite = all(bool(r.isfinite().all()) for r in CALLS[name](torch.bfloat16).results())
        print(f"{name}: {'finite' if finite else 'NOT FINITE'}", flush=True)
        assert finite, name


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda", sys.argv[2:] or list(CALLS))
