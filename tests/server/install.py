"""Install the vLLMs that the releases pin, and lm_eval: ``python -m tests.server.install FOLDER``.

Each goes to a folder of its own, without what it depends on but the light packages that it
imports: vLLM's torch, CUDA, Triton and numba would be gigabytes, and are not used here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.server.releases import LM_EVAL, RELEASES

_REQUIREMENTS = Path(__file__).parent / "requirements"


def install(program: str, folder: Path) -> None:
    """Install a program, unless that is what the folder holds.

    Args:
        program: What its list of pinned requirements is called.
        folder: Where it goes.
    """
    requirements = _REQUIREMENTS / f"{program}.txt"
    wanted = (_REQUIREMENTS / "common.txt").read_text() + requirements.read_text()
    # Written last, so that an installation that was cut short is made again.
    installed = folder / "installed.txt"
    if installed.is_file() and installed.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), "-r", str(requirements)], check=True)
    installed.write_text(wanted)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    install(LM_EVAL, root / LM_EVAL)
    for version in sorted({release.vllm for release in RELEASES}):
        install(f"vllm-{version}", root / version)
