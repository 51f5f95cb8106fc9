"""The option files of ESCLTE: their head, the network at full size, and a run at reduced size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from basicsr.archs import build_network
from skimage.data import astronaut

from esc_arch.data.benchmark import prepare_benchmark
from esc_arch.data.image_files import Source
from esc_arch.data.prepare import prepare_train
from esc_arch.options import apply_force_yml, load_yaml

ROOT = Path(__file__).parents[2]
TRAIN, TEST = (ROOT / "options" / f"{verb}_ESCLTE.yml" for verb in ("train", "test"))
SETS = ("Set5", "Set14", "B100", "Urban100")

SMALL = [
    "network_g:dim=8",
    "network_g:pdim=4",
    "network_g:n_blocks=1",
    "network_g:conv_blocks=1",
    "network_g:window_size=4",
    "network_g:num_heads=2",
    "network_g:hidden_dim=8",
    "network_g:mlp_dims=[8]",
]


@pytest.fixture
def datasets(work_folder: Path) -> Path:
    """`datasets/` with everything that the files name, from one patch of a photograph."""
    folder = work_folder / "datasets"
    patch = cv2.cvtColor(astronaut(), cv2.COLOR_RGB2BGR)[100:148, 150:210]
    sources = [Source("patch.png", patch.copy, ("patch",))]
    prepare_train(sources, folder / "DIV2K", "DIV2K_train", crop_size=48, overlap=24)
    for name in SETS:
        prepare_benchmark(sources, folder / "benchmark" / name)
    return folder


@pytest.mark.parametrize("file", [TRAIN, TEST], ids=lambda file: file.stem)
def test_head_and_network(file: Path) -> None:
    head = file.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in head)
    assert any(f"basicsr {file.name.partition('_')[0]} -opt options/{file.name}" in line for line in head)
    assert any(line.startswith("# Data: datasets/") for line in head)
    opt = load_yaml(file)
    assert sum(p.numel() for p in build_network(opt["network_g"]).parameters()) == 1_433_631
    for dataset in opt["datasets"].values():
        assert dataset["dataroot_gt"].startswith("datasets/")


def test_scales_and_sets() -> None:
    wanted = [(name, scale) for scale in (2, 3, 4, 6, 8) for name in SETS] + [("Set5", 2.5)]
    given = load_yaml(TEST)["datasets"].values()
    assert [(dataset["name"], dataset["scale"]) for dataset in given] == [(f"{n}_x{s}", s) for n, s in wanted]


def test_the_recipe_is_that_of_esc() -> None:
    opt, of_esc = load_yaml(TRAIN), load_yaml(ROOT / "options" / "train_ESC_x2.yml")
    assert opt["train"] == of_esc["train"]
    assert (opt["logger"], opt["dist_params"]) == (of_esc["logger"], of_esc["dist_params"])
    for key in ("batch_size_per_gpu", "dataroot_gt", "dataset_enlarge_ratio", "io_backend", "num_worker_per_gpu"):
        assert opt["datasets"]["train"][key] == of_esc["datasets"]["train"][key]
    shared = opt["network_g"].keys() & of_esc["network_g"].keys() - {"type"}
    assert {key: opt["network_g"][key] for key in shared} == {key: of_esc["network_g"][key] for key in shared}


@pytest.mark.usefixtures("datasets")
def test_train_file_runs(run_basicsr: Any) -> None:
    changes = ["train:total_iter=2", "train:warmup_iter=1", "val:val_freq=2", "logger:print_freq=1",
               "datasets:train:lq_size=8", "datasets:train:sample_q=64", "datasets:train:batch_size_per_gpu=2",
               "datasets:train:num_worker_per_gpu=0"]  # fmt: skip
    result = run_basicsr("train", str(TRAIN), "--force_yml", *SMALL, *changes)
    assert result.status == 0, result.err
    log = result.log("ESCLTE")
    assert all(f"Validation Set5_x{scale}" in log for scale in (2, 2.5, 3, 4, 6, 8))


@pytest.mark.usefixtures("datasets")
def test_test_file_runs(run_basicsr: Any) -> None:
    opt = copy.deepcopy(load_yaml(TEST))
    apply_force_yml(opt, SMALL)
    weights = run_basicsr.folder / opt["path"]["pretrain_network_g"]
    weights.parent.mkdir(parents=True)
    torch.save({"params_ema": build_network(opt["network_g"]).state_dict()}, weights)
    result = run_basicsr("test", str(TEST), "--force_yml", *SMALL)
    assert result.status == 0, result.err
    log = result.log("test_ESCLTE", of="results")
    pictures = run_basicsr.folder / "results/test_ESCLTE/visualization"
    for dataset in opt["datasets"].values():
        assert f"Validation {dataset['name']}" in log
        (picture,) = (pictures / dataset["name"]).glob("*.png")
        low = [int(n / dataset["scale"]) for n in (48, 60)]
        assert cv2.imread(str(picture)).shape[:2] == tuple(round(n * dataset["scale"]) for n in low)
