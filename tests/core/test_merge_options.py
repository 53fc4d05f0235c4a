"""What people type to merge LoRAs, and what the shell shows while it works."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from difflora_core.errors import BadConfig, BadLoraFile, BadWeightsFile
from difflora_core.merge_options import (
    blocks_for,
    distinct,
    parse_blocks,
    parse_sweep,
    weights_for,
)
from difflora_core.shell import check_free, naming, progress_line

MID, TEXT = "unet.mid_block", "text_encoder"


@pytest.mark.parametrize(
    "text",
    [f"{MID}=0.5, {TEXT}=0", f"{MID} = 0.5\n{TEXT}=0\n", f'{{"{MID}": 0.5, "{TEXT}": 0}}'],
)
def test_block_factors_are_read(text: str) -> None:
    assert parse_blocks(text) == {MID: 0.5, TEXT: 0.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MID, "is no factor of a block"),
        (f"{MID}=much", "factor of unet.mid_block is no number: 'much'"),
        (f"{MID}=nan", "is no number"),
        (f"{MID}=1, {MID}=2", "named twice"),
        ('{"a": ', "no JSON object"),
        ('{"a": {"b": 1}}', "factor of a is no number"),
    ],
)
def test_wrong_block_factors_are_explained(text: str, says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        parse_blocks(text)


def test_block_factors_go_to_their_lora() -> None:
    assert blocks_for(2, ["-", f"{MID}=2"]) == [{}, {MID: 2.0}]
    assert blocks_for(2, []) == [{}, {}]
    with pytest.raises(BadConfig, match="for 1 of 2 LoRAs"):
        blocks_for(2, [f"{MID}=2"])


def test_weights_are_one_per_lora() -> None:
    assert weights_for(3, []) == [1.0, 1.0, 1.0]
    assert weights_for(2, [0.5, -1]) == [0.5, -1.0]
    with pytest.raises(BadConfig, match="3 weights were given for 2 LoRAs"):
        weights_for(2, [1, 2, 3])
    with pytest.raises(BadConfig, match="weight of LoRA 2 is no number: inf"):
        weights_for(2, [1, float("inf")])


def test_sweep_has_both_ends() -> None:
    assert parse_sweep("0.5:1.5:5") == pytest.approx([0.5, 0.75, 1.0, 1.25, 1.5])


@pytest.mark.parametrize(
    "text", ["1", "0.5:1.5", "a:b:c", "1:1:3", "2:1:3", "0:1:1", "0:1:999", "-inf:1:3"]
)
def test_impossible_sweeps_are_explained(text: str) -> None:
    with pytest.raises(BadConfig, match="is no sweep"):
        parse_sweep(text)


def test_equal_titles_are_numbered() -> None:
    assert distinct(["person", "style", "person"]) == ["person 1", "style", "person 2"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_terminals_only() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with progress_line("merging", stream) as progress:
            for done in range(1, 1001):
                progress(done, 1000)
    assert pipe.getvalue() == ""
    lines = terminal.getvalue().split("\r")
    assert any(line.endswith("100%") for line in lines)
    assert len(lines) < 140 and not lines[-1].strip() and not lines[-2].strip()


def test_errors_name_the_file_once() -> None:
    path = Path("folder/one.safetensors")
    for message in ("This file holds no tensors.", "one.safetensors: This file holds no tensors."):
        with pytest.raises(BadLoraFile) as failure, naming(path):
            raise BadLoraFile(message, hint="so")
        assert failure.value.message == "one.safetensors: This file holds no tensors."
        assert failure.value.hint == "so"


def test_places_of_results_are_checked_before_any_work(tmp_path: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.touch()
    check_free(taken, overwrite=True)
    with pytest.raises(BadWeightsFile, match="exists already"):
        check_free(taken, overwrite=False)
    for name in ("a.ckpt", "a.SAFETENSORS"):  # as the writing of files will judge
        with pytest.raises(BadWeightsFile, match=r"must end in \.safetensors"):
            check_free(tmp_path / name, overwrite=True)
    check_free(tmp_path / "a.PNG", False, ".png", ".jpg")
