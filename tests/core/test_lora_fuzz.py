"""A thousand damaged files: a right result or one clear sentence, in no more memory than due."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from difflora_core.errors import DiffLoRAError
from difflora_core.lora_on_base import open_lora_needing_base
from difflora_core.weights_file import lora_to_kohya, open_lora
from tests.core.lora_samples import random_lora

ROOT = Path(__file__).parent.parent.parent
LAYERS = [
    "unet.conv_in",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.mid_block.resnets.0.conv1",
    "text_encoder.text_model.encoder.layers.2.mlp.fc1",
]
IN_ALL = ["unet.conv_in", "unet.mid_block.resnets.0.conv1", "unet.time_embedding.linear_1"]
FILES = 1000
Tensors = dict[str, torch.Tensor]


def good(generator: random.Random) -> Tensors:
    lora = random_lora("mini", LAYERS, rank=generator.choice([1, 2, 4]), scale=0.5)
    return lora_to_kohya(lora, generator.choice([torch.float16, torch.float32, torch.bfloat16]))


def with_header(content: bytes, change: Callable[[dict], None]) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def truncated(generator: random.Random) -> bytes:
    content = save(good(generator))
    return content[: generator.randrange(len(content))]


def flipped(generator: random.Random) -> bytes:
    content = bytearray(save(good(generator)))
    end = generator.choice([8, 400, len(content)])
    for _ in range(generator.randrange(1, 9)):
        content[generator.randrange(end)] = generator.randrange(256)
    return bytes(content)


def lying_header(generator: random.Random) -> bytes:
    def lie(header: dict) -> None:
        entry = header[generator.choice(sorted(header))]
        kind = generator.randrange(8)
        if kind == 0:
            entry["data_offsets"][1] += generator.choice([-4, 1, 4, 10 * 2**30])
        elif kind == 1:
            entry["data_offsets"] = generator.choice([[0, 10 * 2**30], [4, 0], [-4, 8], [0], "x"])
        elif kind == 2:
            entry["shape"] = generator.choice([[2**60, 2**60], [0, 2**62], [-1], [1.5], None, "4"])
        elif kind == 3:
            entry["dtype"] = generator.choice(["F99", "F64", "U8", None, 3, [], "BOOL"])
        elif kind == 4:
            entry["shape"] = list(reversed(entry["shape"])) + [1] * generator.randrange(20)
        elif kind == 5:
            header["__metadata__"] = generator.choice([{"a": 1}, [], "x", {"ss": "\ud800"}, None])
        elif kind == 6:
            other = header[generator.choice(sorted(header))]
            entry["data_offsets"] = other["data_offsets"]  # two tensors in one place
        else:
            header["x" * 1000] = {"dtype": "F32", "shape": [2560, 2**20], "data_offsets": [0, 0]}

    return with_header(save(good(generator)), lie)


def absurd(generator: random.Random) -> bytes:
    text = generator.choice([b"[" * 5000, b"{}", b"null", b"\xff\xfe", b'{"a": {}}', b"", b"[]"])
    length = generator.choice([len(text), 0, 10 * 2**30, 2**63, len(text) + 1])
    return struct.pack("<Q", length) + text + b"\0" * generator.randrange(64)


def odd_values(generator: random.Random) -> bytes:
    tensors = good(generator)
    key = generator.choice(sorted(tensors))
    value = generator.choice([torch.nan, torch.inf, -torch.inf, 0.0, -1.0])
    if tensors[key].ndim and generator.random() < 0.5:
        tensors[key].view(-1)[generator.randrange(tensors[key].numel())] = value
    else:
        tensors[key] = torch.full_like(tensors[key], value)
    return save(tensors)


def odd_shapes(generator: random.Random) -> bytes:
    tensors = good(generator)
    for _ in range(generator.randrange(1, 3)):
        key = generator.choice(sorted(tensors))
        tensor = tensors[key]
        change = generator.randrange(6)
        if change == 0:
            tensors[key] = tensor.flatten().clone()
        elif change == 1 and tensor.ndim:
            tensors[key] = tensor.transpose(0, -1).contiguous()
        elif change == 2 and tensor.ndim:
            tensors[key] = tensor[:0].clone()
        elif change == 3:
            tensors[key] = tensor[None].clone()
        elif change == 4:
            tensors[key] = tensor.to(torch.int32)
        else:
            tensors.pop(key)
    return save(tensors) if tensors else b""


def odd_names(generator: random.Random) -> bytes:
    tensors = good(generator)
    for key in generator.sample(sorted(tensors), generator.randrange(1, 6)):
        module, _, suffix = key.partition(".")
        new = generator.choice(
            [
                f"{module}.{suffix.replace('lora_', 'lokr_')}",
                f"{module}.hada_w1_a",
                f"{module}.diff",
                f"{module}.diff_b",
                f"{module}.dora_scale",
                f"lora_unet_output_blocks_4_1_proj_in.{suffix}",
                f"lora_unet_down_blocks_0_resnets_0_norm1.{suffix}",
                f"lora_unet_double_blocks_0_img_attn_qkv.{suffix}",
                f"{module.removeprefix('lora_unet_')}.{suffix}",
                f"unet.conv_in.{suffix}",
                f"lora_te2_text_model_encoder_layers_0_mlp_fc1.{suffix}",
                "",
                ".alpha",
                "<s1>",
            ]
        )
        tensors[new] = tensors.pop(key) if generator.random() < 0.7 else tensors[key].clone()
    return save(tensors)


def mixed_bases(generator: random.Random) -> bytes:
    base = generator.choice(["sd15", "sdxl", "sd21"])
    other = random_lora(base, generator.sample(IN_ALL, 2), rank=2)
    tensors = good(generator)
    tensors |= {key: t for key, t in lora_to_kohya(other).items() if generator.random() < 0.8}
    return save(tensors)


DAMAGES = [
    truncated, flipped, lying_header, absurd, odd_values, odd_shapes, odd_names, mixed_bases,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_give_a_right_result_or_one_sentence(
    damage: Callable[[random.Random], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    generator, read = random.Random(damage.__name__), 0
    for number in range(FILES // len(DAMAGES)):
        content = damage(generator)
        path.write_bytes(content)
        for any_model in (False, True):
            try:
                lora = open_lora(path, any_model=any_model).lora
            except DiffLoRAError as error:
                assert "\n" not in error.message, number
                assert error.message.endswith("."), error.message
                continue
            read += 1
            stored = load(content)  # what is accepted here, the format's own library reads, too
            for layer in lora:
                assert layer.outline.rank > 0
                assert layer.up.isfinite().all() and layer.down.isfinite().all()
                assert any(equal(layer.up, tensor) for tensor in stored.values()) or (
                    layer.rank >= min(layer.weight_shape[:2])  # a whole difference
                ), number
    hopeless = (truncated, absurd, mixed_bases)
    assert read or damage in hopeless, "nothing was read at all"


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def test_lazy_reading_finds_what_eager_reading_finds(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    generator = random.Random(0)
    for number in range(100):
        path.write_bytes(generator.choice(DAMAGES)(generator))
        outcomes = []
        for lazy in (False, True):
            try:
                lora = open_lora(path, lazy=lazy).lora
                outcomes.append([layer.outline for layer in lora])
            except DiffLoRAError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1], number


ON_BASE = [
    {"lora_down.weight": 2, "lora_up.weight": 2, "alpha": 0, "dora_scale": 2},
    {"oft_blocks": 3, "alpha": 0, "rescale": 2},
    {"oft_blocks": 4, "alpha": 0},
    {"oft_R.weight": 2},
    {"a1.weight": 2, "a2.weight": 2, "b1.weight": 2, "b2.weight": 2, "alpha": 0},
    {"ia3_l": 2},
    {"weight": 1, "on_input": 0},
    {"lokr_w1": 2, "lokr_w2_a": 2, "lokr_w2_b": 2, "lora_magnitude_vector": 1},
]
"""tensors of kinds on the base weight, with their usual number of dimensions"""


def test_kinds_on_the_base_weight_of_any_shape_end_in_a_difference_or_a_sentence(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    generator, weight = random.Random(0), torch.randn(64, 64)
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    changed = 0
    for _ in range(300):
        tensors = {}
        for suffix, dimensions in generator.choice(ON_BASE).items():
            dimensions = generator.choice([dimensions] * 6 + [0, 1, 2, 3])
            shape = [generator.choice([64, 64, 2, 4, 32, 1, 0, 3]) for _ in range(dimensions)]
            if generator.random() < 0.95:
                tensors[f"{module}.{suffix}"] = torch.ones(shape) * 0.1
        path.write_bytes(save(tensors or {"x": torch.ones(1)}))
        try:
            for delta in open_lora_needing_base(path).deltas.values():
                assert delta(weight).shape == weight.shape
                changed += 1
        except DiffLoRAError as error:
            assert "\n" not in error.message
            assert error.message.endswith(".")
    assert changed


MEASURE = """
import resource, sys
from difflora_core.errors import DiffLoRAError
from difflora_core.lora_on_base import open_lora_needing_base
from difflora_core.weights_file import open_lora

