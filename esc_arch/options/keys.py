"""The keys of option files: what each means, who reads it, and which values it takes.

The checks, the suggestions for mistyped keys, the defaults and the JSON schema follow from this one table. It has what
BasicSR's pipelines and BasicSR's and our models and data sets read by name; arguments of networks, losses, metrics,
optimisers and schedulers come from their constructors. A new check of single values is a line in `KINDS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from esc_arch.models.esc_model import PROTOCOLS
from esc_arch.models.performance import COMPILE_MODES
from esc_arch.printing import shown

__all__ = ["IGNORED", "KEYS", "KINDS", "OLD_NAMES", "REQUIRED", "Key", "find_key"]


class Kind(NamedTuple):
    """A kind of values, in words, as a test and as JSON schema."""

    wanted: str
    accepts: Callable[[Any], bool]
    schema: dict[str, Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_integer(value: Any) -> bool:
    return _is_number(value) and value % 1 == 0  # 5e5 is a float that is whole


def _is_list(value: Any, is_part: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_part, value))


def _is_text(value: Any) -> bool:
    # Lists for several folders may have null for one
    return value is None or (isinstance(value, str) and not re.search(r"[\x00-\x1f\x7f]", value))


def _is_folder_name(value: Any) -> bool:
    is_name = isinstance(value, str) and value not in ("", "..") and PurePath(value).name == value
    return is_name and shown(value) == value and len(value.encode()) <= LONGEST_NAME


#: Of a run, in bytes. File systems take 255, of which the name of a log and that of an archive have more.
LONGEST_NAME = 200

KINDS = {
    "any": Kind("", lambda value: True, {}),
    "folder": Kind(
        f"a folder's name without / or control characters, {LONGEST_NAME} bytes at most, quoted if it is a number",
        _is_folder_name,
        {"type": "string"},
    ),
    "text": Kind("text on one line, in quotes if it looks like a number", _is_text, {"type": "string"}),
    "texts": Kind("a list of texts", lambda value: _is_list(value, _is_text), {"type": "array"}),
    # 0 and 1 do the same in Python; quoted words would all be true
    "flag": Kind("true or false, without quotes", lambda value: value in (0, 1), {"enum": [True, False, 0, 1]}),
    "int": Kind("a whole number", _is_integer, {"type": "integer"}),
    "number": Kind("a number", _is_number, {"type": "number"}),
    "numbers": Kind("a list of numbers", lambda value: _is_list(value, _is_number), {"type": "array"}),
    "ints": Kind("a list of whole numbers", lambda value: _is_list(value, _is_integer), {"type": "array"}),
    "mapping": Kind("a mapping of 'key: value' lines", lambda value: isinstance(value, dict), {"type": "object"}),
}


@dataclass(frozen=True)
class Key:
    """An option.

    Attributes:
        kinds: the names of the `KINDS` of values it takes, with blanks between; none if it takes `choices` alone.
        doc: what it means, in one line.
        reader: the models or data sets that read it; empty: BasicSR's pipelines, or all data sets.
        least, most, above: bounds of a number, or of those in a list; `above` is not included.
        length: of a list.
        choices: values that it takes beside those of `kinds`.
        default: the value if it is left out.
        example: a value to suggest where there is no default.
        nullable: True if null is the same as leaving it out; False without a default: it is required.
    """

    kinds: str
    doc: str
    reader: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    length: int | None = None
    choices: tuple[Any, ...] = ()
    default: Any = None
    example: Any = None
    nullable: bool = True

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.nullable
        if any(value == choice and type(value) is type(choice) for choice in self.choices):
            return True
        parts = value if isinstance(value, list) else [value]
        return (
            any(KINDS[kind].accepts(value) for kind in self.kinds.split())
            and not (self.length is not None and isinstance(value, list) and len(value) != self.length)
            and all(self.least is None or part >= self.least for part in parts)
            and all(self.most is None or part <= self.most for part in parts)
            and all(self.above is None or part > self.above for part in parts)
        )

    @property
    def wanted(self) -> str:
        """The values that it takes, in words."""
        *parts, last = [*(KINDS[kind].wanted for kind in self.kinds.split()), *map(str, self.choices)]
        text = f"{', '.join(parts)} or {last}" if parts else last
        if self.length is not None:
            text = text.replace("list of", f"list of {self.length}")
        if self.least is not None:
            text += f" of at least {self.least}" if self.most is None else f" from {self.least} to {self.most}"
        if self.above is not None:
            text += f" above {self.above}"
        return text if self.example is None else f"{text}, such as {self.example}"


def find_key(table: Mapping[str, Key], name: str) -> Key | None:
    """The key of that name; names that end with * in the table stand for all that begin so."""
    patterns = (key for start, key in table.items() if start.endswith("*") and name.startswith(start[:-1]))
    return table.get(name) or next((key for key in patterns if f"{name}*" not in table), None)


def _for_both_stages(**keys: Key) -> dict[str, Key]:
    """Keys of a degradation that is applied twice; those of the second stage end with 2."""
    return {name + suffix: key for suffix in ("", "2") for name, key in keys.items()}


def _unchecked(reader: str, names: str) -> dict[str, Key]:
    """Keys of BasicSR's other models and data sets: known, but not what they take."""
    return {name: Key("any", "See its documentation.", reader) for name in names.split()}


