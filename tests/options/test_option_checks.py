"""Every mistake that the checks tell, and option files of BasicSR's own models, which they must let pass."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.data.realesrgan_dataset import RealESRGANDataset
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY
from PIL import Image

import esc_arch  # noqa: F401  makes basicsr importable
from esc_arch.names import did_you_mean, nearest
from esc_arch.options import CheckScope, Options, check_options
from esc_arch.options.checks import check_sections

Change = Callable[[Options], Any]

EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2}
ADAM = {"type": "Adam", "lr": 1e-4, "weight_decay": 0, "betas": [0.9, 0.99]}
STEPS = {"type": "MultiStepLR", "milestones": [50], "gamma": 0.5}
L1 = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
PSNR = {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": False, "better": "higher"}


def write_images(folder: Path, side: int, names: tuple[str, ...] = ("a.png", "b.png")) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (side, side)).save(folder / name)


def write_lmdb(folder: Path, lines: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "data.mdb").touch()
    (folder / "meta_info.txt").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, on a machine without CUDA: pairs in folders and in LMDBs, and a list of the GT images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    write_images(tmp_path / "gt", 32)
    write_images(tmp_path / "lq", 16)
    (tmp_path / "gt" / ".hidden").touch()
    (tmp_path / "list.txt").write_text("a.png (32,32,3)\nb.png (32,32,3)\n")
    write_lmdb(tmp_path / "gt.lmdb", ["a.png (32,32,3) 1", "b.png (32,40,3) 1"])
    write_lmdb(tmp_path / "lq.lmdb", ["a.png (16,16,3) 1", "b.png (16,20,3) 1"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "net.pth").touch()
    return tmp_path


def pairs(**changes: Any) -> Options:
    return {"name": "Set", "type": "PairedImageDataset", "dataroot_gt": "gt", "dataroot_lq": "lq"} | changes


def training(**changes: Any) -> Options:
    return pairs(gt_size=16, batch_size_per_gpu=2, num_worker_per_gpu=0, io_backend={"type": "disk"}) | changes


def train_options() -> Options:
    return {
        "name": "trial",
        "model_type": "SRModel",
        "scale": 2,
        "num_gpu": "auto",
        "datasets": {"train": training(name="DIV2K"), "val": pairs(name="Set5")},
        "network_g": dict(EDSR),
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {"total_iter": 100, "optim_g": dict(ADAM), "scheduler": dict(STEPS), "pixel_opt": dict(L1)},
        "val": {"metrics": {"psnr": dict(PSNR)}},
    }


def test_options() -> Options:
    opt = train_options()
    del opt["train"], opt["datasets"]["train"]
    return opt | {"datasets": {"test_1": pairs(name="Set5"), "test_2": pairs(name="Set14")}}


test_options.__test__ = False  # type: ignore[attr-defined]


def merge(base: Options, changes: Options) -> Options:
    """`base` with `changes` inside its sections; `...` takes a key out, and a section with a type replaces the old."""
    result = copy.copy(base)
    for key, value in changes.items():
        if value is ...:
            del result[key]
        elif isinstance(value, dict) and isinstance(result.get(key), dict) and value.get("type", ...) is ...:
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def check(changes: Options, is_train: bool = True) -> list[str]:
    return errors(merge(train_options() if is_train else test_options(), changes), is_train)


def errors(opt: Options, is_train: bool = True) -> list[str]:
    return list(map(str, check_options(opt, is_train)))


def datasets(**train: Any) -> Options:
    """Changes of the training set."""
    return {"datasets": {"train": train}}


def lmdb(**changes: Any) -> Options:
    return {"io_backend": {"type": "lmdb"}, "dataroot_gt": "gt.lmdb", "dataroot_lq": "lq.lmdb"} | changes


def cosine(**changes: Any) -> Options:
    scheduler = {"type": "CosineAnnealingRestartLR", "periods": [60, 40], "restart_weights": [1, 0.5]} | changes
    return {"train": {"scheduler": scheduler}}


# --- what must pass --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"total_iter": 1e2}},
        {"train": {"optim_g": {"type": "AdamW", "lr": 1e-4}}},
        {"num_gpu": 0, "manual_seed": 0},
        {"val": ...},
        {"val": {"metrics": None}},
        {"train": {"pixel_opt": ..., "perceptual_opt": {"type": "PerceptualLoss", "layer_weights": {"conv5_4": 1}}}},
        {"path": {"pretrain_network_g": "net.pth"}},
        {"path": {"resume_state": "net.pth", "pretrain_network_g": "no.pth"}},
        {"network_d": None},
        {"datasets": {"val": {"filename_tmpl": "{}"}, "val_2": pairs()}},
        datasets(meta_info_file="list.txt"),
        datasets(meta_info_file=None, prefetch_mode="cpu"),
        datasets(**lmdb(meta_info_file="no.txt")),
        {"datasets": {"val": lmdb()}},
        cosine(),
        cosine(periods=[99], restart_weights=[1]),
        {"train": {"scheduler": STEPS | {"restarts": [0, 50], "restart_weights": [1, 0.5]}}},
    ],
)
def test_sound_training_options_pass(changes: Options) -> None:
    assert check(changes) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"network_d": {"type": "left over from training"}, "path": {"resume_state": "no.state"}},
        {"datasets": {"val": {"name": "LQ", "type": "SingleImageDataset", "dataroot_lq": "lq"}}, "val": None},
        {"datasets": {"val": pairs(meta_info_file="list.txt")}},
        {"datasets": {"val": {"name": "LQ", "type": "SingleImageDataset"} | lmdb()}, "val": None},
    ],
)
def test_sound_test_options_pass(changes: Options) -> None:
    assert check(changes, is_train=False) == []


def test_gt_larger_than_needed_passes_in_validation_only(folder: Path) -> None:
    write_images(folder / "gt", 33)
    assert check({}, is_train=False) == []
    assert len(check({})) == 1


def test_gt_too_small_matters_only_when_measured(folder: Path) -> None:
    write_images(folder / "gt", 31)
    assert check({"val": {"metrics": None}}, is_train=False) == []
    assert len(check({}, is_train=False)) == 2


def test_turned_photographs_pass(folder: Path) -> None:
    """OpenCV applies the orientation of a JPEG: 32 x 16 with orientation 6 is read as 16 x 32."""
    orientation = Image.Exif()
    orientation[0x0112] = 6
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    Image.new("RGB", (64, 32)).save(folder / "a" / "x.jpg", exif=orientation)
    Image.new("RGB", (16, 32)).save(folder / "b" / "x.jpg")
    assert check(datasets(dataroot_gt="a", dataroot_lq="b", batch_size_per_gpu=1)) == []


def test_auto_resume_needs_no_pretrained_network(folder: Path) -> None:
    paths = {"path": {"pretrain_network_g": "no.pth", "training_states": str(folder / "states")}, "auto_resume": True}
    assert len(check(paths)) == 1
    write_lmdb(folder / "states", [])
    assert len(check(paths)) == 1
    (folder / "states" / "10.state").touch()
    assert check(paths) == []
    assert len(check(merge(paths, {"path": {"ignore_resume_networks": ["network_g"]}}))) == 1


@pytest.fixture
def third_party() -> Iterator[None]:
    """A model, and a data set, of another package with needs of their own."""

    class OtherModel(SRModel):
        def get_optimizer(self, *args: Any, **kwargs: Any) -> None: ...
        def setup_schedulers(self) -> None: ...
        def init_training_settings(self) -> None: ...

    class OtherDataset: ...

    MODEL_REGISTRY.register(OtherModel)
    DATASET_REGISTRY.register(OtherDataset)
    yield
    del MODEL_REGISTRY._obj_map["OtherModel"], DATASET_REGISTRY._obj_map["OtherDataset"]


def test_other_packages_may_do_as_they_like(third_party: None) -> None:
    data = {"type": "OtherDataset", "dataroot_gt": ["gt", "lq"], "batch_size_per_gpu": 1, "gt_size": [3, 4]}
    training = {"total_iter": 10, "optim_g": {"type": "Lion"}, "scheduler": {"type": "Own"}, "optim_x": {}}
    opt = train_options() | {"model_type": "OtherModel", "datasets": {"train": data}, "train": training}
    assert errors(opt) == []
    data |= {"dataroot_lq": ["gt", "no"], "meta_info_file": "of another kind"}
    (problem,) = errors(opt)
    assert "datasets:train:dataroot_lq: 'no' given" in problem
    data["io_backend"] = {"type": "web"}
    assert errors(opt) == []


def video(**changes: Any) -> Options:
    return {
        "type": "REDSDataset", "dataroot_gt": "gt", "dataroot_lq": "lq", "dataroot_flow": None,
        "meta_info_file": "list.txt", "val_partition": "REDS4", "io_backend": {"type": "disk"}, "num_frame": 5,
        "gt_size": 256, "interval_list": [1], "random_reverse": False, "use_hflip": True, "use_rot": True,
        "num_worker_per_gpu": 3, "batch_size_per_gpu": 4, "dataset_enlarge_ratio": 200, "prefetch_mode": None,
    } | changes  # fmt: skip


VGG_LOSS = {"type": "PerceptualLoss", "layer_weights": {"conv5_4": 1}, "vgg_type": "vgg19", "criterion": "l1"}
GAN_LOSS = {"type": "GANLoss", "gan_type": "vanilla", "real_label_val": 1.0, "fake_label_val": 0.0, "loss_weight": 0.1}
GAN_TRAINING = {
    "optim_d": ADAM, "gan_opt": GAN_LOSS, "perceptual_opt": VGG_LOSS, "net_d_iters": 1, "net_d_init_iters": 0
}  # fmt: skip
BLUR: Options = {
    f"{key}{stage}": value
    for stage in ("", "2")
    for key, value in {
        "blur_kernel_size": 21, "kernel_list": ["iso", "aniso"], "kernel_prob": [0.5, 0.5], "sinc_prob": 0.1,
        "blur_sigma": [0.2, 3], "betag_range": [0.5, 4], "betap_range": [1, 2],
    }.items()
} | {"final_sinc_prob": 0.8}  # fmt: skip
RRDB = {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 23, "num_grow_ch": 32}
PUBLISHED = {
    "SwinIR": {
        "model_type": "SwinIRModel",
        "network_g": {
            "type": "SwinIR", "upscale": 2, "in_chans": 3, "img_size": 48, "window_size": 8, "img_range": 1.0,
            "depths": [6, 6], "embed_dim": 180, "num_heads": [6, 6], "mlp_ratio": 2, "upsampler": "pixelshuffle",
            "resi_connection": "1conv",
        },
        "train": {"ema_decay": 0.999, "warmup_iter": -1},
        "logger": {"print_freq": 100, "wandb": {"project": None, "resume_id": None}},
        "dist_params": {"backend": "nccl", "port": 29500},
    },
    "ESRGAN": {
        "model_type": "ESRGANModel",
        "network_g": RRDB,
        "network_d": {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 64},
        "train": GAN_TRAINING,
    },
    "Real-ESRGAN": {
        "model_type": "RealESRGANModel",
        "scale": 4,
        "gt_size": 256,
        "queue_size": 180,
        "resize_prob": [0.2, 0.7, 0.1],
        "l1_gt_usm": True,
        "datasets": {
            "train": {
                "type": "RealESRGANDataset", "dataroot_gt": "gt", "meta_info": "list.txt", "gt_size": 256,
                "io_backend": {"type": "disk"}, "batch_size_per_gpu": 1, "num_worker_per_gpu": 5,
                "use_hflip": True, "use_rot": False, **BLUR,
            },
            "val": ...,
        },
        "network_g": RRDB,
        "network_d": {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 64, "skip_connection": True},
        "train": GAN_TRAINING,
        "val": {"metrics": {"niqe": {"type": "calculate_niqe", "crop_border": 4}}},
    },
    "EDVR": {
        "model_type": "EDVRModel",
        "scale": 4,
        "find_unused_parameters": True,
        "datasets": {
            "train": video(),
            "val": {"type": "VideoTestDataset", "dataroot_gt": "gt", "dataroot_lq": "lq", "cache_data": False,
                    "num_frame": 5, "padding": "reflection_circle"},
        },
        "network_g": {
            "type": "EDVR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_frame": 5, "deformable_groups": 8,
            "num_extract_block": 5, "num_reconstruct_block": 10, "center_frame_idx": None, "hr_in": False,
            "with_predeblur": False, "with_tsa": True,
        },
        "train": {
            "dcn_lr_mul": 1,
            "tsa_iter": 50000,
            "total_iter": 600000,
            "scheduler": {
                "type": "CosineAnnealingRestartLR", "periods": [150000] * 4, "restart_weights": [1] * 4, "eta_min": 1e-7
            },
            "pixel_opt": {"type": "CharbonnierLoss", "loss_weight": 1.0, "reduction": "sum"},
        },
    },
    "StyleGAN2": {
        "model_type": "StyleGAN2Model",
        "scale": ...,
        "datasets": {
            "train": {
                "type": "FFHQDataset", "dataroot_gt": "gt", "io_backend": {"type": "disk"}, "use_hflip": True,
                "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "batch_size_per_gpu": 1, "num_worker_per_gpu": 6,
            },
            "val": ...,
        },
        "network_g": {"type": "StyleGAN2Generator", "out_size": 256, "num_style_feat": 512, "num_mlp": 8},
        "network_d": {"type": "StyleGAN2Discriminator", "out_size": 256, "channel_multiplier": 2},
        "train": {
            "optim_d": {"type": "Adam", "lr": 2e-3}, "gan_opt": GAN_LOSS | {"gan_type": "wgan_softplus"},
            "r1_reg_weight": 10, "path_reg_weight": 2, "net_g_reg_every": 4, "net_d_reg_every": 16, "mixing_prob": 0.9,
        },
        "val": {"metrics": ..., "num_val_samples": 16},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_options_pass(name: str) -> None:
    assert check(PUBLISHED[name]) == []


def test_video_lists_are_looked_for_in_lmdbs_too() -> None:
    changes = datasets(io_backend={"type": "lmdb"}, meta_info_file="no.txt")
    (problem,) = check(merge(PUBLISHED["EDVR"], changes))
    assert problem.startswith("datasets:train:meta_info_file: 'no.txt' given") and "all files" not in problem


REAL_ESRGAN = PUBLISHED["Real-ESRGAN"]


@pytest.mark.parametrize("key", [*BLUR, "use_hflip", "use_rot", "dataroot_gt"])
def test_what_a_data_set_requires(key: str) -> None:
    for value in (..., None):
        (problem,) = check(merge(REAL_ESRGAN, datasets(**{key: value})))
        assert problem.startswith(f"datasets:train:{key}: ")
        assert "missing; give " in problem or key == "dataroot_gt"


@pytest.mark.parametrize("meta_info", [..., None])
def test_real_esrgan_without_a_list(meta_info: Any, folder: Path) -> None:
    changes = merge(REAL_ESRGAN, datasets(meta_info=meta_info))
    for stray in (folder / "gt" / "notes.txt", folder / "empty" / "notes.txt"):
        stray.write_text("no image")
    opt = merge(train_options(), changes)
    assert "datasets:train: 2 images" in map(str, check_sections(opt, True, CheckScope()))
    assert errors(opt) == []
    paths = RealESRGANDataset({**opt["datasets"]["train"], "io_backend": {"type": "disk"}}).paths
    assert len(paths) == 2 and not any(path.endswith(".txt") for path in paths)
    assert check(merge(changes, datasets(dataroot_gt="empty"))) == [
        "datasets:train:dataroot_gt: the folder 'empty' has no images"
    ]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("a b.png", "a b.png"),
        ("a b.png (32,32,3)", "a b.png"),
        ("sub folder/a  b.PNG (32,32,3) 1", "sub folder/a  b.PNG"),
        ("no suffix (32,32)", "no suffix"),
        ("c.png 0.5", "c.png"),
        ("c.png.old.jpg x", "c.png.old.jpg"),
        ("without 0.5", "without"),
    ],
)
def test_names_in_lists(line: str, name: str, folder: Path) -> None:
    """Blanks belong to names; what follows them does not."""
    (folder / "list.txt").write_text(f"{line}\n\n")
    assert check(datasets(meta_info_file="list.txt")) == [
        f"datasets:train:dataroot_lq: 1 of 1 images are missing, the first is lq/{Path(name).name} "
        "(filename_tmpl is '{}')",
        f"datasets:train:dataroot_gt: 1 of 1 images are missing, the first is gt/{name}",
    ]
    assert check(merge(REAL_ESRGAN, {})) == [
        f"datasets:train:dataroot_gt: 1 of 1 images are missing, the first is gt/{name}"
    ]


# --- what must not ---------------------------------------------------------------------------------------------

GENERAL = [
    ({"name": ...}, "name: None given; must be a folder's name without /"),
    ({"name": ""}, "name: '' given; must be a folder's name without /"),
    ({"name": 12}, "name: 12 given; must be a folder's name without / or control characters"),
    ({"name": "../x"}, "name: '../x' given; must be a folder's name without /"),
    ({"name": "/x"}, "name: '/x' given; must be a folder's name without /"),
    ({"name": ".."}, "name: '..' given; must be a folder's name without /"),
    ({"path": 5}, "path: 5 given; must be a mapping"),
    ({"train": [1]}, r"train: \[1\] given; must be a mapping"),
    ({"datasets": ...}, "datasets: None given; must be a mapping of .*, such as train: {type: PairedImageDataset"),
    ({"datasets": {"train": ..., "val": ...}}, "datasets: empty; give a section for each data set"),
    ({"datasets": {"val": None}}, "datasets:val: None given; must be a mapping with type"),
    ({"val": {"metrics": {1: PSNR}}}, "val:metrics:1: the key is int 1; keys must be text: put it in quotes"),
    ({"model_type": ...}, "model_type: missing. Allowed: .*ESRGANModel"),
    ({"model_type": "SRmodle"}, "model_type: 'SRmodle' is not known. Did you mean 'SRModel'.*Allowed: .*EDVRModel"),
    ({"manual_seed": -1}, "manual_seed: -1 given; must be a whole number from 0 to 4294967295"),
    ({"manual_seed": "a"}, "manual_seed: 'a' given"),
    ({"num_gpu": -1}, "num_gpu: -1 given; must be a whole number or auto of at least 0"),
    ({"num_gpu": True}, "num_gpu: True given; must be a whole number"),
    ({"num_gpu": 1}, "num_gpu: 1 given, but there is no CUDA device here. Set num_gpu: 0 or auto"),
]
NETWORKS = [
    ({"network_g": ...}, "network_g: missing; SRModel needs it"),
    ({"network_g": "EDSR"}, "network_g: 'EDSR' given; must be a mapping with type and its arguments"),
    ({"network_d": {"num_feat": 4}}, "network_d:type: missing. Allowed: .*VGGStyleDiscriminator"),
    ({"network_g": EDSR | {"type": "EDSRR"}}, "network_g:type: 'EDSRR' is not known. Did you mean 'EDSR'"),
    ({"network_g": EDSR | {"type": ["x"]}}, r"network_g:type: \['x'\] is not known"),
    (
        {"network_g": EDSR | {"num_feta": 4}},
        "network_g:num_feta: EDSR has no such argument. Did you mean 'num_feat'",
    ),
    ({"network_g": {"type": "EDSR", "num_in_ch": 3}}, "network_g:num_out_ch: missing; EDSR needs it"),
    ({"network_g": EDSR | {"upscale": 4}}, "network_g:upscale: 4 given, but scale is 2. Give both the same value"),
    (
        {"network_g": {"type": "ESC"}},
        "network_g:upscaling_factor: missing, and 4 by default; give scale, 2",
    ),
]
DATASETS = [
    ({"datasets": {"train": ...}}, "datasets: has val but no train. To test, use basicsr test"),
    ({"datasets": {"trian": pairs()}}, "datasets:trian: not known when training. Did you mean 'train'"),
    ({"datasets": {"test": pairs()}}, "datasets:test: not known when training. Allowed: train, val, val_NAME"),
    (
        {"datasets": {"val_2": pairs(name="Set5")}},
        "datasets:val_2:name: 'Set5' is also the name of datasets:val. Rename one",
    ),
    (
        {"datasets": {"train": training(type="PairImageDataset")}},
        "datasets:train:type: 'PairImageDataset' is not known. Did ",
    ),
    (datasets(type=...), "datasets:train:type: missing"),
    ({"datasets": {"train": training(type=["x"])}}, r"datasets:train:type: \['x'\] is not known"),
    (datasets(meta_info_file=5), "datasets:train:meta_info_file: 5 given; must be a text file with one image's name"),
    (
        datasets(io_backend={"type": ["lmdb"]}),
        "datasets:train:io_backend: .* given; must be a mapping with a known type",
    ),
    (datasets(batch_size_per_gpu=...), "datasets:train:batch_size_per_gpu: missing; give a whole number"),
    (datasets(batch_size_per_gpu=0), "datasets:train:batch_size_per_gpu: 0 given"),
    (
        datasets(num_worker_per_gpu=-1),
        "datasets:train:num_worker_per_gpu: -1 given; must be a whole number from 0 to 512",
    ),
    (datasets(prefetch_mode="gpu"), "datasets:train:prefetch_mode: 'gpu' given; must be cpu or cuda"),
    (
        datasets(io_backend="disk"),
        "datasets:train:io_backend: 'disk' given; must be a mapping with a known type. Allowed",
    ),
    (datasets(io_backend={"type": "lmbd"}), "datasets:train:io_backend: .*Did you mean 'lmdb'"),
    (
        datasets(dataroot_gt=...),
        "datasets:train:dataroot_gt: None given; must be a folder or an LMDB: PairedImageDataset needs it",
    ),
    (
        datasets(dataroot_gt="no"),
        "datasets:train:dataroot_gt: 'no' given, but there is no /.*/no$",
    ),
    (
        datasets(meta_info_file="x.txt"),
        "datasets:train:meta_info_file: 'x.txt' given, but there is no file /.*x.txt. "
        "Remove meta_info_file to use all images of the folders. .* a clone of BasicSR only: copy the file from there",
    ),
    (datasets(gt_size=...), "datasets:train:gt_size: None given; must be a positive integer"),
    (datasets(gt_size=1.5), "datasets:train:gt_size: 1.5 given"),
    (datasets(gt_size=15), "datasets:train:gt_size: 15 given; must be divisible by scale 2: use 14 or 16"),
    (datasets(gt_size=1), "datasets:train:gt_size: 1 given; must be divisible by scale 2: use 2"),
    (
        datasets(gt_size=34),
        "datasets:train: 2 of 2 images checked have a wrong size, the first is gt/a.png: GT is "
        "32x32, smaller than gt_size 34",
    ),
    (datasets(dataroot_lq="empty"), "datasets:train:dataroot_lq: 2 of 2 images are missing, the first is empty/a.png"),
    (datasets(dataroot_lq="list.txt"), "datasets:train:dataroot_lq: 2 of 2 images are missing"),
    (datasets(dataroot_gt="empty"), "datasets:train:dataroot_gt: the folder 'empty' has no images"),
    (datasets(dataroot_lq="gt"), "2 of 2 images .* gt/a.png: LQ is 32x32 and GT 32x32; with scale 2 GT must be 64x64"),
    (
        datasets(filename_tmpl="{}x2"),
        "datasets:train:dataroot_lq: 2 of 2 images are missing, the first is lq/ax2.png "
        r"\(filename_tmpl is '\{\}x2'\)",
    ),
    (datasets(filename_tmpl="{x}"), r"datasets:train:filename_tmpl: '\{x\}' given; must be text with \{\}"),
    (datasets(filename_tmpl=2), "datasets:train:filename_tmpl: 2 given"),
    (
        datasets(**lmdb(dataroot_gt="gt")),
        "datasets:train:dataroot_gt: 'gt' given; with .* lmdb .* end with .lmdb",
    ),
    (datasets(**lmdb(gt_size=34)), "2 of 2 images .* the first is a: GT is 32x32, smaller than gt_size 34"),
    (datasets(**lmdb(dataroot_lq="gt.lmdb")), "datasets:train: 2 of 2 .* the first is a: LQ is 32x32 and GT 32x32"),
]
TRAINING = [
    ({"train": ...}, "train: missing; training needs this section"),
    ({"train": {"total_iter": ...}}, "train:total_iter: missing; give a whole number from 1 to 1000000000, such"),
    ({"train": {"total_iter": 1.5}}, "train:total_iter: 1.5 given"),
    ({"train": {"total_iter": "5e5"}}, "train:total_iter: '5e5' given"),
    ({"train": {"pixel_opt": ...}}, "train: has no loss; give one of pixel_opt and perceptual_opt"),
    ({"train": {"pixel_opt": {"type": "L1los"}}}, "train:pixel_opt:type: 'L1los' is not known. Did you mean 'L1Loss'"),
    (
        {"train": {"pixel_opt": L1 | {"weight": 1}}},
        "train:pixel_opt:weight: L1Loss has no such argument. .*loss_weight",
    ),
    ({"train": {"gan_opt": {"type": "GANLoss"}}}, "train:gan_opt:gan_type: missing; GANLoss needs it"),
    ({"train": {"optim_g": ...}}, "train:optim_g: None given; must be a mapping with type"),
    (
        {"train": {"optim_g": {"type": "adam2", "lr": 1}}},
        "train:optim_g:type: 'adam2' is not known. Did you mean 'Adam'",
    ),
    ({"train": {"optim_g": {"type": "Adam"}}}, "train:optim_g:lr: missing; Adam needs it"),
    ({"train": {"optim_g": ADAM | {"beta": 1}}}, "train:optim_g:beta: Adam has no such argument. Did you mean 'betas'"),
    ({"train": {"optim_d": {"type": "Adma", "lr": 1}}}, "train:optim_d:type: 'Adma' is not known"),
    ({"train": {"optim_g": ADAM | {"betas": {"a": 1}}}}, "train:optim_g: Adam: KeyError: 0"),
    ({"train": {"optim_g": ADAM | {"betas": [2, 0.9]}}}, "train:optim_g: Adam: Invalid beta parameter at index 0: 2"),
    ({"train": {"scheduler": ...}}, "train:scheduler: None given; must be a mapping with type"),
    ({"train": {"scheduler": {"type": "LambdaLR"}}}, "scheduler:type: 'LambdaLR' is not known. .*MultiStep.*StepLR"),
    ({"train": {"scheduler": {"type": "MultiStepLR"}}}, "train:scheduler:milestones: missing; MultiStepLR needs it"),
    (
        {"train": {"scheduler": STEPS | {"gama": 1}}},
        "train:scheduler:gama: MultiStepLR has no such .* mean 'gamma'",
    ),
    (
        {"train": {"scheduler": STEPS | {"restarts": [1, 2]}}},
        "train:scheduler: MultiStepLR: AssertionError: restarts and their weights do not match",
    ),
    (cosine(restart_weights=[1]), "train:scheduler: Cosine.*periods and restart_weights should have the same length"),
    (
        cosine(periods=[50, 48]),
        "train:scheduler: Cosine.* ends after 99 iterations, before train:total_iter 100. Raise periods",
    ),
    (
        cosine(periods=100, restart_weights=[1]),
        "train:scheduler:periods: 100 given; must be a list of whole numbers",
    ),
    ({"val": {"metrics": [PSNR]}}, "val:metrics: .* given; must be a mapping of .*, such as psnr: {type"),
    ({"val": {"metrics": {"psnr": {"type": ...}}}}, "val:metrics:psnr:type: missing. Allowed: .*calculate_ssim"),
    ({"val": {"metrics": {"psnr": PSNR | {"type": "psnr"}}}}, "val:metrics:psnr:type: 'psnr' is not known"),
    (
        {"val": {"metrics": {"psnr": {"type": "calculate_psnr"}}}},
        "val:metrics:psnr:crop_border: missing; ",
    ),
    ({"path": {"resume_state": "no.state"}}, "path:resume_state: 'no.state' given, but there is no file /.*/no.state"),
    (
        {"path": {"pretrain_network_g": "no.pth"}},
        "path:pretrain_network_g: 'no.pth' given, but there is no file /",
    ),
    ({"path": {"pretrain_network_g": 3}}, "path:pretrain_network_g: 3 given, but there is no file"),
]


@pytest.mark.parametrize(("changes", "message"), GENERAL + NETWORKS + DATASETS + TRAINING)
def test_training_mistakes(changes: Options, message: str) -> None:
    problems = check(changes)
    assert len(problems) == 1 and re.match(f".*{message}", problems[0]), problems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"datasets": {"train": training()}},
            "datasets:train: a training set cannot be tested; to train, use b",
        ),
        ({"datasets": {"tset": pairs()}}, "datasets:tset: not known when testing. Did you mean 'test'"),
        ({"datasets": {"val": pairs(name="Set5")}}, "datasets:val:name: 'Set5' is also the name of datasets:test_1"),
        (
            {"datasets": {"val": {"type": "SingleImageDataset", "dataroot_lq": "empty"}}, "val": None},
            "datasets:val:dataroot_lq: the folder 'empty' has no images",
        ),
        (
            {"datasets": {"val": pairs(dataroot_lq="gt", dataroot_gt="lq")}},
            "datasets:val: 2 of 2 images .*LQ is 32x32 and GT 16x16; with scale 2 GT must be at least 64x64",
        ),
        (
            {"scale": "2", "datasets": {"test_2": ...}},
            "scale: '2' given; must be a positive integer: datasets:test_1 needs it",
        ),
        ({"path": {"pretrain_network_g": "no.pth"}}, "path:pretrain_network_g: 'no.pth' given, but there is no file"),
    ],
)
def test_testing_mistakes(changes: Options, message: str) -> None:
    problems = check(changes, is_train=False)
    assert len(problems) == 1 and re.match(message, problems[0]), problems


def test_a_network_that_is_no_mapping_is_told_before_its_model_is_asked() -> None:
    (problem,) = check({"model_type": "ESCModel", "network_g": "EDSR"})
    assert problem.startswith("network_g: 'EDSR' given; must be a mapping with type")
    (problem,) = check({"model_type": "ESCModel", "network_g": {"type": {"a": 1}}})
    assert problem.startswith("network_g:type: {'a': 1} is not known")


def test_all_problems_are_told_at_once() -> None:
    changes = merge(datasets(gt_size=15, batch_size_per_gpu=0), {"train": {"total_iter": 0}, "num_gpu": 9})
    assert len(check(changes)) == 4


@pytest.mark.parametrize(("dist", "count"), [(False, 1), (True, 0)])
def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch, dist: bool, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check({"num_gpu": 2}) == []
    problems = check({"num_gpu": 4, "dist": dist})
    expected = ["num_gpu: 4 given, but there are 2 CUDA devices. Set 2 or auto"]
    assert problems == expected[:count]


def test_counts_of_both_folders(folder: Path) -> None:
    write_images(folder / "gt", 32, ("c.png",))
    assert check(datasets(name="x") | {"val": None, "datasets": {"val": ...}}) == [
        "datasets:train:dataroot_lq: 1 of 3 images are missing, the first is lq/c.png (filename_tmpl is '{}')",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "meta_info_file: 'list.txt' cannot be used: it names no image"),
        ("\n \n", "meta_info_file: 'list.txt' cannot be used: it names no image"),
        ("sub/a.png\n", "dataroot_gt: 1 of 1 images are missing, the first is gt/sub/a.png"),
    ],
)
def test_lists(folder: Path, text: str, message: str) -> None:
    (folder / "list.txt").write_text(text)
    assert check(datasets(meta_info_file="list.txt")) == [f"datasets:train:{message}"]


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_unreadable_images(folder: Path, content: bytes) -> None:
    (folder / "lq" / "b.png").write_bytes(content)
    problems = check({"datasets": {"val": ...}})
    assert problems == ["datasets:train: lq/b.png cannot be read as an image; replace or remove it"]


def test_images_that_only_opencv_reads_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert check({}) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["a.png (16,16,3) 1", "c.png (16,20,3) 1"],
            ": 2 images in 'lq.lmdb' and 2 in 'gt.lmdb', 2 of them in one only; 'b' is missing in 'lq.lmdb'",
        ),
        (
            ["a.png (16,16,3) 1", "b.png (16,16,3) 1"],
            ": 1 of 2 images checked have a wrong size, the first is b: LQ is 16x16 and GT 40x32; "
            "with scale 2 GT must be 32x32",
        ),
        ([], ":dataroot_lq: 'lq.lmdb' has no images: its meta_info.txt is empty. Create it again: basicsr prepare"),
    ],
)
def test_lmdbs(folder: Path, lines: list[str], message: str) -> None:
    write_lmdb(folder / "lq.lmdb", lines)
    assert check(datasets(**lmdb())) == [f"datasets:train{message}"]


def test_lmdb_that_is_not_whole(folder: Path) -> None:
    for name in ("data.mdb", "meta_info.txt"):
        (folder / "lq.lmdb" / name).unlink()
    (problem,) = check(datasets(**lmdb()))
    assert "dataroot_lq: 'lq.lmdb' is not a whole LMDB: it has no data.mdb and no meta_info.txt. Create" in problem


def test_suggestions() -> None:
    assert nearest("srmodel", ["SRModel", "EDVRModel"]) == "SRModel"
    assert nearest("zzz", ["SRModel"]) is None
    assert did_you_mean("bb", ["c", "b"]) == "Did you mean 'b'? Allowed: b, c"
    assert did_you_mean(None, ["c", "b"]) == "Allowed: b, c"
