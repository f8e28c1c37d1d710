"""Makes .venv-gpu: the packages of the Python that runs this, and over them the wheels of .wheels.

python3 .ci/gpu_venv.py

No index is asked. That Python may itself be one of a virtual environment, whose packages an
environment with "system site packages" would not have: its folders are named instead.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".venv-gpu"
WANTED = [".[deepspeed,wandb,export,demo]", "pytest"]


def main() -> None:
    """Make the environment, or say what is missing."""
    if importlib.util.find_spec("pip") is None:
        sys.exit(f"{sys.executable} has no pip; try {sys.executable} -m ensurepip")
    venv.create(PLACE, clear=True, with_pip=False)
    folders = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    own = next(PLACE.glob("lib/python*/site-packages"))
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    (own / "_outer.pth").write_text("".join(lines), encoding="utf-8")
    pip = [str(PLACE / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    install = ["install", "--quiet", "--no-compile", "--no-index", "--find-links", ".wheels"]
    status = subprocess.run([*pip, *install, "--editable", *WANTED], cwd=ROOT).returncode
    if status:
        version = "{}.{}".format(*sys.version_info)
        sys.exit(
            "What is missing above is neither installed here nor in .wheels; where there is an "
            f"index: make gpu-wheels GPU_PYTHON={version} GPU_PACKAGES='NAME…'"
        )


if __name__ == "__main__":
    main()