_ESC, _REAL, _REAL_DATA, _SOME = "ESCModel", "Real-ESRGAN", "RealESRGANDataset", "some types"

#: The keys by section. Names that end with * stand for all that begin so.
KEYS: dict[str, dict[str, Key]] = {}
_DATA = "train: {type: PairedImageDataset, dataroot_gt: ..., dataroot_lq: ...}"

KEYS[""] = {
    "name": Key("folder", "The run's name, and that of its folder in experiments/ or results/.", nullable=False),
    "import": Key("text texts", "Modules of your own package to import first, such as hat.archs."),
    "model_type": Key("text", "The class that trains and tests the network.", nullable=False),
    "scale": Key("number", "How many times larger the output is.", least=1, example=4),
    "num_gpu": Key("int", "GPUs to use: auto, or a number; 0 is the CPU.", least=0, choices=("auto",), default="auto"),
    "manual_seed": Key("int", "Seed of all random numbers; random if left out.", least=0, most=2**32 - 1),
    "datasets": Key(
        "mapping", "train, and val, val_NAME (testing: test, test_NAME, too).", example=_DATA, nullable=False
    ),
    "path": Key("mapping", "Weights to start from, and folders."),
    "train": Key("mapping", "Losses, optimisers, schedule and length of a training."),
    "val": Key("mapping", "How often and by what to validate. Without it, a training does not validate."),
    "logger": Key("mapping", "What to log and save, and how often."),
    "dist_params": Key("mapping", "Of --launcher slurm: backend and port."),
    "find_unused_parameters": Key("flag", "Distributed training of networks with parameters that a step may not use."),
    "network_*": Key("mapping", "A network: its type, and the arguments of its constructor."),
    "gt_size": Key("int", "Side of the HR patches in pixels; divisible by scale.", _REAL, least=1, example=256),
    "queue_size": Key("int", "Pairs in the training-pair pool.", _REAL, least=0, default=180),
    "high_order_degradation": Key("flag", "False trains with the data set's pairs as they are.", _REAL),
    "gt_usm": Key("flag", "RealESRNet: sharpen the target.", _REAL),
    "l1_gt_usm": Key("flag", "Sharpen the target of the L1 loss.", _REAL),
    "percep_gt_usm": Key("flag", "Sharpen the target of the perceptual loss.", _REAL),
    "gan_gt_usm": Key("flag", "Sharpen what the discriminator takes for real.", _REAL),
    "second_blur_prob": Key("number", "Probability of the second blur.", _REAL, least=0, most=1),
    **_for_both_stages(
        resize_prob=Key("numbers", "Probabilities of enlarging, reducing, keeping.", _REAL, length=3),
        resize_range=Key("numbers", "Smallest and largest factor of resizing.", _REAL, length=2),
        gaussian_noise_prob=Key("number", "Probability of Gaussian, else Poisson noise.", _REAL, least=0, most=1),
        noise_range=Key("numbers", "Standard deviation of the noise, of 255.", _REAL, length=2),
        poisson_scale_range=Key("numbers", "Scale of the Poisson noise.", _REAL, length=2),
        gray_noise_prob=Key("number", "Probability of grey noise.", _REAL, least=0, most=1),
        jpeg_range=Key("numbers", "JPEG quality.", _REAL, length=2),
    ),
}

