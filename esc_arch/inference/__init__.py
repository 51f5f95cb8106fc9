"""From a checkpoint to enlarged images: networks ready for use, images of any size, files and video."""

from .network import Upscaler, load

__all__ = ["Upscaler", "load"]
