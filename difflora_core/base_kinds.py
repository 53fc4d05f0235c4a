"""Weight differences of adapters that are functions of the base weight, next to the plain kinds.

DoRA (Liu et al. 2024, arXiv 2402.09353), GLoRA (Chavan et al. 2023, arXiv 2306.07967), OFT (Qiu et
al. 2023, arXiv 2306.07280) as kohya, LyCORIS and PEFT write it, BOFT (Liu et al. 2023, arXiv
2311.06243) and IA3 (Liu et al. 2022, arXiv 2205.05638), each as its trainer's forward pass applies
it at full strength. All of them are computed in float64.

Letters: `o` out, `i` in, `n` blocks of size `b`, `s` stages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import einsum, rearrange
from torch import Tensor

from .errors import BadLoraFile
from .lora_families import family_of, parse_among
from .lora_kinds import Misfit, Parts, exact_pair
from .lora_scales import ConfiguredScales, scale_from_alpha, scale_of

NEUMANN_TERMS = 5
"""of PEFT's series for the Cayley transform, its default"""


def difference(
    tensors: Mapping[str, Tensor], weight: Tensor, config: Mapping | None = None
) -> Tensor:
    """What one module's tensors add to `weight` [o, i] or [o, i, kh, kw]: float32 of its shape.

    `tensors` by the ends of their keys, such as `lora_up.weight`, `hada_w1_a`, `dora_scale`; all
    kinds are taken, plain ones included. `config` is PEFT's `adapter_config.json`. Raises
    BadLoraFile for tensors that do not fit each other or the weight.
    """
    keys = {f"module.{suffix}": tensor for suffix, tensor in tensors.items()}
    parts = {}
    for key, tensor in keys.items():
        part = parse_among(key, keys)
        if part is None:
            raise BadLoraFile(f"{key.removeprefix('module.')} is no part of a known difference.")
        parts[part.role] = tensor
    return weight_difference("the module", parts, weight, ConfiguredScales({}, config))


def weight_difference(name: str, parts: Parts, weight: Tensor, scales: ConfiguredScales) -> Tensor:
    """As `difference`, of tensors by role (see `lora_families.Part`)."""
    base = weight.double()
    try:
        if not all(part.numel() for part in parts.values()):
            raise Misfit("an empty tensor")
        changed = _changed(name, parts, base, scales)
        if "dora_scale" in parts:
            changed = _with_magnitude(changed, parts["dora_scale"].double())
        elif "magnitude" in parts:  # PEFT's and ai-toolkit's
            changed = _with_magnitude(changed, parts["magnitude"].double().flatten())
        return (changed - base).float()
    except (ValueError, RuntimeError, IndexError) as error:  # of einops and torch
        shapes = ", ".join(f"{role} {list(part.shape)}" for role, part in parts.items())
        raise BadLoraFile(
            f"The tensors of {name} do not fit its weight {list(weight.shape)}: {shapes}.",
            hint="Is it a LoRA of this base model?",
        ) from error


def bias_difference(parts: Parts, bias: Tensor) -> Tensor | None:
    """What PEFT's IA3 adds to the bias of a module whose output it scales; None for all others."""
    if "ia3_l" not in parts or parts["ia3_l"].numel() != bias.numel():
        return None
    return (bias.double() * (parts["ia3_l"].double().flatten() - 1)).float()


def _changed(name: str, parts: Parts, weight: Tensor, scales: ConfiguredScales) -> Tensor:
    """The weight with the difference, before any magnitude."""
    family = next(iter(family_of(parts)), "")
    if family == "oft":
        return _turned(parts, weight, scales.otherwise)
    if family == "ia3":
        return _stretched(parts, weight)
    wide = {role: part.double() for role, part in parts.items()}
    shapes = {role: part.shape for role, part in parts.items()}
    scale = scale_of(name, family, shapes, parts, scales)
    if family == "glora":
        return weight + scale * _glora(wide, weight)
    pair = exact_pair(family, wide)
    return weight + scale * pair.matrix().reshape(weight.shape)


