"""esc_arch on every supported Python with the oldest and the newest PyTorch, without and with each extra.

    python tests/environments/matrix.py                        # every cell
    python tests/environments/matrix.py 3.12/newest 3.11/2.7   # these
    python tests/environments/matrix.py 3.13/newest --extras onnx,plot

A cell is a new virtual environment, set up as the README says: PyTorch, `pip install -e .` in a copy of this working
tree, and `basicsr setup-training`. In it `smoke.py` trains, upscales, converts and
exports by the installed commands; then each extra is tried without its packages (a message has to name the extra),
installed, and tried. An environment takes up to 8 GB below `--work`, and is removed before the next one is made.

Pythons are taken from the path (`python3.12`) or from pyenv. Exit status 1: a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")

OLDEST, NEWEST = "2.7", "newest"
CELLS = [
    *(f"{python}/{torch}" for python in ("3.10", "3.11", "3.12") for torch in (OLDEST, NEWEST)),
    f"3.13/{NEWEST}",
]
#: flash-attn is built by CUDA's compiler for the GPU present: only by name.
EXTRAS = ("onnx", "plot", "publish", "spandrel", "video", "lpips", "wandb")
CORE = ("import", "names", "train", "resume", "upscale", "convert", "export")
SECONDS = 3600


@dataclass
class Result:
    """A step of a cell."""

    cell: str
    step: str
    ok: bool
    seconds: float
    said: str = ""


@dataclass
class Cell:
    """A Python with a PyTorch, and its environment below a folder."""

    name: str
    folder: Path
    results: list[Result] = field(default_factory=list)

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def run(self, step: str, command: Sequence[str | Path], folder: Path | None = None, status: int = 0) -> str | None:
        """Run a command as a step; returns what it printed, None if it failed."""
        start = time.perf_counter()
        done = subprocess.run(
            list(map(str, command)),
            cwd=folder or self.folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
        ok = done.returncode == status
        self.add(step, ok, time.perf_counter() - start, "" if ok else done.stdout[-2000:])
        return done.stdout if ok else None

    def add(self, step: str, ok: bool, seconds: float, said: str = "") -> None:
        """Note what became of a step, and print it."""
        self.results.append(Result(self.name, step, ok, seconds, said))
        print(f"{self.name:12} {step:18} {'ok' if ok else 'FAILED':7} {seconds:6.1f} s  {said}", flush=True)

    def pip(self, step: str, *arguments: str | Path, folder: Path | None = None) -> bool:
        """`pip install` as a step."""
        return self.run(step, [self.python, "-m", "pip", "install", "-q", *arguments], folder) is not None

    def smoke(self, *steps: str) -> None:
        """Run steps of `smoke.py` in the cell's working folder."""
        place = self.folder / "work"
        place.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [str(self.python), str(SMOKE), *steps], cwd=place, env=_environment(), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            self.add(found["step"], found["ok"], found["seconds"], found["said"])
        if process.wait():
            self.add("smoke.py", False, 0, f"ended with {process.returncode}")


def main() -> int:
    """Run the cells that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cells", nargs="*", metavar="PYTHON/TORCH", help=f"default: {' '.join(CELLS)}")
    parser.add_argument("--extras", default=",".join(EXTRAS), help="comma-separated; '' for none; default: %(default)s")
    parser.add_argument("--work", type=Path, help="a folder with 10 GB of space; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    args = parser.parse_args()
    extras = [extra for extra in args.extras.split(",") if extra]
    cells = args.cells or CELLS
    if unknown := [cell for cell in cells if not re.fullmatch(r"\d+\.\d+/\S+", cell)]:
        parser.error(f"a cell is PYTHON/TORCH, such as {CELLS[0]}, not {unknown[0]}")
    if unknown := [extra for extra in extras if extra not in EXTRAS]:
        parser.error(f"--extras {unknown[0]}: allowed are {', '.join(EXTRAS)}")
    results = []
    for name in cells:
        results += run_cell(name, extras, args.work)
        if args.json is not None:
            args.json.write_text(json.dumps([vars(result) for result in results], indent=1), encoding="utf-8")
    print("\n" + "\n".join(table(results)))
    return int(any(not result.ok for result in results))


def run_cell(name: str, extras: Sequence[str], work: Path | None) -> list[Result]:
    """All steps of a cell, in an environment that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="matrix", dir=work) as folder:
        cell = Cell(name, Path(folder))
        version, _, torch = name.partition("/")
        found = find_python(version)
        if found is None:
            cell.add("python", False, 0, f"no python{version} on the path or in pyenv")
        elif cell.run("venv", [found, "-m", "venv", "venv"]) is not None:
            source = copy_of_tree(cell.folder)
            if install(cell, source, torch):
                check(cell, source, extras)
        return cell.results


def install(cell: Cell, source: Path, torch: str) -> bool:
    """What the README's line does, with this PyTorch."""
    chosen = ["torch", "torchvision"] if torch == NEWEST else [f"torch=={torch}.*", "torchvision"]
    return (
        cell.pip("install torch", *chosen)
        and cell.pip("install", "-e", ".", folder=source)
        and cell.run("setup-training", [cell.python.with_name("basicsr"), "setup-training"]) is not None
    )


def check(cell: Cell, source: Path, extras: Iterable[str]) -> None:
    """The core steps, then every extra without and with its packages."""
    cell.smoke(*CORE)
    for extra in extras:
        cell.smoke(f"without-{extra}")
        if cell.pip(f"install {extra}", "-e", f".[{extra}]", folder=source):
            cell.smoke(f"with-{extra}")


def find_python(version: str) -> str | None:
    """A Python of this version that can make virtual environments."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [*sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python"))), shutil.which(f"python{version}")]
    for candidate in filter(None, candidates):
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        # A shim of pyenv is there for versions that are not chosen, too, and fails
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        if done.stdout.strip() == version:
            return candidate
    return None


def copy_of_tree(folder: Path) -> Path:
    """What installing needs of this working tree, where builds may leave files."""
    target = folder / "source"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target)
    for name in ("esc_arch", "options"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def table(results: Sequence[Result]) -> Iterator[str]:
    """The results as Markdown: a row for each cell, with what was installed and what failed."""
    yield "| cell | versions | steps | failed | minutes |"
    yield "|---|---|---:|---|---:|"
    for name in dict.fromkeys(result.cell for result in results):
        of_cell = [result for result in results if result.cell == name]
        versions = next((result.said for result in of_cell if result.step == "import" and result.ok), "")
        failed = ", ".join(result.step for result in of_cell if not result.ok) or "none"
        minutes = sum(result.seconds for result in of_cell) / 60
        yield f"| {name} | {versions} | {len(of_cell)} | {failed} | {minutes:.1f} |"


def _environment() -> dict[str, str]:
    """That of the caller, without what would let another installation be found."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # A shim of pyenv would start another Python than the environment's
    return {name: value for name, value in kept.items() if not name.startswith("PYENV_VERSION")}


if __name__ == "__main__":
    sys.exit(main())
