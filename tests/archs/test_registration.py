"""BasicSR finds the networks and layers by name, in whatever order things are imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY, Registry
from networks import SMALL, image, normal, randomise

import esc_arch
from esc_arch.registry import register

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


# --- the decorator -------------------------------------------------------------------------------------------------


def a_class(name: str, module: str) -> type:
    return type(name, (torch.nn.Module,), {"__module__": module})


def test_register_uses_the_class_name_or_the_names_given() -> None:
    registry = Registry("arch")
    net = a_class("Net", "esc_arch.archs.net_arch")
    assert register(registry)(net) is net
    assert register(registry, "Old", "Older")(net) is net
    assert list(registry) == [("Net", net), ("Old", net), ("Older", net)]


def test_register_renews_an_earlier_import() -> None:
    registry = Registry("arch")
    old, new = (a_class("Net", "esc_arch.archs.net_arch") for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(registry)(old)
        register(registry)(new)
    assert registry.get("Net") is new


@pytest.mark.parametrize("module", ["other.archs.net_arch", "esc_archive", "basicsr.archs.net_arch"])
def test_register_leaves_a_name_to_other_code(module: str) -> None:
    registry = Registry("arch")
    other = a_class("Net", module)
    registry.register(other)
    message = f"'Net' is in BasicSR's arch registry already, from {module}: that one is kept"
    with pytest.warns(UserWarning, match=message):
        register(registry)(a_class("Net", "esc_arch.archs.net_arch"))
    assert registry.get("Net") is other


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

NAME_TAKEN = """
import sys, types, warnings
from torchvision.transforms.functional import rgb_to_grayscale
module = sys.modules["torchvision.transforms.functional_tensor"] = types.ModuleType("functional_tensor")
module.rgb_to_grayscale = rgb_to_grayscale  # as many a script helps itself
import basicsr
from basicsr.utils.registry import ARCH_REGISTRY

@ARCH_REGISTRY.register()
class ConvAttn:
    pass

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import esc_arch
texts = [str(warning.message) for warning in caught if "registry already" in str(warning.message)]
assert len(texts) == 1 and texts[0].startswith("'ConvAttn' is in BasicSR's arch registry already, from __main__"), texts
assert ARCH_REGISTRY.get("ConvAttn") is ConvAttn
assert ARCH_REGISTRY.get("ESC") is esc_arch.ESC
assert ARCH_REGISTRY.get("FlashWindowAttention") is esc_arch.FlashWindowAttention
"""


def test_import_after_a_failed_import_of_basicsr_and_once_more(run_script: Callable[..., Any]) -> None:
    code = IMPORT_BASICSR_IN_VAIN + "import esc_arch\n" + BUILD + IMPORT_AGAIN + BUILD
    run = run_script(code + 'print("all is well")')
    assert run.status == 0, run.err
    assert "all is well" in run.out


def test_name_taken_before_the_import(run_script: Callable[..., Any]) -> None:
    run = run_script(NAME_TAKEN + 'print("all is well")')
    assert run.status == 0, run.err
    assert "all is well" in run.out
