"""What `python -m build` makes of this working tree: nothing that an installation needs is left out."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from matrix import copy_of_tree

from esc_arch import __version__

pytest.importorskip("build", reason="needs build")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that was made of it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_tree(folder)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "made"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return folder / "made"


def test_contents(made: Path) -> None:
    sources = {path.name for path in (ROOT / "esc_arch" / "ops" / "cpu" / "csrc").iterdir()}
    options = {path.name for path in (ROOT / "options").glob("*.yml")}
    with zipfile.ZipFile(*made.glob("*.whl")) as wheel:
        names = wheel.namelist()
        metadata = message_from_bytes(wheel.read(f"esc_arch-{__version__}.dist-info/METADATA"))
    assert {Path(name).name for name in names if "/csrc/" in name} == sources
    assert {Path(name).name for name in names if "/option_files/" in name} == options
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests")]
    always = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert not [each for each in always if each.startswith(("basicsr", "lmdb"))]  # which only training needs
    with tarfile.open(*made.glob("*.tar.gz")) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"requirements.txt", "options/train_ESC_x2.yml", "esc_arch/ops/cpu/csrc/conv_attn.cpp"} <= inside


def test_it_runs_from_anywhere(made: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(*made.glob("*.whl")) as wheel:
        wheel.extractall(tmp_path / "installed")
    program = (
        "import esc_arch; from esc_arch.cli import main; from esc_arch.ops.cpu import building\n"
        f"assert esc_arch.__file__.startswith({str(tmp_path)!r}), esc_arch.__file__\n"
        "assert main(['options', 'copy', 'train_ESC_x2']) == 0\n"
        "assert len(building.recipe().sources) > 5\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "train_ESC_x2.yml").read_bytes() == (ROOT / "options" / "train_ESC_x2.yml").read_bytes()


def test_the_package_index_takes_it(made: Path) -> None:
    pytest.importorskip("twine", reason="needs twine")
    files = [str(path) for path in made.iterdir()]
    run = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
