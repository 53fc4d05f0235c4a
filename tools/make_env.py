"""Make `.venv`: the CPU or CUDA torch that the constraints name, then everything else.

Usage: python tools/make_env.py [folder]      (default: .venv beside this repository's Makefile)
Needs Python 3.10 or newer and pip; does nothing where the environment is already up to date.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "requirements-train.txt")
SHIM = Path(__file__).with_name("torchvision_shim.py")
MISSING_OPERATOR = "operator torchvision::nms does not exist"


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".venv"
    python = _interpreter(folder)
    stamp = folder / "difflora-environment"
    if stamp.is_file() and stamp.read_text() == _fingerprint():
        return 0
    if not _is_usable(python):
        _say(f"making {folder}")
        # what an interrupted call or another Python has left goes; a folder that is none stays
        venv.create(folder, with_pip=True, clear=(folder / "pyvenv.cfg").is_file())
    _say("installing, torch first")
    # Torch by itself first: the later steps then keep the build that this machine's index offers.
    _pip_install(python, "torch")
    _pip_install(python, "torchvision")
    _pip_install(python, *(part for path in REQUIREMENTS for part in ("-r", str(path))))
    cure_torchvision(python)
    stamp.write_text(_fingerprint())
    return 0


def cure_torchvision(python: Path) -> None:
    """Put the shim into the environment, but only where torchvision fails for its known reason."""
    error = _import_error(python, "torchvision")
    if MISSING_OPERATOR in error:
        site_packages = Path(_ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
        shutil.copy(SHIM, site_packages / "difflora_torchvision_shim.py")
        (site_packages / "difflora_torchvision.pth").write_text(
            "import difflora_torchvision_shim\n"
        )
        _say("torchvision is a CUDA build beside a CPU torch: its operators are declared by a shim")
        error = _import_error(python, "torchvision")
    if error:
        sys.exit(f"torchvision cannot be imported in this environment:\n{error}")


def _fingerprint() -> str:
    """Changes whenever what should be installed changes."""
    parts = [path.read_bytes() for path in (CONSTRAINTS, *REQUIREMENTS, SHIM)]
    return hashlib.sha256(b"\0".join([sys.version.encode(), *parts])).hexdigest()


def _interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _is_usable(python: Path) -> bool:
    """Whether the environment is whole, and of the Python that makes it."""
    if not python.is_file():
        return False
    code = "import pip, sys; print(sys.version)"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == sys.version.strip()


def _pip_install(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*command, "-c", str(CONSTRAINTS), *arguments], check=True)


def _import_error(python: Path, module: str) -> str:
    done = subprocess.run(
        [str(python), "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    return done.stderr if done.returncode else ""


def _ask(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as failed:
        sys.exit(
            f"The environment is not finished: {failed}\nWhat went wrong stands above; the same "
            "command goes on from here. On Debian, venv is in the package python3-venv."
        )
