"""`python -m benchmarks NAME --json OUT`, one of them or all."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from . import factory, guidance, merge, portraits, predict
from .measuring import Case

BENCHMARKS = {
    "portraits": portraits.run,
    "predict": predict.run,
    "factory": factory.run,
    "merge": merge.run,
    "merge_files": merge.run_files,
    "guidance": guidance.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--json", type=Path, required=True, help="where to write the results")
    options = parser.parse_args()
    names = list(BENCHMARKS) if options.name == "all" else [options.name]
    results = [case for name in names for case in BENCHMARKS[name]()]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "results": results}
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = markdown(results)
    options.json.with_suffix(".md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


def machine() -> dict[str, str | int]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "device": gpu or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def markdown(results: list[Case]) -> str:
    lines = ["| benchmark | seconds | peak MB | peer's time / ours |", "|---|---|---|---|"]
    for case in results:
        ratio = ", ".join(f"{peer} {value:.2f}" for peer, value in case["ratio"].items())
        added = "" if case["overhead"] is None else f", adds {case['overhead']:.1%} to a step"
        facts = f"{case['seconds']:.3g} | {case['peak_mb']} | {ratio}{added}"
        lines.append(f"| {case['name']} | {facts} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
