"""Merging LoRAs of SDXL's size against PEFT, randomised SVD and a dense SVD in float64.

Our side merges the whole set. A peer that decomposes dense weights would take up to half an hour
for it, so it does one layer of every shape, and its time counts once for every such layer. Both
sides take turns, and of each the quickest round counts.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from difflora_core.key_names import module_table
from difflora_core.lora import Lora, LoraLayer
from difflora_core.merging import MergeInput, MergeSettings, RankRule, merge, merge_header
from difflora_core.weights_file import TensorFile, open_lora, write_lora, write_safetensors

from .measuring import Case, case, in_own_process

RANK = 16
SETS = {"3xr16": (16,) * 3, "5xr32": (32,) * 5, "5xr128": (128,) * 5, "mixed": (4, 16, 64, 128)}
#: singular values of trained LoRAs fall about like this power of their number
DECAY = 1.0
ROUNDS, FILE_ROUNDS = 2, 5

Shape = tuple[int, int]


def run() -> list[Case]:
    return [in_own_process(partial(in_memory, size, name)) for size in (560, 700) for name in SETS]


def run_files() -> list[Case]:
    return [from_files(f"5xr{rank}", (rank,) * 5) for rank in (4, 16, 128)]


def layer_shapes(size: int) -> dict[str, Shape]:
    """SDXL's attention projections (560 layers), with the feed-forward layers 700."""
    table = module_table("sdxl").shapes
    names = [n for n in table if n.startswith("unet.") and ".attn" in n and ".to_" in n]
    if size == 700:
        names += [n for n in table if n.startswith("unet.") and ".ff.net." in n]
    assert len(names) == size
    return {name: (table[name][0], table[name][1]) for name in names}


def lora_layer(name: str, shape: Shape, rank: int, generator: torch.Generator) -> LoraLayer:
    """A fp16 layer with singular values like those of trained LoRAs, alpha = rank."""
    fall = torch.arange(1, rank + 1).float().pow(-DECAY / 2)
    up = torch.randn(shape[0], rank, generator=generator) * fall * 0.02
    down = torch.randn(rank, shape[1], generator=generator) * fall[:, None] * 0.02
    return LoraLayer(name, down.half(), up.half(), 1.0)


def lora_set(shapes: dict[str, Shape], ranks: Sequence[int]) -> list[Lora]:
    generator = torch.Generator().manual_seed(0)
    return [
        Lora({name: lora_layer(name, shape, rank, generator) for name, shape in shapes.items()})
        for rank in ranks
    ]


def in_memory(size: int, name: str) -> Case:
    """One set, the mean of all LoRAs at rank 16: seconds for everything, error of the worst shape.

    error: how much larger the relative error is than that of the best rank-16 approximation.
    """
    shapes, ranks = layer_shapes(size), SETS[name]
    loras = lora_set(shapes, ranks)
    inputs = [MergeInput(lora, str(i)) for i, lora in enumerate(loras)]
    settings = MergeSettings("average", RankRule(rank=RANK))
    examples = {shape: layer for layer, shape in shapes.items()}
    optimum = {shape: best_error(exact_mean(loras, name)) for shape, name in examples.items()}
    seconds: dict[str, list[float]] = {}
    results: dict[str, dict[Shape, Tensor]] = {}
    for _ in range(ROUNDS):
        merged = merge(inputs, settings)
        seconds.setdefault("ours", []).append(merged.report["seconds"])
        results["ours"] = {s: merged.lora.layers[n].delta() for s, n in examples.items()}
        for peer, compress in PEERS.items():
            took, results[peer] = timed_peer(compress, loras, examples, Counter(shapes.values()))
            seconds.setdefault(peer, []).append(took)
    errors = {side: excess(made, loras, examples, optimum) for side, made in results.items()}
    facts = {"error": errors.pop("ours"), "peer_error": errors, "layers": size}
    quickest = {side: min(rounds) for side, rounds in seconds.items()}
    return case(f"merge/sdxl-{size}/{name}/svd{RANK}", quickest) | facts


def timed_peer(
    compress: Callable[[Sequence[LoraLayer]], tuple[float, Tensor]],
    loras: Sequence[Lora],
    examples: dict[Shape, str],
    counts: Counter[Shape],
) -> tuple[float, dict[Shape, Tensor]]:
    """Seconds for all layers, from one of every shape, and what the peer made of those."""
    seconds, results = 0.0, {}
    for shape, name in examples.items():
        took, results[shape] = compress([lora.layers[name] for lora in loras])
        seconds += took * counts[shape]
    return seconds, results


def exact_mean(loras: Sequence[Lora], name: str) -> Tensor:
    """[out, in] float64."""
    layers = [lora.layers[name] for lora in loras]
    return torch.stack([x.up.double() @ x.down.double() * x.scale for x in layers]).mean(0)


def best_error(matrix: Tensor) -> float:
    """Relative error of the best rank-16 approximation."""
    sigma = torch.linalg.svdvals(matrix)
    return float(sigma[RANK:].norm() / sigma.norm())


