"""A package of another project, as people have them beside BasicSR: some of its names are ours, too."""

from __future__ import annotations

from pathlib import Path

__all__ = ["OUR_NAMES", "write_project"]

#: What `write_project` registers under names of ours, by BasicSR's registry.
OUR_NAMES = {
    "ARCH_REGISTRY": ["ESC", "ESCRIB"],
    "MODEL_REGISTRY": ["ESRModel", "RealHATGANModel"],
    "DATASET_REGISTRY": ["DownsampleImageDataset"],
    "LOSS_REGISTRY": ["SSIMLoss"],
}

_MODULES = {
    "__init__": "",
    "archs": """
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class HAT(nn.Module):
    def __init__(self, upscale, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, 3 * upscale**2, 3, 1, 1))
        self.shuffle = nn.PixelShuffle(upscale)

    def forward(self, x):
        return self.shuffle(self.body(x))


@ARCH_REGISTRY.register()
class ESC(HAT):
    pass


@ARCH_REGISTRY.register()
class ESCRIB(HAT):
    pass


@ARCH_REGISTRY.register(suffix="project")
class ESCFP(HAT):
    pass
""",
    "models": """
from basicsr.models.sr_model import SRModel
from basicsr.models.srgan_model import SRGANModel
from basicsr.utils.registry import MODEL_REGISTRY


@MODEL_REGISTRY.register()
class HATModel(SRModel):
    pass


@MODEL_REGISTRY.register()
class ESRModel(SRModel):
    def __init__(self, opt):
        self.own = opt["train"]["losses"], opt["train"]["freeze"], opt["val"]["protocol"], opt["val"]["tb_images"]
        super().__init__(opt)


@MODEL_REGISTRY.register()
class RealHATGANModel(SRGANModel):
    pass
""",
    "data": """
import multiprocessing

from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import DATASET_REGISTRY


@DATASET_REGISTRY.register()
class HATDataset(PairedImageDataset):
    def __getitem__(self, index):
        process = multiprocessing.current_process().name.partition("-")[0]
        print(f"loaded in {process} by {multiprocessing.get_start_method()}", flush=True)
        return super().__getitem__(index)


@DATASET_REGISTRY.register()
class DownsampleImageDataset(PairedImageDataset):
    def __init__(self, opt):
        self.size = opt["gt_size"], opt["round_lq"]
        super().__init__(opt)
""",
    "losses": """
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn


@LOSS_REGISTRY.register()
class SSIMLoss(nn.Module):
    def __init__(self, loss_weight=1.0, levels=3):
        super().__init__()

    def forward(self, x, y):
        return (x - y).square().mean()
""",
}


def write_project(folder: Path, name: str = "hat") -> Path:
    """Make the package in a folder."""
    package = folder / name
    package.mkdir()
    for module, code in _MODULES.items():
        (package / f"{module}.py").write_text(code, encoding="utf-8")
    return package
