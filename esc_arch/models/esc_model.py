"""The model type that reproduces the published evaluation."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.models.comparison import Comparison
from esc_arch.ops.padding import reflect_pad_to_multiple
from esc_arch.registry import register

__all__ = ["ESCModel"]


@register(MODEL_REGISTRY, "ESCModel", "ESRModel")
class ESCModel(SRModel):
    """BasicSR's SRModel with the evaluation protocol of the paper. `ESRModel` is its name in published option files.

    The low-resolution image is padded at the bottom and the right by reflection to a multiple of the window, the
    network runs on all of it, and the output is cropped. SRModel runs the network on the image as it is, which
    gives another PSNR: the convolutions and the global pools see the padding.

    Options beyond SRModel's:

     - ``val: comparison: true`` writes, for each validation image, LR-bicubic, result and ground truth side by side
       with their PSNR to ``visualization/comparison/``, and logs the figures and their means.
    """

    lq: Tensor
    gt: Tensor
    output: Tensor

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        net = self.get_bare_model(self.net_g)
        self.window_size: int = opt["network_g"].get("window_size", getattr(net, "window_size", 1))
        self._comparison: Comparison | None = None
        self._lq_path = ""
        self._iteration = 0

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        super().update_learning_rate(current_iter, warmup_iter)
        self._iteration = current_iter

    def reduce_loss_dict(self, loss_dict: dict[str, Tensor]) -> dict[str, float]:
        """The losses as numbers, for the log. Training ends with the first that is none.

        Raises:
            UserError: a loss is infinite or not a number (fault 41); the message names the last checkpoint.
        """
        losses: dict[str, float] = super().reduce_loss_dict(loss_dict)
        nonsense = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        if nonsense:
            saved = max(Path(self.opt["path"]["training_states"]).glob("*.state"), key=_iteration_of, default=None)
            last = "Nothing was saved before" if saved is None else f"The last state is {saved}"
            raise UserError(
                f"Training stopped at iteration {self._iteration}: {', '.join(nonsense)}. {last}, and nothing has been "
                f"saved since. Lower train: optim_g: lr, or look for broken images, and go on with --auto_resume."
            )
        return losses

    def feed_data(self, data: dict[str, Any]) -> None:
        if "gt" not in data and hasattr(self, "gt"):
            del self.gt  # of the last training batch: SRModel would measure the first validation image with it
        super().feed_data(data)
        self._lq_path = data["lq_path"][0] if "lq_path" in data else ""

    def test(self) -> None:
        image = self.lq
        self.lq = reflect_pad_to_multiple(image, self.window_size)
        super().test()
        scale = self.output.shape[-1] // self.lq.shape[-1]
        self.lq = image
        self.output = self.output[..., : image.shape[-2] * scale, : image.shape[-1] * scale]

    def get_current_visuals(self) -> OrderedDict[str, Tensor]:
        visuals: OrderedDict[str, Tensor] = super().get_current_visuals()
        if self._comparison is not None:
            self._comparison.add(self._lq_path, visuals)
        return visuals

    def nondist_validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool) -> None:
        if self.opt["val"].get("comparison"):
            self._comparison = Comparison(
                self.opt["path"]["visualization"], dataloader.dataset.opt["name"], self.opt["network_g"]["type"]
            )
        super().nondist_validation(dataloader, current_iter, tb_logger, save_img)
        if self._comparison is not None:
            logging.getLogger("basicsr").info(self._comparison.summary())
            self._comparison = None


def _iteration_of(state: Path) -> int:
    """The number that a training state is named by; -1 for other files."""
    return int(state.stem) if state.stem.isdigit() else -1
