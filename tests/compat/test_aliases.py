"""basicsr can be imported after esc_arch: whatever is missing, in any order, and in worker processes."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import basicsr
import pytest
from fresh import run_code

import esc_arch.compat
from esc_arch.compat import aliases, duplicate_installs, patches

HIDE = '''
import sys
import scipy.ndimage  # today's SciPy needs its filters itself while it is imported

sys.modules.pop("scipy.ndimage.filters", None)
vars(scipy.ndimage).pop("filters", None)

class Hide:
    """Makes modules that basicsr wants be as if they were not there."""

    def find_spec(self, name, path=None, target=None):
        if name in ("torchvision.transforms.functional_tensor", "scipy.ndimage.filters"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name.partition(".")[0] == "distutils":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
'''

REPORT = """
import json

facts = {}
try:
    import basicsr
    facts["failed before"] = False
except ModuleNotFoundError:
    facts["failed before"] = True

import esc_arch
import basicsr
import basicsr.archs.arch_util
import basicsr.data.degradations
import basicsr.metrics.niqe
import basicsr.train
import packaging.version
import scipy.ndimage
import torchvision.transforms.functional
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY

facts["version"] = basicsr.archs.arch_util.LooseVersion is packaging.version.Version
facts["grey"] = basicsr.data.degradations.rgb_to_grayscale is torchvision.transforms.functional.rgb_to_grayscale
facts["convolve"] = basicsr.metrics.niqe.convolve is scipy.ndimage.convolve

import importlib
importlib.reload(esc_arch)
facts["reloaded"] = ARCH_REGISTRY.get("ESC") is esc_arch.ESC

for name in [name for name in sys.modules if name.partition(".")[0] == "esc_arch"]:
    del sys.modules[name]
import esc_arch
registered = ARCH_REGISTRY.get("ESC"), MODEL_REGISTRY.get("ESRModel")
facts["imported again"] = registered == (esc_arch.ESC, esc_arch.ESCModel)

def depth(function):
    original = getattr(function, "_esc_arch_original", None)
    return 0 if original is None else 1 + depth(original)

facts["depths"] = [
    depth(basicsr.train.load_resume_state), depth(basicsr.models.base_model.BaseModel.load_network)
]

from basicsr.data import build_dataset
from torch.utils.data import DataLoader

loader = DataLoader(build_dataset({options!r}), batch_size=2, num_workers=1, multiprocessing_context="spawn")
(batch, *_) = loader
facts["spawned"] = [batch["lq"].shape, batch["gt"].shape]
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, photographs: Any) -> dict[str, Any]:
    """What a program finds where three modules are missing, and that imports things in an odd order, several times."""
    options = {
        "name": "Train",
        "type": "PairedImageDataset",
        "phase": "train",
        "dataroot_gt": str(photographs.gt),
        "dataroot_lq": str(photographs.lq),
        "filename_tmpl": "{}x2",
        "io_backend": {"type": "disk"},
        "scale": 2,
        "gt_size": 16,
        "use_hflip": True,
        "use_rot": True,
    }
    report = textwrap.indent(REPORT.replace("{options!r}", repr(options)), "    ")
    code = f"{HIDE}\nif __name__ == '__main__':\n{report}\nelse:\n    import esc_arch\n"
    run = run_code(code, tmp_path_factory.mktemp("imports"))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", ["version", "grey", "convolve"])
def test_missing_modules_are_replaced(module: str, facts: Any) -> None:
    """Faults 3 and 4."""
    assert facts["failed before"]
    assert facts[module]


@pytest.mark.parametrize("time", ["reloaded", "imported again"])
def test_a_second_import_registers_once(time: str, facts: Any) -> None:
    """Fault 47; also after an `import basicsr` that failed half-way."""
    assert facts[time]


def test_a_second_import_does_not_patch_a_patch(facts: Any) -> None:
    assert facts["depths"] == [1, 1]


def test_a_stand_in_is_used_only_where_the_original_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    present, parent = ModuleType("present_here.part"), ModuleType("present_here")
    monkeypatch.setitem(sys.modules, "present_here", parent)
    monkeypatch.setitem(sys.modules, "present_here.part", present)
    for name in ("missing_here", "missing_here.part"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]  # to be removed again afterwards
    names = ("present_here.part", "present_here.other", "missing_here.part", "json.tool")
    monkeypatch.setattr(aliases, "_STAND_INS", dict.fromkeys(names, ("function", "json", "dumps")))
    monkeypatch.setitem(sys.modules, "present_here.other", ModuleType("x"))
    del sys.modules["present_here.other"]
    aliases.add_missing_modules()
    assert sys.modules["present_here.part"] is present
    assert sys.modules["present_here.other"].function is json.dumps
    assert parent.other is sys.modules["present_here.other"]  # type: ignore[attr-defined]
    assert sys.modules["missing_here"].part.function is json.dumps  # type: ignore[attr-defined]
    assert not hasattr(sys.modules["json.tool"], "function")
    assert aliases.stand_ins_in_use() == ["present_here.part", "present_here.other", "missing_here.part"]


@pytest.mark.parametrize(
    ("older", "newer"), [("0.9.1", "0.29.2+cpu"), ("1.13.1+cu117", "2.0"), ("2.6.0", "2.7.0a0+git1")]
)
def test_the_stand_in_of_distutils_compares_releases(older: str, newer: str) -> None:
    _, module, name = aliases._STAND_INS["distutils.version"]
    loose_version = getattr(importlib.import_module(module), name)
    assert loose_version(older) < loose_version(newer) and loose_version(newer) >= loose_version(older)


