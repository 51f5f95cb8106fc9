"""What the doctor says of versions, copies of packages, and registered names."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import basicsr
import pytest
from basicsr.utils.registry import ARCH_REGISTRY
from doctor_context import by_key, context

from esc_arch import project, register
from esc_arch.compat import aliases
from esc_arch.tools.doctor import installation
from esc_arch.tools.doctor.report import PROBLEM, WARNING
from esc_arch.tools.doctor.subprocess_worker import JobFailed

ROOT = Path(__file__).parents[3]


# --- versions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The section with other versions of libraries; None for those that are not installed."""

    def examine(requires: dict[str, list[str]] | None = None, failing: str = "", **others: str | None) -> Any:
        real = importlib.metadata.version, importlib.metadata.requires

        def version(name: str) -> str:
            key = name.replace("-", "_")
            if key in others and others[key] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return str(others.get(key) or real[0](name))

        def required(name: str) -> list[str] | None:
            version(name)
            return real[1](name) if requires is None or name not in requires else requires[name]

        def import_module(module: str) -> None:
            if module == failing:
                raise JobFailed("ImportError: libGL.so.1: cannot open shared object file")

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", required)
        with monkeypatch.context() as patched:
            patched.delitem(sys.modules, failing, raising=False)
            return by_key(installation.versions(context(import_library=import_module)))

    return examine


def test_versions_are_told(pretend: Any) -> None:
    requires = {"esc-arch": ["torch>=2.7", 'wandb>=0.15; extra == "wandb"', 'pytest>=8; extra == "test"']}
    found = pretend(requires, torch="2.9.0", wandb=None, triton=None)
    assert found["torch"].text == "2.9.0"
    assert found["wandb"].text == "not installed (extra wandb)" and found["wandb"].status == "ok"
    assert found["triton"].text == "not installed"
    assert "git " in found["torch build"].text
    assert "pytest" not in found


def test_requirements_that_are_not_met(pretend: Any) -> None:
    """Those of what esc_arch requires; not those of extras or of other systems, nor what is not installed at all."""
    further = ['numpy>=9; extra == "all"', 'numpy>=9; sys_platform == "none"', "tb-nightly"]
    requires = {"torchvision": ["torch==2.14.1", "numpy>=1", *further], "esc-arch": ["torch>=2.7", "torchvision"]}
    found = pretend(requires, torch="2.9.0", torchvision="0.29.1")
    conflicts = [finding for key, finding in found.items() if key.startswith("conflict")]
    assert [finding.text for finding in conflicts] == [
        "torchvision 0.29.1 requires torch==2.14.1, but 2.9.0 is installed"
    ]
    assert conflicts[0].status == PROBLEM


def test_a_clone_that_is_not_installed(pretend: Any) -> None:
    found = pretend(esc_arch=None)
    assert found["esc-arch"].text.endswith("a folder on the path, not installed")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = {line.partition(">")[0].partition("=")[0] for line in lines}
    assert needed <= found.keys()


def test_a_library_that_cannot_be_imported(pretend: Any) -> None:
    found = pretend(failing="cv2")["opencv-python"]
    assert "cannot be imported: ImportError: libGL.so.1" in found.text and found.status == PROBLEM
    assert "opencv-python-headless" in found.advice


def test_libraries_that_are_not_there(pretend: Any) -> None:
    found = pretend(opencv_python=None, opencv_python_headless="4.12.0", safetensors=None, failing="safetensors")
    assert found["opencv-python"].text == "4.12.0"
    assert found["safetensors"].text == "not installed"
    assert found["safetensors"].advice == "pip install safetensors"
    assert pretend(safetensors=None)["safetensors"].text == "not installed under this name, but can be imported"
    assert pretend(lmdb=None)["lmdb"].text == "not installed (extra train)"


def test_two_opencvs(pretend: Any) -> None:
    found = pretend(opencv_python="4.12.0", opencv_python_headless="4.12.0")["opencv"]
    assert found.status == WARNING and "opencv-python, opencv-python-headless" in found.text


@pytest.mark.parametrize(("version", "status"), [((3, 14), WARNING), ((3, 10), "ok"), ((3, 13), "ok")])
def test_python(pretend: Any, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], status: str) -> None:
    monkeypatch.setattr(installation.sys, "version_info", (*version, 0))
    assert pretend()["python"].status == status


# --- copies -------------------------------------------------------------------------------------------------------


