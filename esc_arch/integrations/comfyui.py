"""Nodes of ComfyUI that enlarge by an ESC checkpoint, exactly and in bounded memory.

ComfyUI finds them by a file in `custom_nodes` with the line `from esc_arch.integrations.comfyui import *`.
"""

from __future__ import annotations

from typing import Any

import folder_paths
import numpy as np
import torch
from comfy import model_management
from comfy.utils import ProgressBar
from torch import Tensor

from esc_arch.tools.upscale.network import Upscaler, load
from esc_arch.tools.upscale.upscaling import Settings, enlarge_pixels

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

#: Bytes of the GPU that ComfyUI is asked to free of other models; with less, parts are smaller.
_ROOM = 4 * 2**30


class LoadESC:
    """Loads a checkpoint from the folder `models/upscale_models`."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("ESC_MODEL",), "load", "loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model_name": (folder_paths.get_filename_list("upscale_models"),)}}

    def load(self, model_name: str) -> tuple[Upscaler]:
        path = folder_paths.get_full_path_or_raise("upscale_models", model_name)
        device = model_management.get_torch_device()
        return (load(path, device=device if device.type == "cuda" else "cpu"),)


class UpscaleWithESC:
    """Enlarges images (B, H, W, 3 or 4) in 0 .. 1; `max_memory`: GiB of the whole process, 0 for what is free."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "upscale", "image/upscaling"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        limit = ("FLOAT", {"default": 0.0, "min": 0.0, "max": 4096.0, "step": 0.1})
        return {"required": {"model": ("ESC_MODEL",), "image": ("IMAGE",)}, "optional": {"max_memory": limit}}

    def upscale(self, model: Upscaler, image: Tensor, max_memory: float = 0.0) -> tuple[Tensor]:
        settings = Settings(max_memory=int(max_memory * 2**30) or None)
        model_management.free_memory(_ROOM, model.device)
        bar, results = ProgressBar(1000 * len(image)), []
        for index, pixels in enumerate(image.float().clamp(0, 1).cpu().numpy()):

            def show(part: float, done: int = index) -> None:  # an interrupt by the user is raised here
                bar.update_absolute(int(1000 * (done + part)))

            results.append(np.concatenate(list(enlarge_pixels(model, pixels, settings, progress=show))))
        return (torch.from_numpy(np.stack(results)),)


NODE_CLASS_MAPPINGS = {"LoadESC": LoadESC, "UpscaleWithESC": UpscaleWithESC}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadESC": "Load ESC", "UpscaleWithESC": "Upscale with ESC"}
