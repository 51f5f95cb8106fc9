"""BasicSR finds the networks and layers by name, in whatever order things are imported."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY, Registry
from fresh import run_code
from networks import SMALL, image, normal, randomise
from other_packages import OUR_NAMES, write_project

import esc_arch
from esc_arch.checkpoints.conversion import build_network as build_recognised
from esc_arch.names import without_own
from esc_arch.register import others_of_our_names, register
from esc_arch.tools.benchmark.networks import named as networks_to_measure

ATTENTION = {"dim": 16, "window_size": 8, "num_heads": 2}


@pytest.mark.parametrize("name", ["ESC", "ConvAttn", "FlashWindowAttention"])
def test_registered_under_its_name(name: str) -> None:
    assert ARCH_REGISTRY.get(name) is getattr(esc_arch, name)


@pytest.mark.usefixtures("basicsr_log")
def test_build_network() -> None:
    options = {"type": "ESC", **SMALL, "attn_type": "SDPA"}
    net = build_network(options)
    assert type(net) is esc_arch.ESC
    assert options["type"] == "ESC"
    assert randomise(net)(image(1, 3, 5, 7)).shape == (1, 3, 10, 14)


@pytest.mark.usefixtures("basicsr_log")
def test_build_layers() -> None:
    x, lk = normal(1, 16, 9, 11), normal(4, 4, 13, 13)
    conv_attn = build_network({"type": "ConvAttn", "dim": 16, "pdim": 4})
    assert type(conv_attn) is esc_arch.ConvAttn
    assert conv_attn(x, lk).shape == x.shape
    alone = build_network({"type": "ConvAttn", "dim": 16, "pdim": 4, "kernel_size": 5, "own_kernel": True})
    assert alone(x).shape == x.shape
    attention = build_network({"type": "FlashWindowAttention", **ATTENTION, "attn_type": "Naive"})
    assert type(attention) is esc_arch.FlashWindowAttention
    assert attention(x).shape == x.shape


@pytest.mark.usefixtures("basicsr_log")
def test_build_network_passes_errors_on() -> None:
    with pytest.raises(ValueError, match="window_size is 0"):
        build_network({"type": "ESC", **SMALL, "window_size": 0})
    with pytest.raises(TypeError, match="kernel_sise"):
        build_network({"type": "ConvAttn", "dim": 16, "pdim": 4, "kernel_sise": 13})


# --- registering -------------------------------------------------------------------------------------------------


def a_class(name: str, module: str) -> type:
    return type(name, (torch.nn.Module,), {"__module__": module})


def test_register_uses_the_class_name_or_the_names_given() -> None:
    registry = Registry("arch")
    net = a_class("Net", "esc_arch.archs.net_arch")
    register(registry, net, Old=net, Older=net)
    names = ["Net", "Old", "Older"]
    assert dict(iter(registry)) == dict.fromkeys([*names, *(f"esc_arch.{name}" for name in names)], net)


def test_register_renews_an_earlier_import() -> None:
    registry = Registry("arch")
    old, new = (a_class("Net", "esc_arch.archs.net_arch") for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(registry, old)
        register(registry, new)
    assert registry.get("Net") is registry.get("esc_arch.Net") is new


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("module", ["other.archs.net_arch", "esc_archive", "basicsr.archs.net_arch"])
def test_register_leaves_a_name_to_other_code(module: str, order: str) -> None:
    registry = Registry("arch")
    ours, other = a_class("Net", "esc_arch.archs.net_arch"), a_class("Net", module)
    registrations: list[Callable[[], Any]] = [lambda: registry.register(other), lambda: register(registry, ours)]
    if order == "after":
        registrations = [lambda: register(registry, ours), lambda: registry.register()(other)]
    with pytest.warns(
        UserWarning, match=f"'Net' in BasicSR's arch registry is {module}.Net, .* 'esc_arch.Net'"
    ) as all_:
        for each in registrations:
            each()
    assert len(all_) == 1
    assert registry.get("Net") is other
    assert registry.get("esc_arch.Net") is ours
    assert others_of_our_names(registry) == {"Net": other}
    assert without_own(dict(iter(registry))) == dict(iter(registry))
    with pytest.raises(AssertionError, match="already registered"):  # between two others, as always
        registry.register(a_class("Net", "third"))


def test_a_name_with_a_suffix_is_another() -> None:
    registry = Registry("arch")
    ours, other = a_class("Net", "esc_arch.archs.net_arch"), a_class("Net", "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(registry, ours)
        registry.register(suffix="project")(other)
        registry.register(ours)  # as those do who import it from here
    assert others_of_our_names(registry) == {}
    assert without_own(dict(iter(registry))) == {"Net": ours, "Net_project": other}


# --- orders of importing, each in a process of its own -------------------------------------------------------------

IMPORT_BASICSR_IN_VAIN = """
import importlib.abc, sys

class WithoutFunctionalTensor(importlib.abc.MetaPathFinder):
    '''What newer releases of torchvision do.'''
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision.transforms.functional_tensor":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, WithoutFunctionalTensor())
try:
    import basicsr
except ModuleNotFoundError as error:
    assert error.name == "torchvision.transforms.functional_tensor", error
