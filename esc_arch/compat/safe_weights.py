"""Replacements in basicsr 1.4.2 where it loads weights beside those that option files name: nothing in them is run.

PyTorch's default refuses everything but tensors and plain values, but `torch.hub`, which looks for files of these names
on the disk before it downloads them, asks for the opposite, and so may an environment variable.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from esc_arch.errors import UserError

from .patches import patch

__all__ = ["tensors_only"]

_ON, _OFF = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only(what: str) -> Iterator[None]:
    """Within this, every `torch.load` takes tensors and plain values alone, whatever its caller or environment says.

    Args:
        what: the weights, for messages, with the places they are looked for.

    Raises:
        UserError: a file holds anything else, or is damaged.
    """
    before = {name: os.environ.pop(name, None) for name in (_ON, _OFF)}
    os.environ[_ON] = "1"
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        # Its text advises to load the file without this protection
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds {refused[1]}, which could run code, and was not loaded" if refused else "is damaged"
        raise UserError(f"The file of {what} {reason}. Delete it and get it again from its publisher.") from error
    finally:
        del os.environ[_ON]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@patch("basicsr.archs.vgg_arch", "VGGFeatureExtractor.__init__", "VGG's weights are read safely, or missed by name")
def _vgg_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from basicsr.archs.vgg_arch import VGG_PRETRAIN_PATH

        places = f"{Path(VGG_PRETRAIN_PATH).absolute()} or in {Path(torch.hub.get_dir(), 'checkpoints')}"
        try:
            with tensors_only(f"the VGG19 weights ({places})"):
                original(self, *args, **kwargs)
        except OSError as error:  # URLError and time-outs are OSErrors
            raise UserError(
                f"The VGG19 weights for the perceptual loss could not be downloaded ({error}). Get the file "
                f"vgg19-dcbb9e9d.pth (PyTorch's VGG19) on another machine and put it at {places}."
            ) from error

    return __init__


@patch("basicsr.archs.inception", "fid_inception_v3", "FID's weights are read safely")
def _fid_inception_v3(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def fid_inception_v3() -> Any:
        from basicsr.archs.inception import LOCAL_FID_WEIGHTS

        hub = Path(torch.hub.get_dir(), "checkpoints")
        with tensors_only(f"FID's Inception weights ({Path(LOCAL_FID_WEIGHTS).absolute()} or in {hub})"):
            return original()

    return fid_inception_v3


def _with_safe_path(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of a network whose constructor takes the path of further weights."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = [str(value) for value in (*args, *kwargs.values()) if isinstance(value, str)]
        with tensors_only(f"{type(self).__name__}'s weights ({', '.join(given)})"):
            original(self, *args, **kwargs)

    return __init__


for _module, _name in (
    ("spynet_arch", "SpyNet"),
    ("tof_arch", "SPyNetTOF"),
    ("basicvsr_arch", "EDVRFeatureExtractor"),
    ("dfdnet_arch", "DFDNet"),
):
    patch(f"basicsr.archs.{_module}", f"{_name}.__init__", "further weights are read safely")(_with_safe_path)