KEYS["path"] = {
    "resume_state": Key("text", "The training state (.state) to resume from; --auto_resume finds the newest itself."),
    "ignore_resume_networks": Key("text texts", "Networks that keep pretrain_network_*, such as [network_d]."),
    "experiments_root": Key("text", "Folder of trainings.", default="experiments"),
    "results_root": Key("text", "Folder of tests.", default="results"),
    "pretrain_network_*": Key("text", "Weights to start from: .pth or .safetensors, or a name of `basicsr weights`."),
    "param_key_*": Key("text", "Entry of the weights file. Default: params; to test, params_ema if the file has it."),
    "strict_load_*": Key("flag", "Every name and shape must fit; if false, only what fits is loaded, with a message."),
}

KEYS["train"] = {
    "total_iter": Key("int", "Iterations of the training.", least=1, most=10**9, example=500000, nullable=False),
    "warmup_iter": Key("int", "Iterations in which the learning rate rises from 0; -1: none.", least=-1, default=-1),
    "ema_decay": Key("number", "Decay of the moving average of the weights; 0: none.", least=0, most=1, example=0.999),
    "optim_*": Key("mapping", "An optimiser: its type, its lr, and further arguments of its constructor."),
    "scheduler": Key("mapping", "How the learning rate changes: type and arguments."),
    "pixel_opt": Key("mapping", "Pixel loss, such as {type: L1Loss, loss_weight: 1.0, reduction: mean}."),
    "perceptual_opt": Key("mapping", "Loss of VGG features: {type: PerceptualLoss, layer_weights: ...}."),
    "amp": Key("", "Mixed precision.", _ESC, choices=("bf16", "fp16")),
    "channels_last": Key("flag", "Memory layout for tensor cores and CPUs.", _ESC),
    "compile": Key("flag", "Training steps by torch.compile: true, or its mode.", _ESC, choices=tuple(COMPILE_MODES)),
    "accumulate_grad": Key("int", "Parts that a batch is computed in, to save memory.", _ESC, least=1, default=1),
    "activation_checkpointing": Key("flag", "Less memory for about a third more time.", _ESC),
    "gradient_clip": Key("number", "Largest norm of all gradients.", _ESC, above=0),
    "use_amp": Key("flag", "ESRModel: amp: fp16, by its published name.", _ESC),
    "use_ema": Key("flag", "As published. Testing: true takes params_ema if param_key_g is left out.", _ESC),
    "tf32": Key("flag", "Float32 products in TF32 on GPUs.", _ESC),
    "nonfinite": Key("", "At a non-finite loss: end the run, or skip the step.", _ESC, choices=("stop", "skip")),
    "losses": Key("mapping", "Further losses by name.", _ESC, example="fft: {type: FFTLoss, loss_weight: 0.05}"),
    "freeze": Key("texts", "Patterns of parameters that are not trained, such as ['blocks.0.*'].", _ESC),
    "lr_factors": Key("mapping", "Patterns of parameters with a factor of their learning rate.", _ESC),
    "gan_opt": Key("mapping", "Adversarial loss, such as {type: GANLoss, gan_type: vanilla, ...}.", "GANs"),
    "net_d_iters": Key("int", "Train the generator every so many iterations.", "GANs", least=1, default=1),
    "net_d_init_iters": Key("int", "Iterations of the discriminator alone.", "GANs", least=0, default=0),
    **_unchecked("SRGAN, HiFaceGAN", "ldl_opt feature_matching_opt"),
    **_unchecked("video models", "tsa_iter dcn_lr_mul fix_flow flow_lr_mul lr_flow"),
    **_unchecked(
        "StyleGAN2", "r1_reg_weight path_reg_weight path_batch_shrink net_g_reg_every net_d_reg_every mixing_prob"
    ),
    **_unchecked("published ESRModel", "wave_opt mesa_opt reset_momentum_iter"),
}

