"""The weighted sum, compressed to the best approximation of lower rank (Eckart and Young 1936).

PEFT's `svd` without its defects: scales count once, and the decomposition never builds the weight.
Without a limit of rank the largest rank of the inputs is taken, layer by layer.
"""

from __future__ import annotations

from .method import Method, as_given

METHOD = Method(
    "svd",
    "Sum of the differences, compressed to the rank of the largest input.",
    shares=as_given,
    ratios=False,
)
