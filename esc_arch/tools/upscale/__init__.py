"""From a checkpoint to enlarged images: networks ready for use, images of any size, files and video."""

from .network import Upscaler, load
from .upscaling import upscale

__all__ = ["Upscaler", "load", "upscale"]
