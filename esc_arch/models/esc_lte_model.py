"""Training at scales drawn per batch, and testing at any scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esc_arch.data.arbitrary_scale_dataset import ScaleRange
from esc_arch.models.esc_model import ESCModel
from esc_arch.modules.lte import query_grid
from esc_arch.ops.resize import matlab_resize, round_to_8bit, scale_pair, scaled_size
from esc_arch.problems import Problem

__all__ = ["ESCLTEModel", "draw_batch"]


class ESCLTEModel(ESCModel):
    """`ESCModel` for networks that are queried for the colours at any points, such as `ESCLTE`.

    Training: from the HR patches of `ArbitraryScaleDataset` it makes LQ patches, of one scale for a batch, and random
    query pixels (`draw_batch`). The draws depend on `manual_seed`, the process and the iteration alone, so that they
    are the same in a resumed run. Other pairs of LQ and GT are enlarged by `upscaling_factor`.

    Validation and testing: every data set at its own `scale` (without one, `upscaling_factor`). The image is padded as
    by `ESCModel`; only the pixels of the enlarged image are queried, so that they lie where they do without padding.
    ``val: metrics: ...: crop_border: scale`` crops what the data set's scale is, rounded up.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self._scale: Any = self.get_bare_model(self.net_g).upscaling_factor
        self._query: dict[str, Tensor] = {}

    @classmethod
    def option_problems(cls, opt: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().option_problems(opt)
        if (opt.get("train") or {}).get("perceptual_opt"):
            message = "ESCLTEModel trains on single pixels, and has no images for it. Remove it"
            yield Problem("train:perceptual_opt", message)

    def feed_data(self, data: dict[str, Any]) -> None:
        self._query = {}
        if "lq" not in data:
            random = np.random.default_rng([self.opt.get("manual_seed") or 0, self.opt["rank"], self._iteration])
            scales = ScaleRange.of(self.opt["datasets"]["train"])
            data, self._query = draw_batch(data["gt"].to(self.device), scales, random)
        super().feed_data(data)

    def run_network(self, net: nn.Module, share: slice) -> Tensor:
        output: Tensor = net(self.lq[share], **{name: points[share] for name, points in self._query.items()})
        return output

    @property
    def enlarges_evenly(self) -> bool:
        down, across = scale_pair(self._scale)
        return down == across

    def enlarge(self, image: Tensor) -> Tensor:
        size = scaled_size(image.shape[-2:], self._scale)
        padded = self.pad(image)
        part = (image.shape[-2] / padded.shape[-2], image.shape[-1] / padded.shape[-1])
        coords, cell = query_grid(size, device=image.device, part=part)
        points = self.evaluate(padded, coords=coords.expand(len(image), -1, -1), cell=cell.expand(len(image), -1))
        return points.unflatten(-1, size)

    def metric_options(self, metric: Mapping[str, Any]) -> dict[str, Any]:
        border = {"crop_border": math.ceil(max(scale_pair(self._scale)))}
        return {**metric, **(border if metric.get("crop_border") == "scale" else {})}

    def nondist_validation(self, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        self._scale = dataloader.dataset.opt.get("scale") or self.get_bare_model(self.net_g).upscaling_factor
        super().nondist_validation(dataloader, *args, **kwargs)


def draw_batch(
    hr: Tensor, scales: ScaleRange, random: np.random.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch for training at one random scale.

    The same part of each HR patch, as large as the scale makes an LQ patch, is reduced by MATLAB's bicubic and rounded
    to 8 bit; and the same number of its pixels is drawn without replacement.

    Args:
        hr: (B, 3, hr_size, hr_size), RGB in 0 .. 1.

    Returns:
        `lq` (B, 3, lq_size, lq_size) and `gt` (B, 3, Q); and `coords` (B, Q, 2) and `cell` (B, 2) for the network.
    """
    side = round(scales.lq_size * random.uniform(scales.scale_min, scales.scale_max))
    top, left = random.integers(hr.shape[-1] - side, size=2, endpoint=True)
    hr = hr[..., top : top + side, left : left + side]
    lq = round_to_8bit(matlab_resize(hr, (scales.lq_size, scales.lq_size)))
    # One permutation for all patches, shifted differently in each
    pixels = random.permutation(side**2)[: scales.points] + random.integers(side**2, size=(len(hr), 1))
    index = torch.from_numpy(pixels % side**2).to(hr.device)
    gt = hr.flatten(2).gather(2, index[:, None].expand(-1, hr.shape[1], -1))
    coords, cell = query_grid((side, side), device=hr.device)
    return {"lq": lq, "gt": gt}, {"coords": coords[index], "cell": cell.expand(len(hr), -1)}
