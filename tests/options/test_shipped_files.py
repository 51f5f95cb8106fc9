"""Every option file that ships: its head, its network at full size, and a run of it at reduced size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from skimage import data
from small_real import use_small_images, use_small_vgg19

from esc_arch.data.benchmark import prepare_benchmark
from esc_arch.data.hr_images import as_list
from esc_arch.data.image_files import Source, encode_png
from esc_arch.data.prepare import prepare_train
from esc_arch.options import load_yaml

ROOT = Path(__file__).parents[2]
FILES = sorted(file for file in (ROOT / "options").glob("*.yml") if "ESCLTE" not in file.name)  # test_lte_files.py
TEST_FILES = [file for file in FILES if file.name.startswith("test_")]
TRAIN_FILES = [file for file in FILES if file not in TEST_FILES]
BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")

NETWORKS = ("ESC", "ESC_light", "ESC_XL", "ESC_FP", "ESC_DFLIP", "ESC_RIB")
EXPECTED = {f"{verb}_{net}_x{scale}.yml" for verb in ("train", "test") for net in NETWORKS for scale in (2, 3, 4)}
EXPECTED |= {f"train_ESC_FlashBias_x{scale}.yml" for scale in (2, 3, 4)}
EXPECTED |= {"train_ESC_x2_demo.yml"}
EXPECTED |= {"finetune_ESC_x4.yml"}
EXPECTED |= {"train_ESC_Real_x4_mse.yml", "train_ESC_Real_x4_gan.yml", "test_ESC_Real_x4.yml"}

#: As published: parameters by network and scale.
PARAMETERS = {
    "ESC": {2: 946_728, 3: 955_383, 4: 967_500},
    "ESC_DFLIP": {2: 946_728, 3: 955_383, 4: 967_500},
    "ESC_light": {2: 603_600, 3: 612_255, 4: 624_372},
    "ESC_XL": {2: 12_455_916},
    "ESC_FP": {2: 523_675, 3: 530_170, 4: 539_263},
    "ESC_RIB": {2: 1_007_796},
    "ESC_Real": {4: 2_265_307},
    # ESC's, with 2 x 4 x 1024 x 48 factors for 4 x 63^2 entries of the tables in each of 5 blocks
    "ESC_FlashBias": {scale: ESC + 5 * (393_216 - 15_876) for scale, ESC in ((2, 946_728), (3, 955_383), (4, 967_500))},
}

#: What makes a network small, by its type; the rest of a file stays as it is.
SMALL_BODY = {"dim": 8, "pdim": 4, "n_blocks": 1, "conv_blocks": 1, "window_size": 4, "num_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "ESC": SMALL_BODY | {"use_ln": False},
    "ESCFP": SMALL_BODY,
    "ESCReal": SMALL_BODY,
    "ESCRIB": SMALL_BODY | {"rank": 2, "rib_hidden_dim": 4, "rib_n_freqs": 2},
}

#: What makes a training small.
SHORT = {
    "train:total_iter": 3,
    "train:warmup_iter": 2,
    "val:val_freq": 2,
    "logger:print_freq": 1,
    "logger:save_checkpoint_freq": 2,
    "datasets:train:batch_size_per_gpu": 2,
    "datasets:train:num_worker_per_gpu": 0,
}


def by_name(file: Path) -> str:
    return file.stem


def network_of(file: Path) -> tuple[str, int]:
    """`ESC_light`, 3 for train_ESC_light_x3.yml."""
    network, _, rest = file.stem.partition("_")[2].rpartition("_x")
    return network, int(rest[0])


def is_real(file: Path) -> bool:
    return network_of(file)[0] == "ESC_Real"


def distinct(files: list[Path]) -> list[Path]:
    """One of those files that are the same at reduced size, except for the names of runs and checkpoints."""
    found = {}
    for file in files:
        opt = load_yaml(file)
        small = opt | {"network_g": opt["network_g"] | SMALL[opt["network_g"]["type"]], "name": None, "path": None}
        found[json.dumps(small, sort_keys=True)] = file
    return list(found.values())


def forced(changes: dict[str, Any]) -> list[str]:
    return ["--force_yml", *(f"{key}={value}" for key, value in changes.items())]


@pytest.fixture(scope="session")
def data_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`datasets/` with everything that the option files name, from two patches of a photograph each."""
    datasets = tmp_path_factory.mktemp("shipped") / "datasets"
    photograph = data.astronaut()[:, :, ::-1]
    patches = {"left": photograph[100:148, 150:210], "right": photograph[100:148, 220:280]}
    (datasets / "photographs").mkdir(parents=True)
    (datasets / "photographs" / "face.png").write_bytes(encode_png(photograph[100:160, 150:210]))
    for part in ("train", "val"):
        (datasets / "my_photographs" / part).mkdir(parents=True)
        (datasets / "my_photographs" / part / f"{part}.png").write_bytes(encode_png(patches["left"]))
    sources = [Source(name, (lambda patch=patch: patch.copy()), (name,)) for name, patch in patches.items()]
    names = {"DIV2K": "DIV2K_train", "demo": "train"}
    names |= {name: name for name in ("Flickr2K", "LSDIR", "DiverSeg-IP", "DF2K_OST")}
    for folder, name in names.items():
        prepare_train(sources, datasets / folder, name, crop_size=48, overlap=24)
    for name in BENCHMARKS:
        prepare_benchmark(sources[:1], datasets / "benchmark" / name)
    prepare_benchmark(sources[:1], datasets / "demo" / "val")
    return datasets