def test_a_spawned_worker_can_load_images(facts: Any) -> None:
    """Fault 5."""
    assert facts["spawned"] == [[2, 3, 8, 8], [2, 3, 16, 16]]


# --- several copies of BasicSR ------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with another BasicSR, 1.5.0, that works like the installed one."""
    package = tmp_path / "clone" / "basicsr"
    package.mkdir(parents=True)
    real = Path(basicsr.__file__).parent
    code = f"__path__ = [{str(real)!r}]\nexec(open({str(real / '__init__.py')!r}).read())\n__version__ = '1.5.0'\n"
    (package / "__init__.py").write_text(code)
    return package.parent


def test_one_copy_is_no_matter() -> None:
    assert len(duplicate_installs.find_copies()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        duplicate_installs.warn_about_copies(True)


def test_a_second_copy_is_named_and_that_basicsr_was_imported_before(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(clone)
    with pytest.warns(UserWarning, match="2 copies of BasicSR") as caught:
        duplicate_installs.warn_about_copies(True)
    text = str(caught[0].message)
    assert f"Used: {Path(basicsr.__file__).resolve().parent} (imported before esc_arch)" in text
    assert f"Not used: {(clone / 'basicsr').resolve()}" in text


def test_the_first_copy_on_the_path_is_used_and_left_alone_if_of_another_version(clone: Path, tmp_path: Path) -> None:
    code = """
import logging
logging.basicConfig()
import esc_arch, basicsr.train
print(basicsr.__file__, hasattr(basicsr.train.load_resume_state, "_esc_arch_original"))
"""
    run = run_code(code, tmp_path, path=(clone,))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == f"{clone / 'basicsr' / '__init__.py'} False"
    assert "2 copies of BasicSR" in run.stderr
    assert f"Used: {(clone / 'basicsr').resolve()} (first on the path)" in run.stderr
    assert f"Not used: {Path(basicsr.__file__).resolve().parent}" in run.stderr
    assert f"fixes faults of basicsr 1.4.2; {clone / 'basicsr'} is left as it is: this is 1.5.0." in run.stderr


def test_another_version_is_not_patched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def make(original: Any) -> Any:
        raise AssertionError("patched")

    monkeypatch.setattr(patches, "PATCHES", [("basicsr.train", "load_resume_state", make, "")])
    monkeypatch.setattr(basicsr, "__version__", "1.3.5")
    with caplog.at_level(logging.WARNING, logger="esc_arch"):
        esc_arch.compat.apply_patches()
    assert "is left as it is: this is 1.3.5." in caplog.text


def test_other_contents_of_the_same_version_are_not_patched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even in part."""
    monkeypatch.setattr(patches, "PATCHES", [("basicsr.train", "load_resume_state", lambda original: None, "")])
    patches.patch("basicsr.train", "later", "")(lambda original: None)
    before = basicsr.train.load_resume_state
    with caplog.at_level(logging.WARNING, logger="esc_arch"):
        esc_arch.compat.apply_patches()
    assert basicsr.train.load_resume_state is before
    assert "is left as it is: it has no basicsr.train.later." in caplog.text


# --- distributions of other names ---------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the metadata of a distribution on the path, as pip does."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)

    def install(name: str, version: str, **files: str) -> None:
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for file, content in files.items():
            (folder / file.replace("top_level", "top_level.txt")).write_text(content)

    return install


def test_distributions_of_any_name(install: Any) -> None:
    install("basicsr-fixed", "1.4.2", top_level="basicsr\n")
    install("other-basicsr", "1.4.4", RECORD="basicsr/__init__.py,sha256=x,1\n")
    install("mine", "1.0", top_level="mine\n", RECORD="mine/basicsr/__init__.py,sha256=x,1\n")
    install("extension", "1.0", RECORD="basicsr_extension/__init__.py,sha256=x,1\n")
    found = duplicate_installs.find_distributions()
    assert found.keys() == {"basicsr", "basicsr-fixed", "other-basicsr"}
    assert found["other-basicsr"].version == "1.4.4"


def test_two_distributions_are_never_used_in_silence(install: Any, recwarn: pytest.WarningsRecorder) -> None:
    duplicate_installs.warn_about_copies(False)
    assert not recwarn.list
    install("basicsr-fixed", "1.4.2", top_level="basicsr\n")
    duplicate_installs.warn_about_copies(False)
    (text,) = (str(warning.message) for warning in recwarn.list)
    assert "basicsr 1.4.2" in text and "basicsr-fixed 1.4.2" in text and "replace each other's" in text
    assert "pip uninstall basicsr-fixed basicsr, then basicsr setup-training" in text


# --- BasicSR's own scripts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train", "test"])
def test_a_script_of_a_clone_says_how_to_start_instead(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "basicsr" / f"{script}.py"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
    with pytest.warns(UserWarning, match=f"{path} is run as a script.* Start `basicsr {script} -opt FILE` instead"):
        duplicate_installs.warn_about_script()


@pytest.mark.parametrize("path", [None, "train.py", "basicsr/other.py"])
def test_other_scripts_do_not(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", path, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        duplicate_installs.warn_about_script()
