"""Files: read with clear errors, written whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from difflora_core.errors import BadWeightsFile
from difflora_core.header import LoraHeader
from difflora_core.lora import Lora
from difflora_core.weights_file import (
    lora_from_state_dict,
    lora_to_kohya,
    open_lora,
    read_lora,
    read_safetensors,
    write_lora,
    write_safetensors,
)
from tests.core.lora_samples import attention_lora, random_lora

ROOT = Path(__file__).parent.parent.parent
HEADER = LoraHeader(title="somebody", base="mini", trigger="sks person", seed=7, strength=1.25)


def deltas_agree(one: Lora, other: Lora, tolerance: float = 1e-6) -> None:
    assert list(one.layers) == list(other.layers)
    for a, b in list(zip(one, other, strict=True))[:: len(one) // 50 or 1]:
        torch.testing.assert_close(a.delta(), b.delta(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("base", ["mini", "sd15", "sd21", "sdxl"])
def test_a_written_lora_reads_back_the_same(base: str, tmp_path: Path) -> None:
    lora = attention_lora(base, rank=2, scale=0.75)
    path = tmp_path / "a.safetensors"
    write_lora(lora, path, LoraHeader(title="x", base=base), dtype=torch.float32)
    reading = open_lora(path)
    assert reading.base == base
    assert reading.warnings == ()
    deltas_agree(reading.lora, lora)


def test_text_encoder_and_convolutions_too(tmp_path: Path) -> None:
    names = [
        "unet.conv_in",
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.down_blocks.0.downsamplers.0.conv",
        "unet.up_blocks.0.upsamplers.0.conv",
        "text_encoder.text_model.encoder.layers.2.mlp.fc1",
    ]
    lora = random_lora("mini", names)
    write_lora(lora, tmp_path / "a.safetensors", HEADER, dtype=torch.float32)
    deltas_agree(read_lora(tmp_path / "a.safetensors"), lora)


def test_the_header_says_where_the_file_is_from(tmp_path: Path) -> None:
    write_lora(attention_lora("mini"), tmp_path / "a.safetensors", HEADER)
    _, header = read_safetensors(tmp_path / "a.safetensors")
    assert header["modelspec.title"] == "somebody"
    assert header["modelspec.architecture"] == "difflora-mini-v1/lora"
    assert header["modelspec.trigger_phrase"] == "sks person"
    assert header["ss_base_model_version"] == "difflora_mini"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4")
    assert (header["difflora.seed"], header["difflora.strength"]) == ("7", "1.25")
    assert str(tmp_path) not in json.dumps(header)


def test_a_name_that_is_no_utf8_does_not_lose_the_file(tmp_path: Path) -> None:
    """As Python names a file from a disk with another encoding."""
    header = LoraHeader(title="caf\udce9", base="mini")
    write_lora(attention_lora("mini"), tmp_path / "a.safetensors", header)
    assert read_safetensors(tmp_path / "a.safetensors")[1]["modelspec.title"] == "caf?"


def test_stale_facts_and_paths_of_a_copied_header_are_left_out(tmp_path: Path) -> None:
    old = {"ss_network_dim": "32", "sshs_model_hash": "ab", "ot_config": '{"p": "/home/me/x"}'}
    write_lora(attention_lora("mini"), tmp_path / "a.safetensors", {**old, "ss_note": "kept"})
    _, header = read_safetensors(tmp_path / "a.safetensors")
    assert (header["ss_network_dim"], header["ss_note"]) == ("4", "kept")
    assert not {"sshs_model_hash", "ot_config"} & set(header)


def test_the_base_model_is_named_where_the_header_names_none(tmp_path: Path) -> None:
    write_lora(attention_lora("sdxl"), tmp_path / "a.safetensors", {"format": "pt"})
    _, header = read_safetensors(tmp_path / "a.safetensors")
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    own = {"ss_base_model_version": "sdxl_base_v0-9"}
    write_lora(attention_lora("sdxl"), tmp_path / "b.safetensors", own)
    _, header = read_safetensors(tmp_path / "b.safetensors")
    assert header["ss_base_model_version"] == "sdxl_base_v0-9"
    assert "modelspec.architecture" not in header


def test_the_hash_is_that_of_the_weights_alone(tmp_path: Path) -> None:
    lora = attention_lora("mini")
    hashes = []
    for title in ("one", "two"):
        path = tmp_path / f"{title}.safetensors"
        write_lora(lora, path, LoraHeader(title=title, base="mini"))
        hashes.append(read_safetensors(path)[1]["modelspec.hash_sha256"])
    assert hashes[0] == hashes[1]
    write_lora(lora.scaled(0.5), tmp_path / "three.safetensors", HEADER)
    assert read_safetensors(tmp_path / "three.safetensors")[1]["modelspec.hash_sha256"] != hashes[0]


def test_the_same_lora_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_lora(attention_lora("mini"), tmp_path / f"{name}.safetensors", HEADER)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.tensor(1.5).half()}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"note": "grüße"})
    for key, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, tensors[key])
    assert read_safetensors(tmp_path / "x.safetensors")[1] == {"note": "grüße"}


@pytest.mark.parametrize("scale", [0.0, -1.5])
def test_scales_that_programs_disagree_on_go_into_the_factor(scale: float) -> None:
    lora = attention_lora("mini", scale=scale)
    tensors = lora_to_kohya(lora)
    assert all(float(t) == 4.0 for key, t in tensors.items() if key.endswith(".alpha"))
    deltas_agree(lora_from_state_dict(tensors), lora)


def test_values_too_big_for_half_precision_are_refused(tmp_path: Path) -> None:
    lora = attention_lora("mini")
    layer = next(iter(lora))
    layer.up[0, 0] = 1e6
    with pytest.raises(BadWeightsFile, match="not finite in float16") as caught:
        write_lora(lora, tmp_path / "a.safetensors", HEADER)
    assert "fp32" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "says"), [("x" * 300, "too long"), ("a\0b", "no file name")])
def test_names_that_no_disk_takes_are_explained(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadWeightsFile, match=says):
        write_lora(attention_lora("mini"), tmp_path / f"{name}.safetensors", HEADER)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(attention_lora("mini"), path, HEADER)
    before = path.read_bytes()
    with pytest.raises(BadWeightsFile, match="exists already"):
        write_lora(attention_lora("mini", seed=1), path, HEADER)
    assert path.read_bytes() == before
    write_lora(attention_lora("mini", seed=1), path, HEADER, overwrite=True)
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_the_ending_is_checked(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a" / "b" / "x.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(BadWeightsFile, match=r"must end in \.safetensors"):
        write_safetensors(tmp_path / "x.ckpt", {"x": torch.ones(1)}, {})


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, existing: bool) -> None:
    """A process that may write 64 kB only fails in the middle of a file of 1 MB."""
    path = tmp_path / "a.safetensors"
    if existing:
        path.write_bytes(b"what was there before")
    code = (
        "import resource, sys, torch\n"
        "from difflora_core.errors import BadWeightsFile\n"
        "from difflora_core.weights_file import write_safetensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    write_safetensors(sys.argv[1], {'x': torch.zeros(2**18)}, {}, overwrite=True)\n"
        "except BadWeightsFile as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "a.safetensors could not be written: File too large." in done.stdout
    assert [p.read_bytes() for p in tmp_path.iterdir()] == (
        [b"what was there before"] if existing else []
    )


def test_an_error_while_renaming_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(BadWeightsFile, match="could not be written: Permission denied"):
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(1)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadWeightsFile, match="could not be written"):
        write_safetensors(tmp_path / "file" / "a.safetensors", {"x": torch.ones(1)}, {})


def _header_only(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


GOOD_ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "It is empty"),
        (b"1234", "download is incomplete"),
        (b"<!DOCTYPE html><html>Please log in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"PK\x03\x04archive/data.pkl and so on", "pickle"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00unet q", "pickle"),
        (b"\x10\x27\x00\x00\x00\x00\x00\x00{", "download is incomplete"),
        (_header_only('{"a": ' + GOOD_ENTRY + "}"), "truncated: 0 of 4 bytes"),
        (_header_only('{"a": ' + GOOD_ENTRY + ', "a": ' + GOOD_ENTRY + "}") + b"1234", "twice"),
        (_header_only('{"a": 1') + b"1234", "broken header"),
        (_header_only('["a"]   ') + b"1234", "broken header"),
        (_header_only('{"a": {"dtype": "F32"}}') + b"1234", "broken header"),
        (
            _header_only('{"a": ' + GOOD_ENTRY.replace("F32", "X9") + "}") + b"1234",
            "cannot be read",
        ),
    ],
)
def test_files_that_are_no_safetensors_are_told_apart(
    content: bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadWeightsFile) as caught:
        read_safetensors(path)
    assert says in str(caught.value)
    assert caught.value.message.startswith("a.safetensors ")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(attention_lora("mini"), path, HEADER)
    content = path.read_bytes()
    for length in (7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(BadWeightsFile):
            read_lora(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(BadWeightsFile, match="does not exist"):
        read_lora(tmp_path / "nothing.safetensors")
    with pytest.raises(BadWeightsFile, match="is a folder"):
        read_lora(tmp_path)


def test_header_values_need_not_be_json(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(lora_to_kohya(attention_lora("mini")), path, {"ss_network_args": "{broken"})
    assert read_lora(path).metadata == {"ss_network_args": "{broken"}


def test_alpha_of_peft_comes_from_the_configuration_beside_the_file(tmp_path: Path) -> None:
    lora = attention_lora("mini", scale=2.0)
    tensors = {}
    for layer in lora:
        name = f"base_model.model.{layer.name.removeprefix('unet.')}"
        tensors |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path)
    assert {layer.scale for layer in read_lora(path)} == {1.0}
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    assert {layer.scale for layer in read_lora(path)} == {2.0}
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(BadWeightsFile, match=r"adapter_config\.json cannot be read"):
        read_lora(path)
