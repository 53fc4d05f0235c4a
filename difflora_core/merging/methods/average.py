"""The exact mean of the differences: SELMA's merge.

Li et al. 2024, "SELMA", section 3.4, as its released code means it (adapters with equal weights on
the layer's output): sum_i w_i B_i A_i with weights of sum 1. Independent of how the inputs were
factored and of their ranks; the exact result has rank sum r_i.
"""

from __future__ import annotations

from .method import Method, as_given

METHOD = Method(
    "average", "Exact mean of the differences; weights are ratios (SELMA).", shares=as_given
)
