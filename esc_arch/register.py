"""Registration in BasicSR's registries: once, in any order of imports, and next to other packages."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from typing import TYPE_CHECKING, Any

from .names import OWN, without_own

if TYPE_CHECKING:
    from basicsr.utils.registry import Registry

__all__ = ["others_of_our_names", "register", "register_all"]


def register_all() -> None:
    """Register every class of esc_arch that option files can name."""
    from basicsr.utils import registry

    # From where they are defined: one of the packages may be in the midst of its import, which led here
    from . import archs
    from .data.arbitrary_scale_dataset import ArbitraryScaleDataset
    from .data.downsample_dataset import DownsampleImageDataset
    from .losses.image_losses import FFTLoss, LPIPSLoss, SSIMLoss
    from .models.esc_lte_model import ESCLTEModel
    from .models.esc_model import ESCModel
    from .models.real_models import ESCRealGANModel, ESCRealMSEModel

    register(registry.ARCH_REGISTRY, *(getattr(archs, name) for name in archs.__all__))
    register(
        registry.MODEL_REGISTRY,
        *(ESCModel, ESCLTEModel, ESCRealMSEModel, ESCRealGANModel),
        # Their names in published option files
        ESRModel=ESCModel,
        RealHATMSEModel=ESCRealMSEModel,
        RealHATGANModel=ESCRealGANModel,
    )
    register(registry.DATASET_REGISTRY, ArbitraryScaleDataset, DownsampleImageDataset)
    register(registry.LOSS_REGISTRY, FFTLoss, LPIPSLoss, SSIMLoss)


def register(registry: Registry, *classes: type, **aliases: type) -> None:
    """Register classes under their names, and under `OWN` + name.

    BasicSR's own registration fails with an AssertionError when a name is taken. Here a class of another package has
    the name, whether it is registered before ours or after, with a warning that says so. A name taken by an earlier
    import of esc_arch is renewed.
    """
    _give_way(registry)
    for name, cls in ({each.__name__: each for each in classes} | aliases).items():
        registry._obj_map[OWN + name] = cls
        if _is_ours(registry._obj_map.get(name, cls)):
            registry._obj_map[name] = cls
        else:
            _warn(registry, name)


def others_of_our_names(registry: Registry) -> dict[str, Any]:
    """What other packages have registered under names of ours, by name."""
    names = [name.removeprefix(OWN) for name in without_own(registry._obj_map) if name.startswith(OWN)]
    return {name: registry._obj_map[name] for name in names}


def _give_way(registry: Registry) -> None:
    """Let code that registers later have a name of ours."""

    def do_register(name: str, entry: Any, *suffix: str | None) -> None:
        full_name = "_".join([name, *filter(None, suffix)])
        ours = full_name in registry._obj_map and _is_ours(registry._obj_map[full_name])
        if ours:
            del registry._obj_map[full_name]
        type(registry)._do_register(registry, name, entry, *suffix)
        if ours and not _is_ours(entry):
            _warn(registry, full_name)

    registry._do_register = do_register


def _is_ours(entry: Any) -> bool:
    return str(entry.__module__).startswith(OWN)


def _warn(registry: Registry, name: str) -> None:
    if multiprocessing.current_process().name != "MainProcess" or os.environ.get("RANK", "0") != "0":
        return  # workers and other ranks register the same
    entry = registry._obj_map[name]
    warnings.warn(
        f"{name!r} in BasicSR's {registry._name} registry is {entry.__module__}.{entry.__name__}, also where option "
        f"files name it. esc_arch's own is there as {OWN + name!r}.",
        stacklevel=4,
    )