def excess(
    results: dict[Shape, Tensor],
    loras: Sequence[Lora],
    examples: dict[Shape, str],
    optimum: dict[Shape, float],
) -> float:
    """Largest relative error above the optimum's."""
    exact = {shape: exact_mean(loras, name) for shape, name in examples.items()}
    errors = {
        s: float((r.double() - exact[s]).norm() / exact[s].norm()) for s, r in results.items()
    }
    return max(errors[shape] - optimum[shape] for shape in errors)


def dense_mean(layers: Sequence[LoraLayer]) -> Tensor:
    """As a peer builds it: one dense difference after the other, in float32."""
    total = torch.zeros(layers[0].weight_shape)
    for layer in layers:
        total += (layer.up.float() @ layer.down.float()) * (layer.scale / len(layers))
    return total


def dense_float64(layers: Sequence[LoraLayer]) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    u, sigma, vt = torch.linalg.svd(dense_mean(layers).double(), full_matrices=False)
    result = (u[:, :RANK] * sigma[:RANK]) @ vt[:RANK]
    return time.perf_counter() - begin, result


def svd_lowrank(layers: Sequence[LoraLayer]) -> tuple[float, Tensor]:
    """torch.svd_lowrank with the settings of the field: four columns more, two iterations."""
    dense_mean(layers)  # the first call of a shape warms up
    torch.manual_seed(0)
    begin = time.perf_counter()
    u, sigma, v = torch.svd_lowrank(dense_mean(layers), q=RANK + 4, niter=2)
    result = (u[:, :RANK] * sigma[:RANK]) @ v[:, :RANK].mT
    return time.perf_counter() - begin, result


def peft_svd(layers: Sequence[LoraLayer]) -> tuple[float, Tensor]:
    """PEFT's `add_weighted_adapter(combination_type="svd")` on one linear layer (alpha = rank)."""
    out, width = layers[0].weight_shape
    names = [str(i) for i in range(len(layers))]
    configs = [LoraConfig(r=x.rank, lora_alpha=x.rank, target_modules=["layer"]) for x in layers]
    holder: Any = nn.ModuleDict({"layer": nn.Linear(width, out, bias=False)})
    model: Any = get_peft_model(holder, configs[0], adapter_name="0")
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    tuned: Any = model.base_model.model["layer"]
    for name, layer in zip(names, layers, strict=True):
        tuned.lora_A[name].weight.data.copy_(layer.down)
        tuned.lora_B[name].weight.data.copy_(layer.up)
    begin = time.perf_counter()
    shares = [1 / len(names)] * len(names)
    model.add_weighted_adapter(names, shares, "all", combination_type="svd", svd_rank=RANK)
    seconds = time.perf_counter() - begin
    merged = tuned.lora_B["all"].weight.data @ tuned.lora_A["all"].weight.data
    return seconds, merged * tuned.scaling["all"]


PEERS = {"peft_svd": peft_svd, "svd_lowrank": svd_lowrank, "dense_float64": dense_float64}


def from_files(name: str, ranks: Sequence[int]) -> Case:
    """Files to file: the mean of five LoRAs at rank 16, beside merely reading and writing."""
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(partial(write_set, Path(folder), ranks))
        return in_own_process(partial(file_to_file, Path(folder), name, len(ranks)))


def write_set(folder: Path, ranks: Sequence[int]) -> Case:
    for i, lora in enumerate(lora_set(layer_shapes(560), ranks)):
        write_lora(lora, folder / f"{i}.safetensors", {})
    return {}


def file_to_file(folder: Path, name: str, count: int) -> Case:
    paths = [folder / f"{i}.safetensors" for i in range(count)]
    times: dict[str, list[float]] = {"ours": [], "read_write_floor": []}
    for number in range(FILE_ROUNDS + 1):
        for side, work in (("ours", merge_files), ("read_write_floor", read_and_write)):
            begin = time.perf_counter()
            work(paths, folder / "merged.safetensors")
            if number:
                times[side].append(time.perf_counter() - begin)
    seconds = {side: min(values) for side, values in times.items()}
    size = sum(path.stat().st_size for path in paths) / 1e6
    return case(f"merge/sdxl-560/{name}/file", seconds, input_mb=round(size))


def merge_files(paths: Sequence[Path], out: Path) -> None:
    inputs = [MergeInput(open_lora(path, lazy=True).lora, path.stem) for path in paths]
    settings = MergeSettings("average", RankRule(rank=RANK), dtype=torch.float16)
    merged = merge(inputs, settings)
    write_lora(merged.lora, out, merge_header(inputs, merged, "merged"), overwrite=True)


def read_and_write(paths: Sequence[Path], out: Path) -> None:
    """Read every byte of the inputs and write a file of the size of the result."""
    for path in paths:
        file = TensorFile(path)
        for key in file:
            file.tensor(key)
    table = layer_shapes(560).items()
    tensors = {name: torch.zeros(sum(shape) * RANK, dtype=torch.float16) for name, shape in table}
    write_safetensors(out, tensors, {}, overwrite=True)
