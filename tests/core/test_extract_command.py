"""`extract` and `bake` as people call them: JSON, exit codes, kill -9, checkpoints of real size."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from difflora_core.__main__ import main
from difflora_core.key_names import module_table
from difflora_core.weights_file import open_lora, read_safetensors
from tests.core.checkpoint_files import (
    random_tensors,
    single_file_shapes,
    sparse_file,
    with_low_rank,
    write,
)

UNET = "model.diffusion_model."


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """A tuned checkpoint and its base; every matrix differs by one of rank 3."""
    base = random_tensors(single_file_shapes("mini"), seed=1)
    tuned = write(tmp_path / "tuned.safetensors", with_low_rank(base, 3))
    return tuned, write(tmp_path / "base.safetensors", base)


def call(capsys, *arguments: object) -> tuple[int, dict]:
    code = main([*(str(argument) for argument in arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "difflora_core", *(str(argument) for argument in arguments)]


def test_there_and_back(pair, tmp_path, capsys):
    tuned, base = pair
    lora, again = tmp_path / "lora.safetensors", tmp_path / "again.safetensors"
    arguments = ["--tuned", tuned, "--base", base, "--rank", 3, "--text-encoders"]
    code, report = call(capsys, "extract", *arguments, "--dtype", "fp32", "--out", lora)
    assert code == 0
    assert (report["file"], report["base"], report["ranks"]) == (str(lora), "mini", {"3": 137})
    assert report["error"] < 1e-5
    assert report["bytes"] == lora.stat().st_size
    code, report = call(capsys, "bake", "--base", base, "--lora", lora, "--out", again)
    assert (code, report["changed"]) == (0, 137)
    ours, theirs = read_safetensors(again)[0], read_safetensors(tuned)[0]
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in theirs)
    code, report = call(capsys, "bake", "--base", again, "--lora", lora, lora, "--weights", -0.5,
                        -0.5, "--out", tmp_path / "back.safetensors")  # fmt: skip
    ours, theirs = read_safetensors(tmp_path / "back.safetensors")[0], read_safetensors(base)[0]
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in theirs)


def test_default_rank_and_text_for_people(pair, tmp_path, capsys):
    tuned, base = pair
    lora = tmp_path / "lora.safetensors"
    arguments = ["--tuned", str(tuned), "--base", str(base), "--out", str(lora)]
    assert main(["extract", *arguments]) == 0
    text = capsys.readouterr().out
    assert "a LoRA for mini" in text
    assert "The text encoder differs too" in text
    out = str(tmp_path / "baked.safetensors")
    assert main(["bake", "--base", str(base), "--lora", str(lora), "--out", out]) == 0
    assert "1 x lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["extract", "--tuned", "T", "--base", "T", "--out", "O"], "as the tuned and as the base"),
        (["extract", "--tuned", "T", "--base", "no.safetensors", "--out", "O"], "does not exist"),
        (["extract", "--tuned", "T", "--base", "B", "--out", "B"], "exists already"),
        (["extract", "--tuned", "T", "--base", "B", "--out", "x.ckpt"], "must end in .safetensors"),
        (["extract", "--tuned", "T", "--lora", "T", "--base", "B", "--out", "O"], "not allowed"),
        (["extract", "--tuned", "T", "--base", "B", "--rank", "0", "--out", "O"], "impossible"),
        (["extract", "--lora", "T", "--base", "B", "--out", "O"], "T.safetensors"),
        (["bake", "--base", "B", "--lora", "T", "--out", "O"], "T.safetensors"),
        (["bake", "--base", "B", "--lora", "T", "--weights", "1", "2", "--out", "O"], "2 weights"),
        (["bake", "--base", "B", "--lora", "no.safetensors", "--out", "O"], "does not exist"),
    ],
)
def test_errors_are_one_sentence(arguments, sentence, pair, tmp_path, capsys):
    places = {"T": pair[0], "B": pair[1], "O": tmp_path / "out.safetensors"}
    before = sorted(tmp_path.iterdir())
    code, report = call(capsys, *(places.get(word, word) for word in arguments))
    assert code == 2
    assert sentence.replace("T.", "tuned.") in report["error"]
    assert sorted(tmp_path.iterdir()) == before


def test_killed_in_the_middle_it_goes_on(pair, tmp_path):
    """In a shell of its own: SIGKILL, then the same command again, gives the same file."""
    arguments = ["--tuned", pair[0], "--base", pair[1], "--title", "x", "--energy", "0.999"]
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    done = subprocess.run(
        command("extract", *arguments, "--out", whole, "--json"), capture_output=True, check=True
    )
    assert json.loads(done.stdout)["resumed"] == 0
    process = subprocess.Popen(command("extract", *arguments, "--out", out))
    parts = tmp_path / ".out.safetensors.parts"
    while process.poll() is None and len(list(parts.glob("unet*"))) < 20:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    finished = len(list(parts.glob("unet*")))
    done = subprocess.run(
        command("extract", *arguments, "--out", out, "--json"), capture_output=True, check=True
    )
    assert json.loads(done.stdout)["resumed"] == finished >= 20
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()


MEASURED = """
import json, resource, sys
from difflora_core.__main__ import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import torch, difflora_core.extract
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"code": code, "mb": (peak - loaded) / 1e3}))
"""


@pytest.mark.slow
def test_real_size_takes_the_memory_of_one_layer(tmp_path):
    """SD 1.5 in half precision, 2 GB: its largest layer has 29 million weights."""
    shapes = single_file_shapes("sd15")
    keys = [
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        f"{UNET}output_blocks.2.1.conv.weight",
        f"{UNET}middle_block.1.proj_in.weight",
    ]
    zeros = {key: torch.zeros(shapes[key]) for key in keys}
    tuned = with_low_rank(zeros, 2)
    paths = [
        sparse_file(tmp_path / "tuned.safetensors", shapes, tuned),
        sparse_file(tmp_path / "base.safetensors", shapes),
    ]
    out = tmp_path / "lora.safetensors"
    arguments = ["extract", "--tuned", paths[0], "--base", paths[1], "--rank", "2", "--out", out]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments), "--json"],
        capture_output=True,
        check=True,
        text=True,
    )
    report, measured = map(json.loads, done.stdout.splitlines())
    assert (report["base"], report["layers"], report["same"]) == ("sd15", 3, 279)
    assert measured["mb"] < 700
    reading = open_lora(out)
    assert reading.base == "sd15"
    originals = module_table("sd15").originals
    for name, layer in reading.lora.layers.items():
        expected = tuned[f"{UNET}{originals[name]}.weight"].half().float()
        error = (layer.delta() - expected.reshape(layer.weight_shape)).norm() / expected.norm()
        assert error < 2e-3
