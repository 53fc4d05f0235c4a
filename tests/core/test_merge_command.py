"""The shell commands `merge`, `resize` and `compare`, run as users run them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from difflora_core.__main__ import main
from difflora_core.header import LoraHeader
from difflora_core.merging import METHODS, block_of
from difflora_core.weights_file import lora_to_kohya, read_lora, write_lora
from tests.core.lora_samples import attention_lora


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three LoRAs for the mini model, of ranks 4, 2 and 3."""
    paths = []
    for seed, (name, rank) in enumerate({"anna": 4, "ben": 2, "cleo": 3}.items()):
        path = tmp_path / f"{name}.safetensors"
        header = LoraHeader(title=f"{name}'s face", base="mini", trigger=f"sks {name}")
        lora = attention_lora("mini", rank=rank, scale=0.5, seed=seed)
        write_lora(lora, path, header, dtype=torch.float32)
        paths.append(str(path))
    return paths


def deltas(path: str | Path) -> dict[str, torch.Tensor]:
    return {layer.name: layer.delta() for layer in read_lora(path)}


def done(arguments: list[str], capsys: Any) -> dict:
    code = main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0, report
    return report


def refused(arguments: list[str], capsys: Any) -> str:
    assert main([*arguments, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"error", "hint"}
    return f"{report['error']} {report['hint']}"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_merge_without_settings_is_the_exact_mean(files: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "both.safetensors"
    report = done(["merge", *files, "--dtype", "fp32", "--out", str(out)], capsys)
    sources, result = [deltas(file) for file in files], deltas(out)
    for name, delta in result.items():
        assert relative(delta, sum(s[name] for s in sources) / 3) < 1e-5
    assert report["file"] == str(out) and report["method"] == "average"
    assert report["layers"] == 56 and report["ranks"] == {"9": 56}
    assert [entry["title"] for entry in report["inputs"]] == ["anna", "ben", "cleo"]
    assert report["bytes"] == out.stat().st_size
    assert report["error"] < 1e-5 and report["energy"] == pytest.approx(1)


def test_weights_and_blocks(files: list[str], tmp_path: Path, capsys) -> None:
    out, table = tmp_path / "both.safetensors", tmp_path / "blocks.txt"
    table.write_text("unet.mid_block=0.5\nunet.up_blocks.1=0", encoding="utf-8")
    arguments = ["merge", *files[:2], "--weights", "0.7", "-0.2", "--method", "sum"]
    arguments += ["--blocks", str(table), "-", "--dtype", "fp32", "--out", str(out)]
    done(arguments, capsys)
    one, two, result = deltas(files[0]), deltas(files[1]), deltas(out)
    factors = {"unet.mid_block": 0.5, "unet.up_blocks.1": 0.0}
    for name, delta in result.items():
        factor = next((f for block, f in factors.items() if name.startswith(block)), 1.0)
        assert relative(delta, 0.7 * factor * one[name] - 0.2 * two[name]) < 1e-5


@pytest.mark.parametrize(
    "limit", [["--rank", "4"], ["--energy", "0.9"], ["--error", "0.3"], ["--megabytes", "0.1"]]
)
def test_limits_make_the_file_smaller(
    limit: list[str], files: list[str], tmp_path: Path, capsys
) -> None:
    exact, small = tmp_path / "exact.safetensors", tmp_path / "small.safetensors"
    done(["merge", *files, "--out", str(exact)], capsys)
    report = done(["merge", *files, *limit, "--out", str(small)], capsys)
    assert small.stat().st_size < exact.stat().st_size
    assert 0 < report["energy"] < 1 and 0 < report["error"] < 1
    whole, result = deltas(exact), deltas(small)
    squares = [(float((result[n] - whole[n]).norm()), float(whole[n].norm())) for n in whole]
    lost = sum(error**2 for error, _ in squares) / sum(norm**2 for _, norm in squares)
    assert report["error"] == pytest.approx(lost**0.5, rel=0.02)


def test_header_names_what_went_in(files: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "both.safetensors"
    done(["merge", *files, "--weights", "1", "2", "3", "--title", "Us", "--out", str(out)], capsys)
    header = read_lora(out).metadata
    assert header["modelspec.title"] == "Us"
    assert header["ss_base_model_version"] == "difflora_mini"
    text = json.dumps(dict(header))
    for file in files:
        source = read_lora(file).metadata
        assert Path(file).stem in header["modelspec.merged_from"]
        assert source["modelspec.trigger_phrase"] in text
        assert source["modelspec.hash_sha256"].removeprefix("0x") in text
    assert str(tmp_path) not in text


def test_sweep_writes_a_file_per_total(files: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "both.safetensors"
    arguments = ["merge", *files[:2], "--method", "sum", "--sweep", "0.5:1.5:3", "--dtype", "fp32"]
    report = done([*arguments, "--out", str(out)], capsys)
    assert [entry["total"] for entry in report["sweep"]] == [0.5, 1.0, 1.5]
    names = ["both_0.5", "both_1", "both_1.5"]
    assert [Path(entry["file"]).stem for entry in report["sweep"]] == names
    assert not out.exists()
    low, high = (deltas(tmp_path / f"{name}.safetensors") for name in ("both_0.5", "both_1.5"))
    assert all(relative(3 * low[name], high[name]) < 1e-5 for name in low)


def test_sweep_names_close_totals_apart(files: list[str], tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "both.safetensors")
    report = done(["merge", *files, "--sweep", "0.999:1.001:5", "--out", out], capsys)
    names = [Path(entry["file"]).stem for entry in report["sweep"]]
    assert names == ["both_0.999", "both_0.9995", "both_1", "both_1.0005", "both_1.001"]
    assert len(list(tmp_path.glob("both_*"))) == 5


def test_sweep_checks_all_names_first(files: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "both_1.5.safetensors").touch()
    out = str(tmp_path / "both.safetensors")
    text = refused(["merge", *files, "--sweep", "0.5:1.5:3", "--out", out], capsys)
    assert "both_1.5.safetensors exists already" in text
    assert not (tmp_path / "both_0.5.safetensors").exists()


def test_resize_keeps_the_header(files: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "small.safetensors"
    report = done(["resize", files[0], "--rank", "2", "--out", str(out)], capsys)
    whole, result = deltas(files[0]), deltas(out)
    for name, delta in whole.items():
        best = torch.linalg.svdvals(delta)[2:].norm() / delta.norm()
        assert relative(result[name], delta) == pytest.approx(float(best), rel=0.02)
    assert report["ranks"] == {"2": 56}
    header = read_lora(out).metadata
    assert header["modelspec.trigger_phrase"] == "sks anna"
    assert header["ss_network_dim"] == "2"
    assert json.loads(header["difflora.resize"])["title"] == "anna's face"
    assert len(json.loads(header["difflora.certificates"])) == 56
    assert header["modelspec.hash_sha256"] != read_lora(files[0]).metadata["modelspec.hash_sha256"]


def test_compare_draws_and_counts(files: list[str], tmp_path: Path, capsys) -> None:
    picture = tmp_path / "pictures" / "map.png"
    report = done(["compare", files[0], files[0], files[1], "--picture", str(picture)], capsys)
    assert report["titles"] == ["anna 1", "anna 2", "ben"]
    cosine = report["cosine"]
    assert cosine[0][1] == pytest.approx(1, abs=1e-5) and abs(cosine[0][2]) < 0.1
    with Image.open(picture) as image:
        assert min(image.size) > 100
    text = refused(["compare", *files, "--picture", str(picture)], capsys)
    assert "exists already" in text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("file/map.png", "file is a file, not a folder"),
        ("folder.png", "folder.png could not be written"),
        ("map.txt", "map.txt must end in .png or .jpg"),
    ],
)
def test_pictures_that_cannot_be_written_are_explained(
    name: str, sentence: str, files: list[str], tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    before = set(tmp_path.rglob("*"))
    arguments = ["compare", *files, "--picture", str(tmp_path / name), "--overwrite"]
    assert sentence in refused(arguments, capsys)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["merge", "resize", "compare"])
def test_reports_for_people(command: str, files: list[str], tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "out.safetensors")] if command != "compare" else []
    given = files[:1] if command == "resize" else files
    assert main([command, *given, *out]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) >= 4 and captured.err == ""
    assert ("anna" in captured.out) or command == "resize"


WRONG = {
    "no such method": (["--method", "magic"], "no method named 'magic'"),
    "weights": (["--weights", "1"], "1 weights were given for 3 LoRAs"),
    "no number": (["--weights", "a"], "invalid float value"),
    "two limits": (["--rank", "2", "--energy", "0.5"], "not allowed with"),
    "rank": (["--rank", "0"], "rank of 0"),
    "energy": (["--energy", "99"], "energy 99"),
    "size": (["--megabytes", "0.001"], "too few"),
    "sweep": (["--sweep", "1"], "no sweep"),
    "blocks": (["--blocks", "x", "-", "-"], "no factor of a block"),
    "unknown block": (["--blocks", "unet.basement=1", "-", "-"], "unet.basement"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_explained(
    arguments: list[str], says: str, files: list[str], tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out.safetensors"
    assert says in refused(["merge", *files, *arguments, "--out", str(out)], capsys)
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", ["merge", "resize", "compare"])
def test_the_file_whose_weights_are_no_numbers_is_named(
    command: str, files: list[str], tmp_path: Path, capsys
) -> None:
    broken = lora_to_kohya(read_lora(files[1]))
    next(tensor for key, tensor in broken.items() if "lora_up" in key)[0, 0] = torch.nan
    save_file(broken, files[1])
    given = files[1:2] if command == "resize" else files
    out = [] if command == "compare" else ["--out", str(tmp_path / "out.safetensors")]
    error = refused([command, *given, *out], capsys)
    assert error.startswith("ben.safetensors: ") and "holds NaN" in error
    assert not (tmp_path / "out.safetensors").exists()


def test_wrong_files_are_named(files: list[str], tmp_path: Path, capsys) -> None:
    other, broken = tmp_path / "other.safetensors", tmp_path / "broken.safetensors"
    write_lora(attention_lora("sd15", rank=1), other, LoraHeader(title="other", base="sd15"))
    broken.write_bytes(Path(files[0]).read_bytes()[:3000])
    for wrong, says in ((other, "sd15"), (broken, "broken.safetensors"), ("gone", "gone")):
        arguments = [*files, str(wrong)]
        merging = ["merge", *arguments, "--out", str(tmp_path / "out.safetensors")]
        assert says in refused(merging, capsys)
        assert says in refused(["compare", *arguments], capsys)
    assert not (tmp_path / "out.safetensors").exists()


def test_help_lists_every_method(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"one of: {' '.join(METHODS)}" in text


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A copy of a file with some bytes of header or weights changed, or its end cut off."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 3, 50])):
        header = draw.random() < 0.7
        changed[draw.randrange(0, 6000 if header else len(changed))] = draw.randrange(256)
    return bytes(changed[: draw.randrange(1, len(changed))] if draw.random() < 0.3 else changed)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_files_end_with_a_sentence_or_a_right_result(
    seed: int, files: list[str], tmp_path: Path, capsys
) -> None:
    draw = random.Random(seed)
    bad, out = tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    bad.write_bytes(damaged(Path(files[1]).read_bytes(), draw))
    command = draw.choice(["merge", "resize", "compare"])
    arguments = [str(bad)] if command == "resize" else [files[0], str(bad)]
    code = main([command, *arguments, *([] if command == "compare" else ["--out", str(out)])])
    captured = capsys.readouterr()
    assert code in (0, 2) and "Traceback" not in captured.err
    assert not list(tmp_path.glob(".*"))
    if out.exists():
        assert code == 0 and all(torch.isfinite(delta).all() for delta in deltas(out).values())


def test_factors_of_many_blocks_as_json(files: list[str], tmp_path: Path, capsys) -> None:
    factors = json.dumps({"unet.mid_block": 0, "unet.up_blocks.0": 0.5}, indent=200)
    assert len(factors) > 255
    out = str(tmp_path / "out.safetensors")
    options = ["--method", "sum", "--dtype", "fp32", "--blocks", factors]
    done(["merge", files[0], *options, "--out", out], capsys)
    whole, result = deltas(files[0]), deltas(out)
    for name, delta in result.items():
        factor = {"unet.mid_block": 0.0, "unet.up_blocks.0": 0.5}.get(block_of(name), 1.0)
        torch.testing.assert_close(delta, factor * whole[name])
    out = str(tmp_path / "other.safetensors")
    (tmp_path / "factors").write_bytes(b"\xff\xfe")
    stored = [str(tmp_path / "factors"), "-"]
    assert "as text" in refused(["merge", *files[:2], "--blocks", *stored, "--out", out], capsys)


def test_one_file_cannot_be_compared(files: list[str], capsys) -> None:
    assert "cannot be compared" in refused(["compare", files[0]], capsys)


def test_inputs_without_a_hash_get_one(tmp_path: Path, capsys) -> None:
    path, out = tmp_path / "bare.safetensors", tmp_path / "both.safetensors"
    save_file(lora_to_kohya(attention_lora("mini")), path)
    done(["merge", str(path), str(path), "--out", str(out)], capsys)
    content = path.read_bytes()
    weights = content[8 + int.from_bytes(content[:8], "little") :]
    merged_from = json.loads(read_lora(out).metadata["difflora.merge"])["inputs"]
    assert {e["hash"] for e in merged_from} == {"0x" + hashlib.sha256(weights).hexdigest()}