else:
    raise AssertionError("basicsr was imported")
assert any(name.startswith("basicsr.") for name in sys.modules), "nothing was left behind: this proves nothing"
"""

BUILD = """
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
small = dict(dim=8, pdim=4, kernel_size=3, n_blocks=1, conv_blocks=1, window_size=4, num_heads=2)
for name, options in {
    "ESC": small, "ConvAttn": dict(dim=8, pdim=4), "FlashWindowAttention": dict(dim=8, window_size=4, num_heads=2)
}.items():
    assert ARCH_REGISTRY.get(name) is getattr(esc_arch, name), name
    assert type(build_network({"type": name, **options})) is getattr(esc_arch, name), name
"""

IMPORT_AGAIN = """
import warnings
first = esc_arch.ESC
import esc_arch
assert esc_arch.ESC is first
for name in [name for name in sys.modules if name.partition(".")[0] == "esc_arch"]:
    del sys.modules[name]
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    import esc_arch
assert esc_arch.ESC is not first
"""

IMPORT_BOTH = """
import importlib, json, sys, types, warnings
from torchvision.transforms.functional import rgb_to_grayscale
module = sys.modules["torchvision.transforms.functional_tensor"] = types.ModuleType("functional_tensor")
module.rgb_to_grayscale = rgb_to_grayscale  # as many a script helps itself

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in sys.argv[1:]:
        importlib.import_module(name)
from basicsr.archs import build_network
from basicsr.utils import registry
facts = {"warnings": [str(warning.message) for warning in caught if "registry is" in str(warning.message)]}
for kind in ("ARCH", "MODEL", "DATASET", "LOSS"):
    entries = getattr(registry, f"{kind}_REGISTRY")._obj_map
    facts[f"{kind}_REGISTRY"] = {name: entry.__module__ for name, entry in entries.items()}
facts["built"] = [type(build_network({"type": name})).__module__ for name in ("esc_arch.ESC", "ESCFP")]
print(json.dumps(facts))
"""


def test_import_after_a_failed_import_of_basicsr_and_once_more(tmp_path: Path) -> None:
    code = IMPORT_BASICSR_IN_VAIN + "import esc_arch\n" + BUILD + IMPORT_AGAIN + BUILD
    run = run_code(code + 'print("all is well")', tmp_path)
    assert run.returncode == 0, run.stderr
    assert "all is well" in run.stdout


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_package_with_names_of_ours(order: str, tmp_path: Path) -> None:
    """It has them, whether it is imported before or after, and ours have names of their own."""
    write_project(tmp_path)
    theirs = ["hat.archs", "hat.models", "hat.data", "hat.losses"]
    modules = [*theirs, "esc_arch"] if order == "before" else ["esc_arch", *theirs]
    run = run_code(f"import sys; sys.argv[1:] = {modules}" + IMPORT_BOTH, tmp_path)
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    for registry, names in OUR_NAMES.items():
        for name in names:
            assert facts[registry][name].startswith("hat.")
            assert facts[registry][f"esc_arch.{name}"].startswith("esc_arch.")
            assert len([text for text in facts["warnings"] if text.startswith(f"'{name}' in ")]) == 1
    assert len(facts["warnings"]) == sum(map(len, OUR_NAMES.values()))
    assert facts["MODEL_REGISTRY"]["ESCRealGANModel"] == "esc_arch.models.real_models"
    assert facts["ARCH_REGISTRY"]["ESCFP_project"] == "hat.archs"
    assert facts["built"] == ["esc_arch.archs.esc_arch", "esc_arch.archs.esc_fp_arch"]


def test_recognised_networks_are_ours_whoever_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that loads a checkpoint by its weights builds them so."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, "ESC", a_class("ESC", "other"))
    for name in ("ESC", "esc_arch.ESC"):
        assert type(build_recognised({"type": name, **SMALL})) is esc_arch.ESC
    (preset,) = networks_to_measure("ESC", [2])
    assert type(preset.build()) is esc_arch.ESC and preset.published == "ESC"
    (asked_for,) = networks_to_measure("esc_arch.ESC: {upscaling_factor: 2}", [])
    assert asked_for.published == "ESC"


IMPORT_FIRST = """
import importlib, os, esc_arch
for module in ("data.hr_images", "models.metrics", "options.files", "training.data_order"):
    process = os.fork()
    if process == 0:
        importlib.import_module(f"esc_arch.{module}")
        from basicsr.utils import registry
        assert "ESC" in registry.ARCH_REGISTRY and "ESCModel" in registry.MODEL_REGISTRY
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0, module
"""


def test_modules_that_are_imported_before_basicsr(tmp_path: Path) -> None:
    """They lead to the import of BasicSR, with which our classes are registered, which import those modules."""
    run = run_code(IMPORT_FIRST, tmp_path)
    assert run.returncode == 0, run.stderr


def test_parts_are_found_without_an_import_of_their_own(tmp_path: Path) -> None:
    code = (
        "import esc_arch\nassert {'ESC', 'archs', 'graphs'} <= set(dir(esc_arch))\nprint(esc_arch.archs.ESC.__name__)"
    )
    assert run_code(code, tmp_path).stdout == "ESC\n"
