"""The launches that ``python -m pyvit tune`` would measure, for the gate:

    python benchmarks/aot.py --cases benchmarks/aot_tuning.py

A configuration must compile and fit the shared memory that there is. One that spills is told, not
failed: it is used where it was measured to be the fastest, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator

import aot
import cost
import torch
from aot_cases import Case

from pyvit.kernels import tune, tuning


def cases() -> Iterator[Case]:
    works: list[tune.Work] = []
    aot.launches(lambda: works.extend(tune.works(torch.device("meta"))), 90)  # none is made
    for name, kind, call in works:
        dtype = {"half": "bfloat16", "ieee": "float32"}.get(kind, kind)

        def offered(call=call):
            with tuning.trying({}) as asked:
                call()
                shipped = dict(asked)
            for policy, configuration in shipped.items():
                for candidate in tune.candidates(configuration):
                    with tuning.trying({policy: candidate}):
                        call()

        yield Case("tune", name, dtype, offered, cost.Cost(1.0, 1.0), measured=True)