def test_the_published_copy() -> None:
    found = by_key(installation.copies(context()))
    assert found["import"].status == "ok"
    assert found["basicsr"].text == str(Path(basicsr.__file__).resolve().parent)
    assert found["esc_arch"].text.startswith(f"{Path(register.__file__).parent}, ")
    assert "BasicSR 1.4.2" in found["patched functions"].text
    assert "basicsr.train.load_resume_state" in found["patched functions"].data


def test_two_copies_of_two_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone, metadata = tmp_path / "basicsr", tmp_path / "basicsr_fixed-1.5.0.dist-info"
    clone.mkdir()
    metadata.mkdir()
    (clone / "__init__.py").touch()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: basicsr-fixed\nVersion: 1.5.0\n")
    (metadata / "RECORD").write_text("basicsr/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_key(installation.copies(context()))
    assert found["copies of basicsr"].status == WARNING
    assert found["copies of basicsr"].text == f"2 on the path; not used: {clone}"
    several = found["distributions of basicsr"]
    assert several.status == WARNING and several.data == ["basicsr-fixed", "basicsr"]
    assert several.advice.startswith("Keep one: pip uninstall basicsr-fixed basicsr")


def test_functions_that_are_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basicsr, "__version__", "1.3.5")
    found = by_key(installation.copies(context()))["patched functions"]
    assert found.status == WARNING and found.text == "none of this BasicSR: this is 1.3.5"


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        ("ModuleNotFoundError: No module named 'basicsr'", "basicsr setup-training"),
        ("ImportError: libGL.so.1: cannot open", "opencv-python-headless"),
        ("ImportError: torchvision/_C.so: undefined symbol", "reinstall torch and torchvision"),
        ("ValueError: x", "fix this first"),
    ],
)
def test_a_failed_import(failure: str, advice: str) -> None:
    found = by_key(installation.copies(context(failure)))
    assert found["import"].text == f"BasicSR cannot be imported: {failure}"
    assert found["import"].status == PROBLEM and advice in found["import"].advice
    assert "patched functions" not in found


def test_stand_ins_are_told_from_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torchvision.transforms.functional_tensor"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert name in aliases.stand_ins_in_use()
    monkeypatch.setattr(aliases, "_STAND_INS", {"json": (), "json.decoder": (), "not.there": ()})
    assert aliases.stand_ins_in_use() == []


# --- registered names ---------------------------------------------------------------------------------------------


def test_names_with_the_files_of_their_classes() -> None:
    found = by_key(installation.registered_names(context()))
    ours = found["arch of esc_arch"]
    assert "ESC, ESCFP" in ours.text and "esc_arch." not in ours.text
    assert ours.data["ESC"] == str(Path(register.__file__).parent / "archs" / "esc_arch.py")
    assert "SRModel" in found["model of basicsr"].text
    assert "calculate_psnr" in found["metric of basicsr"].data
    assert {finding.status for finding in found.values()} == {"ok"}


def test_names_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, "ESC", type("ESC", (), {"__module__": "project.archs"}))
    found = by_key(installation.registered_names(context()))
    assert found["arch of project.archs"].text == "ESC"
    assert found["arch of esc_arch"].text.startswith("ConvAttn, ")
    assert "esc_arch.ESC" in found["arch of esc_arch"].data
    taken = found["arch ESC"]
    assert taken.status == WARNING and taken.text == "is project.archs's"
    assert taken.advice == "Write esc_arch.ESC in option files where esc_arch's is meant."


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the command line and those of an option file; the rest of the section follows."""
    monkeypatch.setattr(project, "_FOLDERS", {})
    monkeypatch.setenv("ESC_ARCH_PROJECT", "{}")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / "a.yml").write_text("import: [json, not_there.archs]\n")
    asked = context(opt=str(tmp_path / "a.yml"))
    asked.args.imports = ["nor.this"]
    found = by_key(installation.registered_names(asked))
    assert found["--import"].status == found["import"].status == PROBLEM
    assert found["--import"].text.startswith("nor.this cannot be imported: there is no module nor")
    assert found["import"].text.startswith("not_there.archs cannot be imported: there is no module not_there")
    assert "arch of esc_arch" in found


def test_names_are_not_known_without_the_import() -> None:
    (finding,) = installation.registered_names(context("ImportError: x"))
    assert finding.status == WARNING and "not known" in finding.text