def grown(path, lazy):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for layer in open_lora(path, lazy=lazy).lora:
            pass
    except DiffLoRAError as error:
        pass
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

small, one, two, big = sys.argv[1:]
grown(small, False)  # whatever the first reading of any file loads
print(grown(one, False), grown(two, False), grown(big, True), grown(big, False))
"""
SLACK = 6 * 2**20


@pytest.mark.skipif(sys.platform == "win32", reason="measures with getrusage")
def test_memory_stays_below_twice_the_honest_size(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("small", "liar", "absurd", "big")]
    names = [f"unet.mid_block.attentions.0.transformer_blocks.{i}.ff.net.0.proj" for i in range(10)]
    content = save(lora_to_kohya(random_lora("sdxl", names, rank=64)))

    def lie(header: dict) -> None:
        for entry in header.values():
            entry["shape"] = [size * 300 for size in entry["shape"]]
            entry["data_offsets"][1] += 10 * 2**30

    files[0].write_bytes(save(lora_to_kohya(random_lora("mini", LAYERS))))
    files[1].write_bytes(with_header(content[: 2**20], lie))
    files[2].write_bytes(struct.pack("<Q", 10 * 2**30) + b"{}" * 100)
    files[3].write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    liar, absurd_file, lazy, eager = (int(number) for number in done.stdout.split())
    assert len(content) > 25 * 2**20
    assert max(liar, absurd_file) < SLACK
    assert lazy < 2 * len(content) / len(names) + SLACK  # one layer at a time, and the one before
    assert eager < 2 * len(content)
