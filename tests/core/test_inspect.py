"""The shell command `inspect`, run as users run it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from difflora_core.__main__ import main
from difflora_core.header import LoraHeader
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
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("difflora_core.commands.inspect.open_lora", broken)
    assert main(["inspect", str(file), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "ZeroDivisionError: oops"