KEYS["val"] = {
    "val_freq": Key("int", "Iterations between validations.", least=1, default=5000, nullable=False),
    "save_img": Key("flag", "Save results as images.", default=False),
    "suffix": Key("text", "Added to the names of saved images; the run's name if left out."),
    "metrics": Key("mapping", "Metrics by name.", example="psnr: {type: calculate_psnr, crop_border: 4}"),
    "pbar": Key("flag", "Show a progress bar.", default=True),
    "comparison": Key("flag", "Pictures of bicubic, result and ground truth, with their PSNR.", _ESC),
    "protocol": Key("", "How to test.", _ESC, choices=tuple(PROTOCOLS), default=PROTOCOLS[0]),
    "per_image": Key("flag", "Metrics of each image in visualization/per_image/.", _ESC),
    "tb_images": Key("int", "Images of each set to show in TensorBoard.", _ESC, least=0, default=0, nullable=False),
    **_unchecked("video models", "flip_seq center_frame_only"),
    **_unchecked("StyleGAN2", "num_val_samples"),
}

KEYS["logger"] = {
    "print_freq": Key("int", "Iterations between log lines.", least=1, default=100, nullable=False),
    "save_checkpoint_freq": Key("int", "Iterations between checkpoints.", least=1, default=5000, nullable=False),
    "use_tb_logger": Key("flag", "Log to TensorBoard.", default=False),
    "keep_last": Key("int", "Keep only so many checkpoints, and the best; all if left out.", least=1, example=3),
    "wandb": Key("mapping", "Weights & Biases: project and resume_id."),
}

KEYS["logger:wandb"] = {
    "project": Key("text", "The project; nothing is sent if left out."),
    "resume_id": Key("text", "The id of the run to go on with."),
}

# Of metrics and losses: arguments that most have
KEYS["val:metrics:*"] = {
    "crop_border": Key("int", "Pixels at each edge to ignore.", least=0, most=1000, choices=("scale",), nullable=False),
    "input_order": Key("", "Layout of the images; BasicSR's is HWC.", choices=("HWC", "CHW")),
    "test_y_channel": Key("flag", "Compare the luma channel alone."),
}
KEYS["train:losses:*"] = {
    "loss_weight": Key("number", "What the loss is multiplied by.", example=1.0, nullable=False),
    "reduction": Key("", "How all differences become one number.", choices=("mean", "sum"), nullable=False),
}

