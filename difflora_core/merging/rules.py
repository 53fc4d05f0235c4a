"""How many singular values of each layer a result keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadConfig

_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class RankRule:
    """At most one of four limits; none of them keeps the result exact.

    rank: singular values per layer. energy: share of each layer's squared norm to keep, 0..1.
    error: largest relative error of each layer, 0..1. megabytes: size of all factors together,
    spent where it lowers the squared error most (see `ranks_within`).
    Raises BadConfig for more than one limit or an impossible one.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    megabytes: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise BadConfig(
                f"{' and '.join(given)} limit the rank at the same time.", hint="Give one of them."
            )
        if self.rank is not None and self.rank < 1:
            raise BadConfig(f"A rank of {self.rank} is impossible.", hint="Expected 1 or more.")
        if self.megabytes is not None and not 0 < self.megabytes < math.inf:
            raise BadConfig(f"A size of {self.megabytes} MB is impossible.")
        for name, lowest in (("energy", "above 0"), ("error", "0 or more")):
            value = getattr(self, name)
            if value is not None and not (0 < value <= 1 or (value == 0 and name == "error")):
                raise BadConfig(f"{name} {value} is impossible.", hint=f"Expected {lowest}, to 1.")

    @property
    def exact(self) -> bool:
        return all(value is None for value in vars(self).values())

    def choose(self, sigma: Tensor, norm: float) -> int:
        """Rank of one layer from its singular values (descending); not for `megabytes`.

        norm: Frobenius norm of the whole layer, which `sigma` may cover in part.
        """
        if self.exact:
            return len(sigma)
        if self.rank is not None:
            return min(self.rank, len(sigma))
        lost = self.error**2 if self.error is not None else 1.0 - (self.energy or 0.0)
        kept = sigma.double().square().cumsum(0)
        enough = (norm**2 - kept) <= lost * norm**2 + 1e-14 * norm**2
        first = int(enough.to(torch.uint8).argmax()) + 1 if bool(enough.any()) else len(sigma)
        return min(first, len(sigma))


def room(megabytes: float, least: int, bytes_per_value: int) -> int:
    """Values left of a size when every layer has rank 1, which takes `least` values in all.

    Raises BadConfig when that is too big already.
    """
    budget = int(megabytes * _MEGABYTE / bytes_per_value) - least
    if budget < 0:
        size = least * bytes_per_value / _MEGABYTE
        raise BadConfig(
            f"{megabytes:g} MB are too few: rank 1 in every layer takes {size:.2f} MB.",
            hint="Allow more, or keep fewer layers.",
        )
    return budget


def ranks_within(
    megabytes: float,
    spectra: Mapping[str, Tensor],
    widths: Mapping[str, int],
    bytes_per_value: int,
    others: int = 0,
) -> dict[str, int]:
    """Ranks that lower the summed squared error most within a size.

    spectra: singular values by layer, descending. widths: values that one rank of the layer costs
    (out + in); others: values beside the layers, which count, too. Taking singular values in the
    order of sigma^2 per value is optimal up to the last one taken, since they fall within each
    layer. Every layer keeps at least rank 1.
    Raises BadConfig when rank 1 everywhere is too big already.
    """
    budget = room(megabytes, sum(widths.values()) + others, bytes_per_value)
    ranks = dict.fromkeys(spectra, 1)
    offers = [
        (float(s) ** 2 / widths[name], name)
        for name, sigma in spectra.items()
        for s in sigma.tolist()[1:]
        if s > 0
    ]
    for _, name in sorted(offers, key=lambda offer: offer[0], reverse=True):
        if widths[name] > budget:
            break
        ranks[name] += 1
        budget -= widths[name]
    return ranks
