"""Every option file that ships: its head, its network at full size, and a run of it at reduced size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from skimage import data

from esc_arch.data.benchmark import prepare_benchmark
from esc_arch.data.image_files import Source
from esc_arch.data.prepare import prepare_train
from esc_arch.options import apply_force_yml, load_yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "options").glob("*.yml"))
TRAIN_FILES = [file for file in FILES if file.name.startswith("train_")]
TEST_FILES = [file for file in FILES if file.name.startswith("test_")]
BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")

EXPECTED = {f"train_{net}_x{scale}.yml" for net in ("ESC", "ESC_light") for scale in (2, 3, 4)}
EXPECTED |= {f"test_{net}_x{scale}.yml" for net in ("ESC", "ESC_light", "ESC_XL") for scale in (2, 3, 4)}
EXPECTED |= {"train_ESC_x2_demo.yml"}

#: Of ESC.md's table: parameters by network and scale.
PARAMETERS = {
    "ESC": {2: 946_728, 3: 955_383, 4: 967_500},
    "ESC_light": {2: 603_600, 3: 612_255, 4: 624_372},
    "ESC_XL": {2: 12_455_916},
}

#: What makes a network and a run small; the rest of a file stays as it is.
SMALL = [
    "network_g:dim=8",
    "network_g:pdim=4",
    "network_g:n_blocks=1",
    "network_g:conv_blocks=1",
    "network_g:window_size=4",
    "network_g:num_heads=2",
    "network_g:use_ln=false",
]


def by_name(file: Path) -> str:
    return file.stem


def network_of(file: Path) -> tuple[str, int]:
    """`ESC_light`, 3 for train_ESC_light_x3.yml."""
    network, _, scale = file.stem.removeprefix("train_").removeprefix("test_").removesuffix("_demo").rpartition("_x")
    return network, int(scale)


@pytest.fixture(scope="session")
def data_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`datasets/` with everything that the option files name, from two patches of a photograph each."""
    datasets = tmp_path_factory.mktemp("shipped") / "datasets"
    photograph = data.astronaut()[:, :, ::-1]
    patches = {"left": photograph[100:148, 150:210], "right": photograph[100:148, 220:280]}
    sources = [Source(name, (lambda patch=patch: patch.copy()), (name,)) for name, patch in patches.items()]
    for folder, name in (("DIV2K", "DIV2K_train"), ("demo", "train")):
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
    verb = file.name.partition("_")[0]
    assert any(f"basicsr {verb} -opt options/{file.name}" in line for line in head)
    assert any(line.startswith("# Data: datasets/") for line in head)


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_data_paths_are_relative(file: Path) -> None:
    for dataset in load_yaml(file)["datasets"].values():
        for key in ("dataroot_gt", "dataroot_lq"):
            assert dataset[key].startswith("datasets/")


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_full_size_network(file: Path) -> None:
    section = load_yaml(file)["network_g"]
    network, scale = network_of(file)
    assert section["upscaling_factor"] == load_yaml(file)["scale"] == scale
    if "demo" not in file.name and scale in PARAMETERS[network]:
        assert sum(p.numel() for p in build_network(section).parameters()) == PARAMETERS[network][scale]


@pytest.mark.parametrize("file", [file for file in TRAIN_FILES if "demo" not in file.name], ids=by_name)
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


@pytest.mark.parametrize("file", TRAIN_FILES, ids=by_name)
def test_train_file_runs(file: Path, data_folders: Path, work_folder: Path, run_basicsr: Callable[..., Any]) -> None:
    opt = load_yaml(file)
    (work_folder / "datasets").symlink_to(data_folders)
    if source := opt["path"]["pretrain_network_g"]:
        save_small_weights(work_folder / source, scale=2)
    size = 8 * opt["scale"]
    changes = ["train:total_iter=3", "train:warmup_iter=2", "val:val_freq=2", "logger:print_freq=1",
               "logger:save_checkpoint_freq=2", f"datasets:train:gt_size={size}", "datasets:train:batch_size_per_gpu=2",
               "datasets:train:num_worker_per_gpu=0"]  # fmt: skip
    result = run_basicsr("train", str(file), "--force_yml", *SMALL, *changes)
    assert result.status == 0, result.err
    folder = result.experiment(opt["name"])
    assert set(torch.load(folder / "models" / "net_g_latest.pth", weights_only=True)) == {"params", "params_ema"}
    log = result.log(opt["name"])
    assert "Validation Set5" in log or "Validation photographs" in log
    if opt["scale"] > 2:
        assert f"to_img.weight was interpolated from x2 to x{opt['scale']}" in log
    assert list((work_folder / "tb_logger" / opt["name"]).glob("events.*"))


@pytest.mark.parametrize("file", TEST_FILES, ids=by_name)
def test_test_file_runs(file: Path, data_folders: Path, work_folder: Path, run_basicsr: Callable[..., Any]) -> None:
    opt = load_yaml(file)
    (work_folder / "datasets").symlink_to(data_folders)
    save_small_weights(work_folder / opt["path"]["pretrain_network_g"], scale=opt["scale"])
    result = run_basicsr("test", str(file), "--force_yml", *SMALL)
    assert result.status == 0, result.err
    log = result.log(opt["name"], of="results")
    for name in BENCHMARKS:
        assert f"Validation {name}" in log
        assert len(list((work_folder / "results" / opt["name"] / "visualization" / name).glob("*.png"))) == 1


def save_small_weights(path: Path, scale: int) -> None:
    options: dict[str, Any] = {}
    apply_force_yml(options, SMALL)
    net = ARCH_REGISTRY.get("ESC")(**options["network_g"], upscaling_factor=scale)
    path.parent.mkdir(parents=True)
    torch.save({"params": net.state_dict(), "params_ema": net.state_dict()}, path)