KEYS["train:scheduler"] = {"periods": Key("ints", "Iterations of each period.", least=1, example=[500000])}
KEYS["datasets:*"] = {
    "name": Key("text", "The data set's name, in logs and result folders."),
    "type": Key("text", "The class that reads it.", nullable=False),
    "io_backend": Key("mapping", "How files are read: {type: disk}, or {type: lmdb}."),
    "scale": Key("number numbers", "Of this data set alone; ESCLTE: also [height, width].", least=1, length=2),
    "batch_size_per_gpu": Key("int", "Training: samples in a batch of each GPU.", least=1, example=16),
    "num_worker_per_gpu": Key("int", "Training: processes that load each GPU's data.", least=0, most=512, default=4),
    "dataset_enlarge_ratio": Key("number", "Training: passes through the data set in an epoch.", above=0, example=100),
    "prefetch_mode": Key("", "Training: how batches are fetched ahead.", choices=("cpu", "cuda")),
    "num_prefetch_queue": Key("int", "Training: batches fetched ahead by prefetch_mode cpu.", least=1, default=1),
    "pin_memory": Key("flag", "Load batches into memory that GPUs can read."),
    "persistent_workers": Key("flag", "Keep the loading processes after an epoch."),
    "dataroot_gt": Key("text texts", "Folder or LMDB of the HR images; several for some types.", _SOME),
    "dataroot_lq": Key("text texts", "Folder or LMDB of the LR images.", _SOME),
    "meta_info_file": Key("text texts", "Text file with the names of the images to use, or one for each root.", _SOME),
    "meta_info": Key("text texts", "RealESRGANDataset: text file with the paths of the images.", _SOME),
    "filename_tmpl": Key("text", "Name of an LR file by that of its HR file.", _SOME, example="'{}x4'"),
    "gt_size": Key("int", "Side of the HR patches in pixels; divisible by scale.", _SOME, least=1, example=256),
    "lq_size": Key("int", "ArbitraryScaleDataset: side of the LR patches in pixels.", _SOME, least=1, example=64),
    "scale_min": Key("number", "ArbitraryScaleDataset: the smallest scale.", _SOME, least=1),
    "scale_max": Key("number", "ArbitraryScaleDataset: the largest scale.", _SOME, least=1),
    "sample_q": Key("int", "ArbitraryScaleDataset: pixels of each patch that are predicted.", _SOME, least=1),
    "round_lq": Key("flag", "DownsampleImageDataset: round LR images to 8 bits, as files are.", _SOME),
    "use_hflip": Key("flag", "Flip patches at random.", _SOME),
    "use_rot": Key("flag", "Rotate patches at random.", _SOME),
    "mean": Key("numbers", "Subtracted from the channels.", _SOME),
    "std": Key("numbers", "What the channels are divided by.", _SOME),
    "color": Key("text", "y for the luma channel alone.", _SOME),
    **_unchecked(
        "video data sets",
        "dataroot_flow num_frame val_partition test_mode interval_list random_reverse flip_sequence cache_data padding "
        "use_duf_downsampling",
    ),
    **_for_both_stages(
        blur_kernel_size=Key("int", "Side of the blur kernels, odd.", _REAL_DATA, least=1, example=21),
        kernel_list=Key("text texts", "Kinds of blur kernels.", _REAL_DATA),
        kernel_prob=Key("numbers", "Probabilities of the kinds.", _REAL_DATA),
        sinc_prob=Key("number", "Probability of a sinc kernel.", _REAL_DATA, least=0, most=1),
        blur_sigma=Key("numbers", "Standard deviations of the kernels.", _REAL_DATA, length=2),
        betag_range=Key("numbers", "Exponents of generalised Gaussian kernels.", _REAL_DATA, length=2),
        betap_range=Key("numbers", "Exponents of plateau kernels.", _REAL_DATA, length=2),
    ),
    "final_sinc_prob": Key("number", "Probability of a sinc filter at the end.", _REAL_DATA, least=0, most=1),
}

_degradations = [name for name, key in KEYS["datasets:*"].items() if key.reader == _REAL_DATA]
#: What data sets of BasicSR's require, beyond what `data_checks` asks of all.
REQUIRED = {
    "FFHQDataset": ["dataroot_gt", "mean", "std", "use_hflip"],
    "RealESRGANDataset": ["use_hflip", "use_rot", *_degradations],
    "RealESRGANPairedDataset": ["dataroot_gt", "dataroot_lq", "gt_size", "use_hflip", "use_rot"],
}

#: Keys that published option files of BasicSR have though it does not read them, and keys that it puts there itself.
IGNORED = {
    *("gpu_ids", "set_CUDA_VISIBLE_DEVICES", "use_tb_logger", "dist", "auto_resume", "is_train", "root_path"),
    *("root", "models", "training_states", "log", "visualization", "use_shuffle", "use_flip", "phase"),
}
#: Keys of older versions of BasicSR, without effect in 1.4.2, with the names that they have now.
OLD_NAMES = {
    "strict_load": "strict_load_g",
    "strict_load_model_g": "strict_load_g",
    "pretrain_model_g": "pretrain_network_g",
    "pretrain_model_d": "pretrain_network_d",
    "fix_iter": "fix_flow",
}