def _with_magnitude(changed: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: every row, or every input column, of V = W + delta gets the length `magnitude`.

    The position of the ones tells which: [o, 1, ...] and [o] are per row, [1, i, ...] per column.
    """
    out, inner = changed.shape[:2]
    shape = tuple(magnitude.shape)
    by_input = len(shape) > 1 and shape[:2] == (1, inner)
    if magnitude.numel() != (inner if by_input else out):
        raise Misfit(f"a magnitude of shape {shape}")
    axis = 1 if by_input else 0
    lengths = changed.transpose(0, axis).flatten(1).norm(dim=1)
    factor = magnitude.flatten() / lengths.where(lengths > 0, torch.ones_like(lengths))
    return changed * _along(factor, axis, changed.ndim)


def _along(values: Tensor, axis: int, dimensions: int) -> Tensor:
    """Values [k] to be multiplied along one axis."""
    return values.reshape([-1 if d == axis else 1 for d in range(dimensions)])


def _glora(parts: Parts, weight: Tensor) -> Tensor:
    """B1 B2 + W A1 A2; older files hold the factors the other way round."""
    a1, a2, b1, b2 = (parts[role].flatten(1) for role in ("a1", "a2", "b1", "b2"))
    out, inner = weight.shape[:2]
    if a1.shape[0] != inner or b1.shape[0] != out:
        a1, a2, b1, b2 = a2, a1, b2, b1
    turned = einsum(weight, a1, a2, "o i ..., i r, r j -> o j ...")
    return turned + (b1 @ b2).reshape(weight.shape)


def _stretched(parts: Parts, weight: Tensor) -> Tensor:
    """IA3: W times (1 + w) in LyCORIS, times l in PEFT, on the output axis or the input axis."""
    if "ia3_l" in parts:
        factor = parts["ia3_l"].double()
        axis = 0 if factor.numel() == weight.shape[0] and factor.shape[:1] != (1,) else 1
        if factor.ndim == 4 and factor.numel() == weight.shape[0]:
            axis = 0
    else:
        factor = 1 + parts["ia3_weight"].double()
        axis = int(bool(parts["on_input"]))
    if factor.numel() != weight.shape[axis]:
        raise Misfit(f"a factor of {factor.numel()} numbers")
    return weight * _along(factor.flatten(), axis, weight.ndim)


def _turned(parts: Parts, weight: Tensor, config: Mapping) -> Tensor:
    """OFT and BOFT: blocks of rows (PEFT: of inputs) are rotated."""
    if "oft_R" in parts:
        return _turned_inputs(parts["oft_R"].double(), weight, config)
    blocks = parts["oft_blocks"].double()
    skew = blocks - blocks.transpose(-1, -2)
    alpha = scale_from_alpha("the blocks", parts["alpha"], 1) if "alpha" in parts else 0.0
    limit, norm = alpha * weight.shape[0], float(skew.norm())
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    rotation = _cayley(skew)
    turned = _butterfly(rotation, weight) if blocks.ndim == 4 else _block_turned(rotation, weight)
    return turned * parts["rescale"].double() if "rescale" in parts else turned


def _cayley(skew: Tensor) -> Tensor:
    """(I + Q) (I - Q)^-1, a rotation for every skew Q [..., b, b]."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    return torch.linalg.solve(identity - skew, identity + skew, left=False)


def _block_turned(rotation: Tensor, weight: Tensor) -> Tensor:
    """R^T on every block of rows: rotation [n, b, b], weight [(n b), ...]."""
    rows = rearrange(weight, "(n b) ... -> n b ...", n=rotation.shape[0])
    turned = einsum(rotation, rows, "n b c, n b ... -> n c ...")
    return rearrange(turned, "n c ... -> (n c) ...")


def _butterfly(rotations: Tensor, weight: Tensor) -> Tensor:
    """BOFT: stage s turns rows that lie 2^s half blocks apart; rotations [s, n, b, b]."""
    half = rotations.shape[-1] // 2
    for stage, rotation in enumerate(rotations):
        k = 2**stage * half
        mixed = rearrange(weight, "(x g k) ... -> (x k g) ...", g=2, k=k)
        rows = rearrange(mixed, "(n b) ... -> n b ...", n=rotation.shape[0])
        turned = rearrange(
            einsum(rotation, rows, "n c b, n b ... -> n c ..."), "n c ... -> (n c) ..."
        )
        weight = rearrange(turned, "(x k g) ... -> (x g k) ...", g=2, k=k)
    return weight


def _turned_inputs(packed: Tensor, weight: Tensor, config: Mapping) -> Tensor:
    """PEFT: W R^T with one rotation per block of inputs; packed [n, b (b - 1) / 2]."""
    size = round((1 + (1 + 8 * packed.shape[1]) ** 0.5) / 2)
    rows, columns = torch.triu_indices(size, size, 1)
    skew = packed.new_zeros(packed.shape[0], size, size)
    skew[:, rows, columns] = packed
    skew = skew - skew.transpose(-1, -2)
    if config.get("use_cayley_neumann", True):
        rotation = _neumann(skew, int(config.get("num_cayley_neumann_terms", NEUMANN_TERMS)))
    else:
        rotation = _cayley(-skew)
    flat = rearrange(weight.flatten(1), "o (n b) -> o n b", b=size)
    if rotation.shape[0] == 1:  # one block shared by all
        rotation = rotation.expand(flat.shape[1], -1, -1)
    return einsum(flat, rotation, "o n b, n c b -> o n c").reshape(weight.shape)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """PEFT's series I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), as it is: 3 terms are 4 there."""
    rotation = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    power = rotation
    last = max(terms, 4) - 1 if terms > 2 else terms - 1
    for exponent in range(1, last + 1):
        power = power @ skew
        rotation = rotation + power * (1 if exponent == last > 1 else 2)
    return rotation
