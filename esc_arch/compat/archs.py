"""Patches for `basicsr.archs`, whose networks load weights that option files do not name: no code in them is run.

PyTorch's default refuses everything but tensors and plain values; `torch.hub` and an environment variable undo it.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from esc_arch.errors import UserError

from .patches import Original, patch

__all__ = ["tensors_only"]

_ON, _OFF = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_FURTHER = "further weights are read safely"


@contextmanager
def tensors_only(what: str) -> Iterator[None]:
    """Within this, every `torch.load` takes tensors and plain values alone, whatever its caller or environment says.

    UserError if a file holds anything else, or is damaged; it names `what`: the weights, and where they are looked for.
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
def vgg_init(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
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


@patch("basicsr.archs.inception", "fid_inception_v3", "FID's weights are read safely")
def fid_inception_v3(original: Original) -> Any:
    from basicsr.archs.inception import LOCAL_FID_WEIGHTS

    hub = Path(torch.hub.get_dir(), "checkpoints")
    with tensors_only(f"FID's Inception weights ({Path(LOCAL_FID_WEIGHTS).absolute()} or in {hub})"):
        return original()


@patch("basicsr.archs.spynet_arch", "SpyNet.__init__", _FURTHER)
@patch("basicsr.archs.tof_arch", "SPyNetTOF.__init__", _FURTHER)
@patch("basicsr.archs.basicvsr_arch", "EDVRFeatureExtractor.__init__", _FURTHER)
@patch("basicsr.archs.dfdnet_arch", "DFDNet.__init__", _FURTHER)
def init_with_weights(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    given = [str(value) for value in (*args, *kwargs.values()) if isinstance(value, str)]
    with tensors_only(f"{type(self).__name__}'s weights ({', '.join(given)})"):
        original(self, *args, **kwargs)
