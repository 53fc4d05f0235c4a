"""The exact weighted sum of the differences: what applying all LoRAs one after another gives.

Weights are strengths, not ratios (Ilharco et al. 2023, "Editing models with task arithmetic").
"""

from __future__ import annotations

from .method import Method, as_given

METHOD = Method(
    "sum",
    "Exact sum of the differences; weights are true strengths.",
    shares=as_given,
    ratios=False,
)
