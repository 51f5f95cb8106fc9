"""The two stages of training ESC-Real: Real-ESRGAN's degradations, by BasicSR's models, on CPU and GPU.

Real-ESRGAN: Wang et al., 2021, arXiv 2107.10833. Its published weights came from a training like this; HAT's option
files, which ESC's are made after, name the two types `RealHATMSEModel` and `RealHATGANModel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from basicsr.models.realesrgan_model import RealESRGANModel
from basicsr.models.realesrnet_model import RealESRNetModel
from basicsr.utils import DiffJPEG, USMSharp
from torch import Tensor

from esc_arch.models.esc_model import ESCModel
from esc_arch.problems import Problem

__all__ = ["ESCRealGANModel", "ESCRealMSEModel", "PairPool"]

#: Options that BasicSR's degradations need: of a stage, for which `2` is added in the second one, and of both.
_OF_STAGE = "resize_prob resize_range gaussian_noise_prob noise_range poisson_scale_range gray_noise_prob jpeg_range"
_NEEDED = (*_OF_STAGE.split(), *(f"{key}2" for key in _OF_STAGE.split()), "second_blur_prob", "scale", "gt_size")
#: Options of ESCModel's step, with the values that change nothing.
_STEP_OPTIONS: dict[str, tuple[Any, ...]] = {
    "amp": ("bf16",),
    "accumulate_grad": (1,),
    "gradient_clip": (),
    "nonfinite": ("stop",),
    "losses": (),
}
#: RealESRGANDataset cuts its images to squares of this side, from which the patches are cut.
_DATASET_SIZE = 400


class PairPool:
    """Mixes the pairs of many batches, because all pairs made together have the same degradations.

    While there is room for `size` pairs, batches are stored and returned as they are; then each is exchanged for pairs
    drawn from the pool. This is BasicSR's queue, draw for draw, without its conditions that there is CUDA and that the
    batch divides the size.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def exchange(self, lq: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
        """Take a batch in, and return as many pairs: lq (B, C, h, w) and gt (B, C, H, W)."""
        new = [(one.clone(), other.clone()) for one, other in zip(lq, gt, strict=True)]
        if len(self.pairs) + len(new) <= self.size:
            self.pairs += new
        elif self.pairs:
            self.pairs = [self.pairs[index] for index in torch.randperm(len(self.pairs))]
            lqs, gts = zip(*self.pairs[: len(new)], strict=True)
            self.pairs[: len(new)] = new
            return torch.stack(lqs), torch.stack(gts)
        return lq, gt


class _RealTraining:
    """Changes of BasicSR's two models; goes before them among the bases, and `ESCModel` after them.

    They run on the device of the options, not on CUDA only (fault 23). The pool of pairs takes any queue size; it is
    not saved, and a resumed run fills it again. Validation is `ESCModel`'s; sharpening, which needs more than 25
    pixels a side, is left to training.
    """

    usm_options: tuple[str, ...]
    device: Any
    is_train: bool
    lq: Tensor
    gt: Tensor

    def __init__(self, opt: dict[str, Any]) -> None:
        # Not the constructors of BasicSR's two models: they do just this, on CUDA
        ESCModel.__init__(self, opt)  # type: ignore[arg-type]
        self.jpeger = DiffJPEG(differentiable=False).to(self.device)
        # On CPUs `filter2D`, which comes next, takes contiguous images alone (fault 23)
        self.jpeger.register_forward_hook(lambda _, __, image: image.contiguous())
        self.usm_sharpener = USMSharp().to(self.device)
        self.pool = PairPool(int(opt.get("queue_size", 180)))

    @classmethod
    def option_problems(cls, opt: Mapping[str, Any]) -> Iterator[Problem]:
        """Invalid options of the degradations, with which BasicSR would fail in its first iterations."""
        yield from super().option_problems(opt)  # type: ignore[misc]
        if not opt.get("high_order_degradation", True):
            return
        for key in cls.usm_options:
            if not isinstance(opt.get(key), bool):
                yield Problem(key, f"{opt.get(key)!r} given; must be true or false: true sharpens this target")
        for key in _NEEDED:
            if opt.get(key) is None:
                yield Problem(key, f"missing; {opt['model_type']} makes LQ images with it")
        size, scale = opt.get("gt_size"), opt.get("scale")
        if isinstance(size, int) and isinstance(scale, int) and scale >= 1:
            if size < 1 or size % scale:
                yield Problem("gt_size", f"{size} given; must be a multiple of scale {scale}, such as {64 * scale}")
            if opt["datasets"].get("train", {}).get("type") == "RealESRGANDataset" and size > _DATASET_SIZE:
                message = f"{size} given; RealESRGANDataset cuts images to {_DATASET_SIZE} pixels: give no more"
                yield Problem("gt_size", message)

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch; in training LQ is made of it on the device: `gt` (B, 3, H, W), blur kernels (B, k, k)."""
        if self.is_train:
            contiguous = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in data.items()}
            super().feed_data(contiguous)  # type: ignore[misc]
        else:
            ESCModel.feed_data(self, data)  # type: ignore[arg-type]

    def _dequeue_and_enqueue(self) -> None:
        self.lq, self.gt = self.pool.exchange(self.lq, self.gt.contiguous())


class ESCRealMSEModel(_RealTraining, RealESRNetModel, ESCModel):
    """The first stage: an L1 loss. BasicSR's `RealESRNetModel`, with the changes of `_RealTraining`.

    Options beyond `ESCModel`'s stand at the top level of the file: ``gt_usm`` (true: sharpen the target),
    ``queue_size`` (pairs in the pool, 180), ``gt_size`` and the degradations' probabilities and ranges, as in
    options/train_ESC_Real_x4_mse.yml. ``high_order_degradation: false`` trains with the data set's pairs as they are.
    """

    usm_options = ("gt_usm",)


class ESCRealGANModel(_RealTraining, RealESRGANModel, ESCModel):
    """The second stage: L1, perceptual and adversarial loss. BasicSR's `RealESRGANModel`, changed likewise.

    Options are those of `ESCRealMSEModel`, with ``l1_gt_usm``, ``percep_gt_usm`` and ``gan_gt_usm`` (which losses see
    the sharpened target) in place of ``gt_usm``; and ``network_d``, ``train: optim_d, perceptual_opt, gan_opt``.
    """

    usm_options = ("l1_gt_usm", "percep_gt_usm", "gan_gt_usm")

    def setup_optimizers(self) -> None:
        ESCModel.setup_optimizers(self)
        options = dict(self.opt["train"]["optim_d"])
        self.optimizer_d = self.get_optimizer(options.pop("type"), self.net_d.parameters(), **options)
        self.optimizers.append(self.optimizer_d)

    @classmethod
    def option_problems(cls, opt: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().option_problems(opt)
        train = opt["train"]
        for key, neutral in _STEP_OPTIONS.items():
            if train.get(key) not in (None, *neutral):
                why = f"{opt['model_type']}, whose step is BasicSR's, does not have it. Remove it"
                yield Problem(f"train:{key}", f"{train[key]!r} given; {why}")
        if not opt.get("network_d"):
            message = "missing; this model needs the discriminator, such as {type: UNetDiscriminatorSN, ...}"
            yield Problem("network_d", message)
        for key in ("gan_opt", "optim_d"):
            if not train.get(key):
                yield Problem(f"train:{key}", f"missing; {opt['model_type']} needs it")
