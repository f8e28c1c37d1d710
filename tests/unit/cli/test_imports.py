"""What starting hpdist imports: nobody waits for libraries that a command or a run may not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = (  # each takes longer than a command's own work, or is needed by some runs only
    *("deepspeed", "transformers", "timm", "peft", "torchvision", "torchmetrics", "sklearn"),
    *("scipy", "wandb", "mlflow", "tensorboard", "matplotlib", "kornia"),
    *("onnx", "onnxscript", "onnxruntime"),
    *("torch._dynamo", "torch._inductor", "sympy"),
)
DATA = ("datasets", "accelerate", "pandas")
TORCH = ("torch", "pyarrow", "PIL", "pydantic", "yaml", "tqdm")
ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs/digits.yaml")

STARTS = {  # the code, and what it must not import
    "package": ("import hpdist", (*OPTIONAL, *DATA, *TORCH)),
    "help": ("from hpdist.cli import main; main(['--help'])", (*OPTIONAL, *DATA, *TORCH)),
    "print-config": (
        f"from hpdist.cli import main; main(['train', {CONFIG!r}, '--print-config'])",
        (*OPTIONAL, *DATA),
    ),
    "trainer": ("import hpdist.train.trainer", OPTIONAL),
}


@pytest.mark.parametrize("start", STARTS)
def test_what_is_imported(start: str) -> None:
    code, unwanted = STARTS[start]
    found = f"import sys; found = sorted(set({unwanted!r}) & set(sys.modules))"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"try:\n    {code}\nexcept SystemExit:\n    pass\n{found}\nprint('FOUND', *found)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "FOUND", done.stdout.splitlines()[-1]
