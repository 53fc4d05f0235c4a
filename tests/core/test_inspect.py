"""The shell command `inspect`, run as users run it."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from difflora_core.__main__ import main
from difflora_core.header import LoraHeader
from difflora_core.shell import check_free
from difflora_core.weights_file import write_lora
from tests.core.lora_samples import attention_lora


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "somebody.safetensors"
    write_lora(attention_lora("mini"), path, LoraHeader(title="somebody", base="mini"))
    return path


def test_json_report(file: Path, capsys) -> None:
    assert main(["inspect", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["base"], report["layout"], report["layers"]) == ("mini", "kohya", 56)
    assert report["ranks"] == {"4": 56}
    assert report["alphas"] == {"4": 56}
    assert report["dtype"] == {"float16": 56}
    assert report["header"]["modelspec.title"] == "somebody"
    assert report["warnings"] == []
    squares = sum(float(layer.delta().norm()) ** 2 for layer in attention_lora("mini"))
    total = math.sqrt(sum(norm**2 for norm in report["norms"].values()))
    assert total == pytest.approx(math.sqrt(squares), rel=1e-3)
    assert str(file.parent) not in json.dumps(report)


def test_report_for_people(file: Path, capsys) -> None:
    assert main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    assert "somebody.safetensors: a LoRA for mini, kohya spelling" in text
    assert "unet.mid_block" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "nothing.safetensors"], "does not exist"),
        (["inspect"], "required: file"),
        (["inspekt", "x"], "invalid choice"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_input_ends_with_2_and_a_sentence(arguments: list[str], says: str, capsys) -> None:
    assert main([*arguments, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert says in report["error"]
    assert set(report) == {"error", "hint"}
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


def test_an_error_of_ours_ends_with_1(file: Path, capsys, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("difflora_core.commands.inspect.open_lora", broken)
    assert main(["inspect", str(file), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "ZeroDivisionError: oops"


def test_offsets_and_other_models(tmp_path: Path, capsys) -> None:
    name = "transformer.single_transformer_blocks.3.attn.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, 64),
        f"{name}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(tensors, tmp_path / "flux.safetensors")
    assert main(["inspect", str(tmp_path / "flux.safetensors"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "Flux" in report["base"] and report["ranks"] == {"2": 1}
    assert list(report["norms"].values()) == [pytest.approx(128)]

    norm, lora = "unet.conv_norm_out.weight", attention_lora("mini")
    lora = replace(lora, offsets={norm: torch.full((64,), 0.5)})
    write_lora(lora, tmp_path / "offset.safetensors", {})
    assert main(["inspect", str(tmp_path / "offset.safetensors"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["offsets"] == {"count": 1, "norm": pytest.approx(4)}
    assert main(["inspect", str(tmp_path / "offset.safetensors")]) == 0
    assert "1 biases and weights of norms" in capsys.readouterr().out


def test_layers_that_change_nothing_are_counted(tmp_path: Path, capsys) -> None:
    lora = attention_lora("mini")
    first = next(iter(lora))
    still = {first.name: replace(first, up=torch.zeros_like(first.up))}
    write_lora(replace(lora, layers={**lora.layers, **still}), tmp_path / "a.safetensors", {})
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--json"]) == 0
    assert "1 of 56 layers change nothing." in json.loads(capsys.readouterr().out)["warnings"]


def test_titles_that_a_console_cannot_spell(tmp_path: Path, monkeypatch) -> None:
    """As on Windows, where piped text is in the code page of the country."""
    path = tmp_path / "a.safetensors"
    write_lora(attention_lora("mini"), path, LoraHeader(title="\u65e5\u672c", base="mini"))
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    assert main(["inspect", str(path)]) == 0
    console.flush()
    assert rb"\u65e5\u672c" in console.buffer.getvalue()  # type: ignore[attr-defined]


def test_folders_that_nobody_may_look_into(tmp_path: Path, monkeypatch, capsys) -> None:
    def locked(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.safetensors"
    write_lora(attention_lora("mini"), path, LoraHeader(title="a"))
    monkeypatch.setattr(Path, "open", locked)
    assert main(["inspect", str(path)]) == 2
    assert "a.safetensors could not be read: Permission denied." in capsys.readouterr().err
    monkeypatch.setattr(Path, "exists", locked)
    check_free(path.with_name("b.safetensors"), overwrite=False)
