"""LoRA algebra: merging, resizing and comparing, from small matrices and with certificates.

Start with `merge(inputs, settings)`, where every input is a `MergeInput(lora, title, weight)`;
write the result with `write_lora(merged.lora, path, merge_header(inputs, merged, title))`.
"""

from .blocks import block_of
from .certificate import Certificate
from .comparison import Comparison, compare
from .engine import Merged, merge, resize
from .inputs import MergeInput, MergeSettings
from .methods import METHODS
from .pictures import heat_map, spectrum_picture
from .report import merge_header, summary
from .rules import RankRule
from .truncation import truncate_dense
from .weighting import WEIGHTINGS

__all__ = [
    "METHODS",
    "WEIGHTINGS",
    "Certificate",
    "Comparison",
    "MergeInput",
    "MergeSettings",
    "Merged",
    "RankRule",
    "block_of",
    "compare",
    "heat_map",
    "merge",
    "merge_header",
    "resize",
    "spectrum_picture",
    "summary",
    "truncate_dense",
]
