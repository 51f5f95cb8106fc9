"""`basicsr setup-training`, without an installation: what is called, and what its processes find."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest

from esc_arch.cli import main, setup_training
from esc_arch.cli.setup_training import REQUIREMENTS, SITECUSTOMIZE


def test_exec_writes_to_its_caller_again(tmp_path: Path) -> None:
    """What BasicSR's setup.py does; from Python 3.13 on it fails without the module."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.replace("(3, 13)", "(3, 0)"), encoding="utf-8")
    code = (
        "def version():\n    exec(compile('__version__ = \"1.4.2\"', 'version.py', 'exec'))\n"
        "    return locals()['__version__']\n"
        "space = {}\nexec('a = 1', space)\nexec('b = a + 1', space, own := {})\n"
        "print(version(), space['a'], own['b'], 'b' in space)"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1.4.2", "1", "2", "False"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run, each of which succeeds, where BasicSR is not installed."""
    listed: list[list[str]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> Any:
        listed.append(command)
        first = Path(env["PYTHONPATH"].split(os.pathsep)[0])
        assert (first / "sitecustomize.py").read_text(encoding="utf-8") == SITECUSTOMIZE
        return subprocess.CompletedProcess(command, int("--fail" in command))

    monkeypatch.setattr(setup_training, "packages_distributions", dict)
    monkeypatch.setattr(subprocess, "run", run)
    return listed


def test_pip_installs_with_the_pytorch_at_hand(calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["setup-training", "--", "--quiet"]) == 0
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert calls == [[*pip, "setuptools>=77", "wheel", "cython"], [*pip, "--no-build-isolation", *REQUIREMENTS]]
    assert "basicsr train is ready" in capsys.readouterr().out


def test_uv_installs_where_there_is_no_pip(calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert main(["setup-training"]) == 0
    assert calls[1] == ["/bin/uv", "pip", "install", "--python", sys.executable, "--no-build-isolation", *REQUIREMENTS]


def test_neither_pip_nor_uv(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["setup-training"]) == 2
    assert "python -m ensurepip" in capsys.readouterr().err and not calls


def test_a_failure_ends_it(calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["setup-training", "--", "--fail"]) == 1
    assert len(calls) == 1 and "messages above say why" in capsys.readouterr().err


def test_another_basicsr_is_not_replaced(calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    setup_training.packages_distributions = lambda: {"basicsr": ["esc-arch"]}  # type: ignore[assignment, misc]
    assert main(["setup-training"]) == 0 and not calls
    assert "is installed already" in capsys.readouterr().out


def test_the_extra_has_the_same_requirements() -> None:
    of_extra = [each.partition(";")[0].strip() for each in requires("esc-arch") or () if 'extra == "train"' in each]
    assert sorted(of_extra) == sorted(REQUIREMENTS)
