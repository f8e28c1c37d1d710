"""A wheel, built and installed into an environment of its own, works from an empty folder."""

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    unset = ("PYTHONPATH", "VIRTUAL_ENV", "HPDIST_CONFIGS")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment's `bin`, with this one's packages but hpdist from its wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("the build back end can neither be found nor downloaded")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("hpdist-*.whl")
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    (packages,) = environment.glob("lib/python*/site-packages")
    done = run(*pip, "install", "--no-deps", "--target", packages, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    others = [place for place in site.getsitepackages() if Path(place).is_dir()]
    lines = [f"import site; site.addsitedir({place!r})" for place in others]
    (packages / "zz_others.pth").write_text("\n".join(lines) + "\n")
    return environment / "bin"


def test_configs_are_found_by_name_and_copied_with_the_launch_files(installed, tmp_path):
    python = installed / "python"
    where = run(python, "-c", "import hpdist; print(hpdist.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(installed.parent)), where.stdout + where.stderr
    listed = run(python, "-m", "hpdist", "configs", cwd=tmp_path)
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {
        file.stem for file in (ROOT / "configs").glob("*.yaml")
    }
    train = (python, "-m", "hpdist", "train", "digits", "--steps", "2", "--tracker.name", "none")
    early = run(*train, cwd=tmp_path)
    assert early.returncode == 2
    assert "config digits: " in early.stderr
    assert "nothing matches 'demo/digits/train-*.parquet'" in early.stderr
    run(python, "-m", "hpdist.data.samples.digits", "demo/digits", cwd=tmp_path)
    done = run(*train, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits" / "summary.json").exists()
    copied = run(python, "-m", "hpdist", "configs", "--copy", ".", cwd=tmp_path)
    assert copied.returncode == 0, copied.stderr
    for folder in ("configs", "launch"):
        of_repository = [file for file in (ROOT / folder).rglob("*") if file.is_file()]
        for file in of_repository:
            if "__pycache__" not in file.parts:
                new = tmp_path / file.relative_to(ROOT)
                assert new.read_bytes() == file.read_bytes()
                assert os.access(new, os.X_OK) == os.access(file, os.X_OK)
