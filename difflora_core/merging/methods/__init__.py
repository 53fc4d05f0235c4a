"""The merging methods, one file each with its source."""

from __future__ import annotations

from . import (
    average,
    concat,
    core_space,
    dare,
    della,
    factor_average,
    iso_c,
    knots,
    slerp,
    sum,
    svd,
    ties,
    tsv,
)
from .method import Method

_MODULES = (
    average, sum, svd, concat, slerp, ties, dare, della, knots, core_space, tsv, iso_c,
    factor_average,
)  # fmt: skip
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES}
"""by name, in the order of menus"""