def test_the_files_are_those_promised() -> None:
    assert {file.name for file in FILES} == EXPECTED


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_head(file: Path) -> None:
    head = file.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in head)
    verb = "test" if file in TEST_FILES else "train"
    assert any(f"basicsr {verb} -opt options/{file.name}" in line for line in head)
    assert any(line.startswith("# Data: datasets/") for line in head)


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_data_paths_are_relative(file: Path) -> None:
    for dataset in load_yaml(file)["datasets"].values():
        roots = [root for key in ("dataroot_gt", "dataroot_lq") for root in as_list(dataset.get(key))]
        assert roots and all(root.startswith("datasets/") for root in roots)


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_full_size_network(file: Path) -> None:
    section = load_yaml(file)["network_g"]
    network, scale = network_of(file)
    assert section["upscaling_factor"] == load_yaml(file)["scale"] == scale
    if "demo" not in file.name and scale in PARAMETERS[network]:
        assert sum(p.numel() for p in build_network(section).parameters()) == PARAMETERS[network][scale]


@pytest.mark.parametrize(
    "file",
    [file for file in TRAIN_FILES if not re.search("Real|demo|FlashBias|finetune", file.name)],
    ids=by_name,
)
def test_published_recipe(file: Path) -> None:
    opt = load_yaml(file)
    train, train_set = opt["train"], opt["datasets"]["train"]
    assert train_set["gt_size"] == 64 * opt["scale"] and train_set["batch_size_per_gpu"] == 16
    assert train["optim_g"] == {"type": "AdamW", "lr": 5e-4, "weight_decay": 0, "betas": [0.9, 0.9]}
    assert train["scheduler"]["milestones"] == [250_000, 400_000, 450_000, 475_000, 490_000]
    assert (train["scheduler"]["gamma"], train["total_iter"], train["warmup_iter"]) == (0.5, 500_000, 20_000)
    assert (train["ema_decay"], train["pixel_opt"]["type"]) == (0.999, "L1Loss")
    assert [opt["datasets"][f"val_{i}"]["name"] for i in range(1, 6)] == list(BENCHMARKS)
    if opt["scale"] == 2:
        assert opt["path"]["pretrain_network_g"] is None
    else:
        assert opt["path"]["pretrain_network_g"].endswith("_x2/models/net_g_latest.pth")
        assert opt["path"]["param_key_g"] == "params_ema"


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_recipe_of_flashbias(scale: int) -> None:
    opt = load_yaml(ROOT / "options" / f"train_ESC_FlashBias_x{scale}.yml")
    assert opt["train"]["optim_g"] == {"type": "AdamW", "lr": 5e-5, "weight_decay": 0, "betas": [0.9, 0.9]}
    assert (opt["network_g"]["attn_type"], opt["network_g"]["flashbias_rank"]) == ("FlashBias", 48)
    assert (opt["path"]["pretrain_network_g"], opt["path"]["strict_load_g"]) == (
        f"experiments/pretrained_models/ESC_X{scale}.pth",
        True,
    )


def test_published_data_of_dflip() -> None:
    for scale in (2, 3, 4):
        train_set = load_yaml(ROOT / "options" / f"train_ESC_DFLIP_x{scale}.yml")["datasets"]["train"]
        assert train_set["type"] == "DownsampleImageDataset"
        folders = [Path(root).parent.name for root in train_set["dataroot_gt"]]
        assert folders == ["DIV2K", "Flickr2K", "LSDIR", "DiverSeg-IP"]


