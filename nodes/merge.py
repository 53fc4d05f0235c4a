"""LORA_MODELs -> one LORA_MODEL, a smaller one, or a picture of how alike they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from comfy_api.latest import io, ui
from torch import Tensor

from ..difflora_core.errors import BadConfig
from ..difflora_core.merge_options import blocks_for, weights_for
from ..difflora_core.merge_reports import (
    describe_compared,
    describe_merged,
    describe_resized,
    resize_header,
)
from ..difflora_core.merging import (
    METHODS,
    WEIGHTINGS,
    MergeInput,
    MergeSettings,
    RankRule,
    compare,
    heat_map,
    merge,
    merge_header,
    resize,
    spectrum_picture,
)
from . import host, lora_models, sockets
from .sockets import CATEGORY, advanced

EXACT = "exact"
SIZES = {
    EXACT: lambda _amount: RankRule(),
    "rank": lambda amount: RankRule(rank=round(amount)),
    "energy %": lambda amount: RankRule(energy=_share("An energy", amount, 0.1)),
    "error %": lambda amount: RankRule(error=_share("An error", amount, 0.0)),
    "megabytes": lambda amount: RankRule(megabytes=amount),
}
AS_GIVEN = 0


def _share(what: str, percent: float, least: float) -> float:
    """Percent, which is what the widget holds, as a share. Errors: BadConfig in percent."""
    if not least <= percent <= 100:
        raise BadConfig(
            f"{what} of {percent:g} % is impossible.", hint=f"Expected {least:g} to 100."
        )
    return percent / 100


def size_inputs(default: str, amount: float) -> list[io.Input]:
    """How big the result may be: three widgets that Merge and Resize share."""
    return [
        io.Combo.Input(
            "size",
            options=list(SIZES),
            default=default,
            tooltip="exact sets no limit; rank is the same for all layers; energy and error take "
            "the smallest rank of each layer that is good enough; megabytes spreads a file size "
            "over the layers.",
        ),
        io.Float.Input(
            "amount",
            default=amount,
            min=0.0,
            max=100_000.0,
            step=0.1,
            tooltip="What the size is: rank 16, energy 99 %, error 1 %, 30 megabytes. "
            "Not used for exact.",
        ),
        io.Combo.Input(
            "precision",
            options=list(lora_models.PRECISIONS),
            default="fp16",
            tooltip="fp16 is what everybody uses; fp32 keeps every digit.",
        ),
    ]


def rare_inputs() -> list[io.Input]:
    """What only some methods and few users need."""
    return [
        advanced(
            io.Float.Input(
                "density",
                default=0.5,
                min=0.01,
                max=1.0,
                step=0.01,
                optional=True,
                tooltip="Share of values kept by ties, dare, della, knots and core_space.",
            )
        ),
        advanced(
            io.Int.Input(
                "seed",
                default=0,
                min=0,
                max=2**53 - 1,
                control_after_generate=True,
                optional=True,
                tooltip="For the methods that draw at random, dare and della.",
            )
        ),
        advanced(
            io.String.Input(
                "blocks",
                default="",
                multiline=True,
                optional=True,
                tooltip="Factors per block, one line per LoRA (- for none), such as: "
                "unet.mid_block=0.5, text_encoder=0. Empty: none.",
            )
        ),
    ]


def method_tooltip() -> str:
    """What each method does, one line each."""
    lines = [f"{name}: {method.summary.rstrip('.')}." for name, method in METHODS.items()]
    return "\n".join(lines)


class MergeLoras(io.ComfyNode):
    """LORA_MODELs -> LORA_MODEL, report, picture of the spectra."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_MergeLoRAs",
            display_name="Merge LoRAs",
            category=CATEGORY,
            description="Makes one LoRA of several, of any ranks and trainers, and says what a "
            "limited size has lost. Up to sixteen go in.",
            inputs=[
                *sockets.lora_list_inputs(1, "A LoRA; all must be for one base model."),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="One weight per LoRA, such as 1, 0.5, -0.3. Empty: all alike.",
                ),
                io.Combo.Input(
                    "method", options=list(METHODS), default="average", tooltip=method_tooltip()
                ),
                *size_inputs(EXACT, 16),
                io.Combo.Input(
                    "weighting",
                    options=list(WEIGHTINGS),
                    default=WEIGHTINGS[0],
                    tooltip="given: the weights as they are. norm_matched: LoRAs of different "
                    "strength count alike. equal_energy: each keeps the same share of the result.",
                ),
                io.Float.Input(
                    "total",
                    default=AS_GIVEN,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Scale the weights to this sum; 0 leaves it to the method.",
                ),
                *rare_inputs(),
            ],
            outputs=[
                sockets.LoraModel.Output(
                    display_name="lora", tooltip='The result, for "Load LoRA Model" or Save LoRA.'
                ),
                io.String.Output(
                    display_name="report", tooltip="What went in, what was kept and what was lost."
                ),
                io.Image.Output(
                    display_name="spectrum", tooltip="How much each further rank would add."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        weights: str,
        method: str,
        size: str,
        amount: float,
        precision: str,
        weighting: str,
        total: float,
        density: float = 0.5,
        seed: int = 0,
        blocks: str = "",
        loras: Mapping[str, Any] | None = None,
        **single: Any,
    ) -> io.NodeOutput:
        inputs = merge_inputs(sockets.lora_list(loras, single), weights, blocks)
        rule, dtype = SIZES[size](amount), lora_models.PRECISIONS[precision]
        settings = MergeSettings(method, rule, weighting, total or None, density, seed, dtype)
        merged = merge(inputs, settings, host.progress(1))
        title = " + ".join(entry.title for entry in inputs)
        lora = host.LoraModel(merged.lora, merge_header(inputs, merged, title))
        report = describe_merged(lora_models.with_size(merged.report, lora), title)
        picture = host.to_images([np.asarray(spectrum_picture(merged))])
        return io.NodeOutput(lora, report, picture, ui=ui.PreviewImage(picture, cls=cls))


def merge_inputs(values: list[Mapping[str, Tensor]], weights: str, blocks: str) -> list[MergeInput]:
    """LORA_MODELs with what was typed for them."""
    loras = lora_models.opened(values)
    numbers = weights_for(len(loras), host.number_list(weights))
    factors = blocks_for(len(loras), blocks.strip().splitlines())
    titles = lora_models.titles(loras)
    return [MergeInput(*parts) for parts in zip(loras, titles, numbers, factors, strict=True)]


class CompareLoras(io.ComfyNode):
    """LORA_MODELs -> heat map, report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_CompareLoRAs",
            display_name="Compare LoRAs",
            category=CATEGORY,
            description="Shows block by block how alike LoRAs are: do they pull the same way, do "
            "they use the same directions, would they disturb each other in a merge?",
            is_output_node=True,
            inputs=sockets.lora_list_inputs(2, "A LoRA; all must be for one base model."),
            outputs=[
                io.Image.Output(
                    display_name="heat map", tooltip="Cosine and overlap of every pair and block."
                ),
                io.String.Output(display_name="report", tooltip="The same in numbers."),
            ],
        )

    @classmethod
    def execute(cls, loras: Mapping[str, Any] | None = None, **single: Any) -> io.NodeOutput:
        models = lora_models.opened(sockets.lora_list(loras, single))
        found = compare(models, lora_models.titles(models), host.progress(1))
        picture = host.to_images([np.asarray(heat_map(found))])
        report = describe_compared(found.report())
        return io.NodeOutput(picture, report, ui=ui.PreviewImage(picture, cls=cls))


class ResizeLora(io.ComfyNode):
    """LORA_MODEL -> LORA_MODEL, report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_ResizeLoRA",
            display_name="Resize LoRA",
            category=CATEGORY,
            description="Makes a LoRA smaller: the best one that there is at a rank, an energy, an "
            "error or a file size, and says what was lost.",
            inputs=[
                sockets.LoraModel.Input("lora", tooltip="The LoRA to make smaller."),
                *size_inputs("rank", 8),
            ],
            outputs=[
                sockets.LoraModel.Output(display_name="lora", tooltip="The smaller LoRA."),
                io.String.Output(display_name="report", tooltip="What was kept and what was lost."),
            ],
        )

    @classmethod
    def execute(
        cls, lora: Mapping[str, Tensor], size: str, amount: float, precision: str
    ) -> io.NodeOutput:
        (model,) = lora_models.opened([lora])
        rule, dtype = SIZES[size](amount), lora_models.PRECISIONS[precision]
        resized = resize(model, rule, dtype, host.progress(1))
        (title,) = lora_models.titles([model])
        result = host.LoraModel(resized.lora, resize_header(model.metadata, resized.report, title))
        return io.NodeOutput(
            result, describe_resized(lora_models.with_size(resized.report, result), title)
        )


NODES = [MergeLoras, CompareLoras, ResizeLora]
