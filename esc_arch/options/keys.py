"""The keys of option files: what each means, and which values it takes.

One list serves the checks, the suggestions for mistyped keys and the JSON schema. It has what BasicSR's pipelines and
all models share, and what its models and datasets and ours read by name; arguments of networks, losses, metrics,
optimisers and schedulers come from their constructors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from esc_arch.models.esc_model import PROTOCOLS
from esc_arch.models.performance import COMPILE_MODES

__all__ = [
    "DATASET",
    "DATASET_TYPES",
    "GENERAL",
    "GENERAL_OF_MODELS",
    "LOGGER",
    "LOSS",
    "METRIC",
    "OLD_NAMES",
    "PATH",
    "PATTERNS",
    "TRAIN",
    "TRAIN_OF_MODELS",
    "UNUSED",
    "VAL",
    "VAL_OF_MODELS",
    "WANDB",
    "Key",
    "fits",
]

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """What an option means, in words, and its values, in words and as JSON schema; null too, unless it is `needed`."""

    description: str
    wanted: str = ""
    schema: Schema = field(default_factory=dict)
    needed: bool = False

    def takes(self, value: Any) -> bool:
        return (value is None and not self.needed) or fits(value, self.schema)


def fits(value: Any, schema: Schema) -> bool:
    """Whether a value is as a schema says, of the words of JSON schema that are used here."""
    if "anyOf" in schema:
        return any(fits(value, part) for part in schema["anyOf"])
    if "enum" in schema:  # 1 == True, and 0 == False
        return any(value == entry and isinstance(value, bool) == isinstance(entry, bool) for entry in schema["enum"])
    kind = schema.get("type")
    if kind is not None and not _IS[kind](value):
        return False
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        return least <= len(value) <= most and all(fits(entry, schema.get("items", {})) for entry in value)
    if kind in ("integer", "number"):
        above = "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"]
        return above and value >= schema.get("minimum", value) and value <= schema.get("maximum", value)
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_IS = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "number": _is_number,
    # 5e5 is a float that is whole
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _text(description: str) -> Key:
    return Key(description, "text, in quotes if it looks like a number", {"type": "string"})


def _texts(description: str) -> Key:
    text = {"type": "string"}
    wanted = "text, or a list of texts"
    return Key(description, wanted, {"anyOf": [text, {"type": "array", "items": text}]})


def _flag(description: str) -> Key:
    # 0 and 1 do the same in Python; quoted words would all be true
    return Key(description, "true or false, without quotes", {"anyOf": [{"type": "boolean"}, {"enum": [0, 1]}]})


def _choice(description: str, *values: Any) -> Key:
    return Key(description, f"one of {', '.join(map(str, values))}", {"enum": list(values)})


def _whole(description: str, least: int, example: int) -> Key:
    wanted = f"a whole number of at least {least}, such as {example}"
    return Key(description, wanted, {"type": "integer", "minimum": least})


def _number(description: str, wanted: str = "a number", **bounds: float) -> Key:
    return Key(description, wanted, {"type": "number", **bounds})


def _share(description: str) -> Key:
    return _number(description, "a number from 0 to 1", minimum=0, maximum=1)


def _numbers(description: str, count: int | None = None) -> Key:
    schema: dict[str, Any] = {"type": "array", "items": {"type": "number"}}
    if count is not None:
        schema |= {"minItems": count, "maxItems": count}
    return Key(description, f"a list of {count} numbers" if count else "a list of numbers", schema)


def _section(description: str) -> Key:
    return Key(description, "a mapping of 'key: value' lines", {"type": "object"})


_RATES = {"type": "number", "exclusiveMinimum": 0}

GENERAL: dict[str, Key] = {
    "name": _text("The run's name, and that of its folder below experiments/ or results/."),
    "import": _texts("Modules of your own package to import first, which register its classes, such as hat.archs."),
    "model_type": _text("What trains and tests the network."),
    "scale": _number("How many times larger the output is.", "a number of at least 1, such as 4", minimum=1),
    "num_gpu": Key(
        "GPUs to use: auto, or a number; 0 is the CPU.",
        "auto, 0 (CPU) or a number of GPUs",
        {"anyOf": [{"enum": ["auto"]}, {"type": "integer", "minimum": 0}]},
    ),
    "manual_seed": _whole("Seed of all random numbers; a random one when left out.", 0, 0),
    "datasets": _section("The data sets: train, and val, val_1, val_NAME, ... (testing: test, test_1, ... too)."),
    "path": _section("Weights to start from, and folders."),
    "train": _section("Losses, optimisers, schedule and length of a training."),
    "val": _section("How often and by what to validate. Left out when training, there is no validation."),
    "logger": _section("What is logged and saved how often."),
    "dist_params": _section("Of --launcher slurm: backend and port."),
    "find_unused_parameters": _flag("Distributed training of networks that do not use all parameters in each step."),
}

#: Read by single model types at the top level.
GENERAL_OF_MODELS: dict[str, Key] = {
    "gt_size": _whole("Real-ESRGAN: side of the HR patches in pixels; divisible by scale.", 1, 256),
    "queue_size": _whole("Real-ESRGAN: pairs in the training-pair pool.", 0, 180),
    "high_order_degradation": _flag("Real-ESRGAN: false trains with the data set's pairs as they are."),
    "gt_usm": _flag("RealESRNet: whether the target is sharpened."),
    "l1_gt_usm": _flag("Real-ESRGAN: whether the target of the L1 loss is sharpened."),
    "percep_gt_usm": _flag("Real-ESRGAN: whether the target of the perceptual loss is sharpened."),
    "gan_gt_usm": _flag("Real-ESRGAN: whether what the discriminator takes for real is sharpened."),
    "second_blur_prob": _share("Real-ESRGAN: probability of the second blur."),
    **{
        f"{name}{stage}": key
        for stage in ("", "2")
        for name, key in {
            "resize_prob": _numbers("Real-ESRGAN: probabilities of resizing up, down and keeping the size.", 3),
            "resize_range": _numbers("Real-ESRGAN: smallest and largest factor of resizing.", 2),
            "gaussian_noise_prob": _share("Real-ESRGAN: probability of Gaussian noise; Poisson noise otherwise."),
            "noise_range": _numbers("Real-ESRGAN: standard deviation of the noise, of 255.", 2),
            "poisson_scale_range": _numbers("Real-ESRGAN: scale of the Poisson noise.", 2),
            "gray_noise_prob": _share("Real-ESRGAN: probability of noise that is grey."),
            "jpeg_range": _numbers("Real-ESRGAN: JPEG quality.", 2),
        }.items()
    },
}

PATH: dict[str, Key] = {
    "resume_state": _text("The training state (.state) to resume from; --auto_resume finds the newest itself."),
    "ignore_resume_networks": _texts("Networks whose pretrain_network_* is kept when resuming, such as [network_d]."),
    "experiments_root": _text("Folder that trainings are put in (experiments)."),
    "results_root": _text("Folder that tests are put in (results)."),
    "pretrain_network_g": _text("Weights to start from: .pth or .safetensors."),
    "param_key_g": _text("What of the weights to take. Default: training params, testing params_ema if there."),
    "strict_load_g": _flag("Whether every name and shape must fit; with false only what fits is loaded, and said so."),
}

#: Keys that are made from the names of networks, optimisers and the like: the section, the beginning, an example.
PATTERNS: dict[str, dict[str, Key]] = {
    "": {"network_": _section("A network: its type, and the arguments of its constructor.")},
    "path": {
        "pretrain_network_": PATH["pretrain_network_g"],
        "param_key_": PATH["param_key_g"],
        "strict_load_": PATH["strict_load_g"],
    },
    "train": {"optim_": _section("An optimiser: its type, its lr, and further arguments of its constructor.")},
}

TRAIN: dict[str, Key] = {
    "total_iter": _whole("Iterations of the training.", 1, 500000),
    "warmup_iter": Key(
        "Iterations in which the learning rate rises from 0; -1: none.",
        "a whole number of iterations, or -1 for none",
        {"type": "integer", "minimum": -1},
    ),
    "ema_decay": _number(
        "Decay of the moving average of the weights; 0: none.",
        "a number from 0 (no average) to 1, such as 0.999",
        minimum=0,
        maximum=1,
    ),
    "optim_g": _section("The optimiser: its type, its lr, and further arguments of its constructor."),
    "scheduler": _section("How the learning rate changes: type and arguments."),
    "pixel_opt": _section("The loss by pixels, such as {type: L1Loss, loss_weight: 1.0, reduction: mean}."),
    "perceptual_opt": _section("The loss by features of VGG: {type: PerceptualLoss, layer_weights: ...}."),
}

#: Read by single model types in `train:`; those of ESCModel as well.
TRAIN_OF_MODELS: dict[str, Key] = {
    "gan_opt": _section("The adversarial loss, such as {type: GANLoss, gan_type: vanilla, loss_weight: 0.1}."),
    "ldl_opt": _section("SRGAN: the loss by local discrimination (LDL)."),
    "feature_matching_opt": _section("HiFaceGAN: the loss by the discriminator's features."),
    "net_d_iters": _whole("GANs: the generator is trained each so many iterations.", 1, 1),
    "net_d_init_iters": _whole("GANs: iterations in which the discriminator alone is trained.", 0, 0),
    "tsa_iter": _whole("EDVR: iterations in which the TSA module alone is trained.", 0, 50000),
    "dcn_lr_mul": _number("EDVR: factor of the learning rate of deformable convolutions."),
    "fix_flow": Key(
        "Recurrent video models: iterations in which the optical flow is kept as it is.",
        "a whole number of iterations, or true or false",
        {"anyOf": [{"type": "integer", "minimum": -1}, {"type": "boolean"}]},
    ),
    "flow_lr_mul": _number("Recurrent video models: factor of the learning rate of the optical flow."),
    "lr_flow": _number("Recurrent video GANs: learning rate of the optical flow."),
    "r1_reg_weight": _number("StyleGAN2: weight of the R1 regularisation."),
    "path_reg_weight": _number("StyleGAN2: weight of the path length regularisation."),
    "path_batch_shrink": _number("StyleGAN2: the path length is computed from a batch smaller by this."),
    "net_g_reg_every": _whole("StyleGAN2: iterations between the generator's regularisations.", 1, 4),
    "net_d_reg_every": _whole("StyleGAN2: iterations between the discriminator's regularisations.", 1, 16),
    "mixing_prob": _share("StyleGAN2: probability of mixing styles."),
    "amp": _choice("ESCModel: mixed precision.", "bf16", "fp16"),
    "channels_last": _flag("ESCModel: memory layout for tensor cores and CPUs."),
    "compile": Key(
        "ESCModel: training steps by torch.compile; true or its mode.",
        f"true, false or one of {', '.join(COMPILE_MODES)}",
        {"anyOf": [{"type": "boolean"}, {"enum": list(COMPILE_MODES)}]},
    ),
    "accumulate_grad": _whole("ESCModel: parts that a batch is computed in, to save memory.", 1, 2),
    "activation_checkpointing": _flag("ESCModel: less memory for about a third more time."),
    "gradient_clip": Key(
        "ESCModel: the largest norm of all gradients. ESRModel: halved after 50,000 iterations.",
        "a positive number",
        _RATES,
    ),
    "use_amp": _flag("ESRModel: amp: fp16, by its published name."),
    "use_ema": _flag("ESCModel: as published. Testing: whether params_ema is tested when param_key_g is left out."),
    "wave_opt": _section("Of the published ESRModel: not known here."),
    "mesa_opt": _section("Of the published ESRModel: not known here."),
    "reset_momentum_iter": _whole("Of the published ESRModel: not known here.", 0, 0),
    "tf32": _flag("ESCModel: float32 products in TF32 on GPUs."),
    "nonfinite": _choice(
        "ESCModel: what a loss that is no number does: end the run, or skip the step.", "stop", "skip"
    ),
    "losses": _section("ESCModel: further losses by name, such as fft: {type: FFTLoss, loss_weight: 0.05}."),
    "freeze": Key(
        "ESCModel: patterns of parameters that stay as they are, such as ['blocks.0.*'].",
        "a list of patterns of parameter names",
        {"type": "array", "items": {"type": "string"}},
    ),
    "lr_factors": _section("ESCModel: patterns of parameters with a factor of their learning rate."),
}

VAL: dict[str, Key] = {
    "val_freq": _whole("Iterations between validations.", 1, 5000),
    "save_img": _flag("Whether results are saved as images."),
    "suffix": _text("What is put behind the names of saved images; the run's name when left out."),
    "metrics": _section("Metrics by name, such as psnr: {type: calculate_psnr, crop_border: 4, test_y_channel: true}."),
    "pbar": _flag("Whether a progress bar is shown."),
}

#: Read by single model types in `val:`.
VAL_OF_MODELS: dict[str, Key] = {
    "comparison": _flag("ESCModel: pictures of bicubic, result and ground truth, with their PSNR."),
    "protocol": _choice("ESCModel: how to test.", *PROTOCOLS),
    "per_image": _flag("ESCModel: metrics of each image in visualization/per_image/."),
    "tb_images": _whole("ESCModel: images of each set to show in TensorBoard.", 0, 3),
    "flip_seq": _flag("Recurrent video models: the mean of the sequence and the flipped one."),
    "center_frame_only": _flag("Recurrent video models: metrics of the centre frame alone."),
    "num_val_samples": _whole("StyleGAN2: images that are made.", 1, 16),
}

#: Of the entries of `val: metrics:`, where BasicSR's and our metrics have them.
METRIC: dict[str, Key] = {
    "crop_border": Key(
        "Pixels at each edge that are not counted; the scale, by custom. ESCLTEModel: scale, for that of the data set.",
        "a whole number from 0 to 1000, such as 4 (with ESCLTEModel also: scale)",
        {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 1000}, {"enum": ["scale"]}]},
        needed=True,
    ),
    "input_order": _choice("How images are laid out; BasicSR hands them over as HWC.", "HWC", "CHW"),
    "test_y_channel": _flag("Whether the luma channel alone is counted."),
}

#: Of losses, where BasicSR's and ours have them.
LOSS: dict[str, Key] = {
    "loss_weight": Key("What the loss is multiplied by.", "a number, such as 1.0", {"type": "number"}, needed=True),
    "reduction": Key(
        "How the differences of all pixels become one number.", "mean or sum", {"enum": ["mean", "sum"]}, needed=True
    ),
}

LOGGER: dict[str, Key] = {
    "print_freq": _whole("Iterations between log lines.", 1, 100),
    "save_checkpoint_freq": _whole("Iterations between checkpoints.", 1, 5000),
    "use_tb_logger": _flag("Whether figures are written for TensorBoard."),
    "keep_last": _whole("So many checkpoints are kept, and the best; all when left out.", 1, 3),
    "wandb": _section("Weights & Biases."),
}

WANDB: dict[str, Key] = {
    "project": _text("The project; nothing is sent when left out."),
    "resume_id": _text("The id of the run to go on with."),
}

#: Of every data set.
DATASET: dict[str, Key] = {
    "name": _text("The data set's name, in logs and result folders."),
    "type": _text("The class that reads it."),
    "io_backend": _section("How files are read: {type: disk}, or {type: lmdb}."),
    "scale": Key(
        "The scale, where it is not that of the whole file; two numbers (height, width) for ESCLTE.",
        "a number of at least 1, or two",
        {
            "anyOf": [
                {"type": "number", "minimum": 1},
                {"type": "array", "items": {"type": "number", "minimum": 1}, "minItems": 2, "maxItems": 2},
            ]
        },
    ),
    "batch_size_per_gpu": _whole("Training: samples in a batch of each GPU.", 1, 16),
    "num_worker_per_gpu": _whole("Training: processes that load the data of each GPU.", 0, 8),
    "dataset_enlarge_ratio": Key(
        "Training: times that the data set is gone through in an epoch.", "a positive number, such as 100", _RATES
    ),
    "prefetch_mode": _choice("Training: how batches are fetched ahead.", "cpu", "cuda"),
    "num_prefetch_queue": _whole("Training: batches fetched ahead by prefetch_mode cpu.", 1, 1),
    "pin_memory": _flag("Whether batches are in memory that GPUs can read."),
    "persistent_workers": _flag("Whether the loading processes live on after an epoch."),
}

#: Read by single types of BasicSR's datasets and ours.
DATASET_TYPES: dict[str, Key] = {
    "dataroot_gt": _texts("Folder or LMDB of the HR images; several for some types."),
    "dataroot_lq": _texts("Folder or LMDB of the LR images."),
    "dataroot_flow": _text("Folder or LMDB of optical flow."),
    "meta_info_file": Key(
        "Text file with the names of the images to use, one in each line.",
        "a text file, or a list with one for each root",
        {"anyOf": [{"type": "string"}, {"type": "array"}]},
    ),
    "meta_info": _texts("RealESRGANDataset: text file with the paths of the images, one in each line."),
    "filename_tmpl": _text("Name of an LR file by that of its HR file, such as '{}x4'."),
    "gt_size": _whole("Side of the patches cut from HR images, in pixels; divisible by scale.", 1, 256),
    "lq_size": _whole("ArbitraryScaleDataset: side of the LR patches in pixels.", 1, 64),
    "scale_min": _number("ArbitraryScaleDataset: the smallest scale.", "a number of at least 1", minimum=1),
    "scale_max": _number("ArbitraryScaleDataset: the largest scale.", "a number of at least 1", minimum=1),
    "sample_q": _whole("ArbitraryScaleDataset: pixels of each patch that are asked for.", 1, 4096),
    "round_lq": _flag("DownsampleImageDataset: whether LR images are rounded to 8 bits, as files are."),
    "use_hflip": _flag("Whether patches are mirrored at random."),
    "use_rot": _flag("Whether patches are turned at random."),
    "mean": _numbers("Subtracted from the channels."),
    "std": _numbers("What the channels are divided by."),
    "color": _text("y for the luma channel alone."),
    "num_frame": _whole("Frames of a sequence; -1: all, of recurrent test sets.", -1, 15),
    "val_partition": _choice("Which clips of REDS are left out for validation.", "REDS4", "official"),
    "test_mode": _flag("Whether the clips of the validation are taken."),
    "interval_list": Key(
        "Distances of frames to be drawn from.", "a list of numbers", {"type": "array", "items": {"type": "integer"}}
    ),
    "random_reverse": _flag("Whether sequences are reversed at random."),
    "flip_sequence": _flag("Whether the reversed sequence is put behind a sequence."),
    "cache_data": _flag("Whether all images are read into memory."),
    "padding": _choice(
        "How sequences go on beyond their ends.", "replicate", "reflection", "reflection_circle", "circle"
    ),
    "use_duf_downsampling": _flag("VideoTestDUFDataset: whether LR images are made by DUF's filter."),
    "final_sinc_prob": _share("RealESRGANDataset: probability of a sinc filter at the end."),
    **{
        f"{name}{stage}": key
        for stage in ("", "2")
        for name, key in {
            "blur_kernel_size": _whole("RealESRGANDataset: side of the blur kernels, odd.", 1, 21),
            "kernel_list": Key(
                "RealESRGANDataset: kinds of blur kernels.",
                "a list of names",
                {"type": "array", "items": {"type": "string"}},
            ),
            "kernel_prob": _numbers("RealESRGANDataset: probabilities of the kinds."),
            "sinc_prob": _share("RealESRGANDataset: probability of a sinc kernel."),
            "blur_sigma": _numbers("RealESRGANDataset: standard deviations of the kernels.", 2),
            "betag_range": _numbers("RealESRGANDataset: exponents of generalised Gaussian kernels.", 2),
            "betap_range": _numbers("RealESRGANDataset: exponents of plateau kernels.", 2),
        }.items()
    },
}

#: By section (`datasets` for a data set): keys that published option files of BasicSR have though it does not read
#: them, and keys that it puts there itself.
UNUSED: dict[str, set[str]] = {
    "": {"gpu_ids", "set_CUDA_VISIBLE_DEVICES", *(
        "rank", "world_size", "dist", "auto_resume", "is_train", "root_path", "use_tb_logger"
    )},
    "path": {"root", "models", "training_states", "log", "visualization"},
    "train": set(),
    "val": set(),
    "logger": set(),
    "datasets": {"use_shuffle", "use_flip", "phase"},
}  # fmt: skip

#: Keys of older versions of BasicSR, without effect in 1.4.2, with the names that they have now.
OLD_NAMES: dict[str, dict[str, str]] = {
    "path": {
        "strict_load": "strict_load_g",
        "pretrain_model_g": "pretrain_network_g",
        "pretrain_model_d": "pretrain_network_d",
        "strict_load_model_g": "strict_load_g",
    },
    "train": {"fix_iter": "fix_flow"},
}
