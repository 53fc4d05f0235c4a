"""The exact weighted sum with all factors kept, rank sum r_i: PEFT's `cat`.

The same as `sum` without a limit of rank, and it refuses one.
"""

from __future__ import annotations

from .method import Method, as_given

METHOD = Method(
    "concat",
    "Exact sum with all ranks kept; the file grows with every LoRA.",
    shares=as_given,
    ratios=False,
)