@pytest.mark.parametrize("file", [file for file in TRAIN_FILES if is_real(file)], ids=by_name)
def test_published_real_recipe(file: Path) -> None:
    opt = load_yaml(file)
    train = opt["train"]
    assert opt["gt_size"] == 256 and opt["datasets"]["train"]["batch_size_per_gpu"] == 12
    assert train["pixel_opt"] == {"type": "L1Loss", "loss_weight": 1, "reduction": "mean"}
    assert (train["ema_decay"], train["warmup_iter"]) == (0.999, -1)
    generator = train["optim_g"]
    if file.stem.endswith("mse"):
        assert opt["gt_usm"] is True
        assert generator == {"type": "AdamW", "lr": 5e-4, "weight_decay": 0, "betas": [0.9, 0.9]}
        assert train["scheduler"] == {"type": "MultiStepLR", "milestones": [100_000], "gamma": 0.4}
        assert train["total_iter"] == 1_000_000
        return
    assert [opt[f"{loss}_gt_usm"] for loss in ("l1", "percep", "gan")] == [True, True, False]
    assert (generator["type"], generator["lr"]) == ("Adam", 1e-4) and train["optim_d"] == generator
    assert train["total_iter"] == 400_000 and min(train["scheduler"]["milestones"]) >= 400_000
    assert opt["network_d"]["type"] == "UNetDiscriminatorSN"
    layers = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1, "conv4_4": 1, "conv5_4": 1}
    assert (train["perceptual_opt"]["layer_weights"], train["perceptual_opt"]["perceptual_weight"]) == (layers, 1)
    assert train["gan_opt"]["loss_weight"] == 0.1
    assert opt["path"]["pretrain_network_g"] == "experiments/ESC_Real_x4_mse/models/net_g_latest.pth"


@pytest.mark.parametrize("file", distinct(TRAIN_FILES), ids=by_name)
def test_train_file_runs(
    file: Path,
    data_folders: Path,
    work_folder: Path,
    run_basicsr: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opt = load_yaml(file)
    (work_folder / "datasets").symlink_to(data_folders)
    if source := opt["path"]["pretrain_network_g"]:
        if opt["network_g"].get("attn_type") == "FlashBias":  # as the head of the file says
            tables = opt | {"network_g": opt["network_g"] | {"attn_type": "auto"}}
            save_small_weights(work_folder / source, tables, opt["scale"])
        else:
            save_small_weights(work_folder / source, opt, scale=2 if "_x2/" in source else opt["scale"])
    changes = SHORT | small_network(opt)
    if is_real(file):
        use_small_images(monkeypatch)
        use_small_vgg19(monkeypatch)
        changes |= {"gt_size": 32, "queue_size": 3}
    else:
        changes |= {"datasets:train:gt_size": 8 * opt["scale"]}
    if "network_d" in opt:
        changes |= {"network_d:num_feat": 4}
    result = run_basicsr("train", str(file), *forced(changes))
    assert result.status == 0, result.err
    folder = result.experiment(opt["name"])
    assert set(torch.load(folder / "models" / "net_g_latest.pth", weights_only=True)) == {"params", "params_ema"}
    assert ("network_d" in opt) == (folder / "models" / "net_d_latest.pth").exists()
    log = result.log(opt["name"])
    assert "Validation Set5" in log or "Validation photographs" in log
    if "FlashBias" in file.name:
        assert "is of attention with bias tables: FlashBias factors of rank 48 were made from them" in log
    elif "_x2/" in (source or ""):
        assert f".weight was interpolated from x2 to x{opt['scale']}" in log
    assert list((work_folder / "tb_logger" / opt["name"]).glob("events.*"))


@pytest.mark.parametrize("file", distinct(TEST_FILES), ids=by_name)
def test_test_file_runs(file: Path, data_folders: Path, work_folder: Path, run_basicsr: Callable[..., Any]) -> None:
    opt = load_yaml(file)
    (work_folder / "datasets").symlink_to(data_folders)
    save_small_weights(work_folder / opt["path"]["pretrain_network_g"], opt, scale=opt["scale"])
    result = run_basicsr("test", str(file), *forced(small_network(opt)))
    assert result.status == 0, result.err
    names = tuple(dataset["name"] for dataset in opt["datasets"].values())
    assert names == (("photographs",) if is_real(file) else BENCHMARKS)
    log = result.log(opt["name"], of="results")
    for name in names:
        assert f"Validation {name}" in log and ": nan" not in log
        assert len(list((work_folder / "results" / opt["name"] / "visualization" / name).glob("*.png"))) == 1


def small_network(opt: dict[str, Any]) -> dict[str, Any]:
    return {f"network_g:{key}": value for key, value in SMALL[opt["network_g"]["type"]].items()}


def save_small_weights(path: Path, opt: dict[str, Any], scale: int) -> None:
    options = opt["network_g"] | SMALL[opt["network_g"]["type"]] | {"upscaling_factor": scale}
    net = build_network(options)
    if options["type"] == "ESCReal":  # whose result would be black, of which NIQE has no statistics
        net.to_img[-1].weight.data *= 30
        net.to_img[-1].bias.data.fill_(0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"params": net.state_dict(), "params_ema": net.state_dict()}, path)
