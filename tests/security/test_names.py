"""Names that come with data lead nowhere but into the output folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from basicsr.utils.registry import DATASET_REGISTRY
from torch.utils.data import Dataset

from esc_arch.data.names import image_name

ODD = {
    "newline": "a\nb",
    "long": "x" * 240,
    "long and not ASCII": "超" * 80,
    "unicode": "超解像 é",
    "no UTF-8": "a\udcff",
    "control characters": "a\x1b[31mb",
    "dots": "a..b",
    "spaces and quotes": " 'a\" b ",
    "percent and braces": "{}%s$HOME",
}


@pytest.mark.parametrize(
    "path",
    [
        "..",
        ".",
        "",
        "/",
        "a/..",
        "../..",
        "/etc/passwd",
        "a\0b",
        "a/b\\..\\c",
        "x" * 5000,
        "é" * 300,
        "a\udcff",
        "a\nb",
        "...",
    ],
)
def test_names_of_files(path: str) -> None:
    name = image_name(path)
    assert name not in ("", ".", "..") and not set(name) & set("/\\\0\n")
    assert len(f"{name}_1000000.png".encode()) < 255
    assert os.path.dirname(os.path.normpath(os.path.join("/out", name))) == "/out"
    assert image_name(f"{name}.png") == name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/baboon.png", "baboon"),
        ("0001_s001", "0001_s001"),
        ("a.b.png", "a.b"),
        ("超解像 é.png", "超解像 é"),
        (".a.png", ".a"),
    ],
)
def test_good_names_stay(path: str, name: str) -> None:
    assert image_name(path) == image_name(Path(path)) == name


def test_names_that_were_changed_stay_apart() -> None:
    names = [image_name(path) for path in ("x" * 300, "x" * 301, "a\nb", "a\tb", "..", ".")]
    assert len(set(names)) == len(names)


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def options_with_all_pictures(options: Any, model_type: str) -> Any:
    options["model_type"] = model_type
    options["val"] |= {"save_img": True}
    options["logger"]["use_tb_logger"] = True
    if model_type == "ESCModel":
        options["val"] |= {"comparison": True, "per_image": True, "tb_images": 1}
    return options


@pytest.mark.parametrize("model_type", ["ESCModel", "SRModel"])
def test_odd_names_of_files(model_type: str, run_basicsr: Any, train_options: Any, photographs: Any) -> None:
    """Training with all pictures, figures and TensorBoard; every image gives a picture."""
    folders = {kind: run_basicsr.folder / "data" / kind for kind in ("gt", "lq")}
    for kind, folder in folders.items():
        folder.mkdir(parents=True)
        source = sorted(getattr(photographs, f"val_{kind}").iterdir())[0]
        for name in ODD.values():
            shutil.copy(source, folder / f"{name}.png")
        train_options["datasets"]["val"][f"dataroot_{kind}"] = str(folder)
    del train_options["datasets"]["val"]["filename_tmpl"]
    options = options_with_all_pictures(train_options, model_type)
    options["val"]["val_freq"] = 4
    run = run_basicsr("train", options)
    assert run.status == 0, run.err
    assert "Traceback" not in run.err and "Logging error" not in run.err
    assert {path.split(os.sep)[0] for path in written(run.folder)} == {"data", "experiments", "tb_logger", "trial.yml"}
    pictures = run.experiment() / "visualization"
    for name in ODD.values():
        fit = image_name(name + ".png")
        assert list(pictures.glob(f"{fit.replace('[', '[[]')}/*.png")), name
    assert (pictures / "超解像 é" / "超解像 é_4.png").is_file()


def lmdb_of(path: Path, keys: list[str], image: bytes) -> None:
    with lmdb.open(str(path), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        for key in keys:
            transaction.put(key.encode(), image)
    (path / "meta_info.txt").write_text("".join(f"{key}.png (24,16,3) 1\n" for key in keys))


@pytest.mark.parametrize("model_type", ["ESCModel", "SRModel"])
def test_keys_of_an_lmdb(
    model_type: str, run_basicsr: Any, test_options: Any, photographs: Any, tmp_path: Path
) -> None:
    image = sorted(photographs.val_lq.iterdir())[0].read_bytes()
    keys = ["/tmp/absolute", f"{tmp_path}/outside", "a/b/c", "k" * 500, "back\\slash", "nul\0"]
    lmdb_of(run_basicsr.folder / "lq.lmdb", keys, image)
    test_options["datasets"] = {
        "test_1": {
            "name": "Keys", "type": "SingleImageDataset", "dataroot_lq": "lq.lmdb", "io_backend": {"type": "lmdb"}
        }
    }  # fmt: skip
    del test_options["val"]["metrics"]
    test_options["model_type"] = model_type
    before = written(tmp_path)
    run = run_basicsr("test", test_options)
    assert run.status == 0, run.err
    new = {name for name in written(tmp_path) - before if not name.endswith("trial.yml")}
    assert all(name.startswith("work/results") for name in new), new
    pictures = list((run.folder / "results").rglob("*.png"))
    assert len(pictures) == len(keys)
    assert {path.parent.name for path in pictures} == {"Keys"}


@pytest.mark.parametrize("line", ["../x", "..", "a\0b", ""], ids=ascii)
def test_keys_that_lead_upwards_are_no_keys(line: str, run_basicsr: Any, test_options: Any, photographs: Any) -> None:
    """BasicSR cuts a key at its first dot."""
    lmdb_of(run_basicsr.folder / "lq.lmdb", ["good"], sorted(photographs.val_lq.iterdir())[0].read_bytes())
    with open(run_basicsr.folder / "lq.lmdb" / "meta_info.txt", "a") as listed:
        listed.write(f"{line}\n")
    test_options["datasets"] = {
        "test_1": {
            "name": "Keys", "type": "SingleImageDataset", "dataroot_lq": "lq.lmdb", "io_backend": {"type": "lmdb"}
        }
    }  # fmt: skip
    del test_options["val"]["metrics"]
    run = run_basicsr("test", test_options)
    assert run.status == 2
    assert "Traceback" not in run.err


@pytest.mark.parametrize("line", ["../outside/a.png", "{}/outside/a.png", "a\0b.png", "x" * 300 + ".png"], ids=ascii)
def test_entries_of_a_list(line: str, run_basicsr: Any, test_options: Any, photographs: Any) -> None:
    """Images may be anywhere; results may not."""
    (run_basicsr.folder / "in").mkdir()
    outside = run_basicsr.folder / "outside"
    outside.mkdir()
    shutil.copy(sorted(photographs.val_lq.iterdir())[0], outside / "a.png")
    (run_basicsr.folder / "list.txt").write_text(line.format(run_basicsr.folder) + "\n")
    test_options["datasets"] = {
        "test_1": {
            "name": "Listed", "type": "SingleImageDataset", "dataroot_lq": "in", "meta_info_file": "list.txt",
            "io_backend": {"type": "disk"},
        }
    }  # fmt: skip
    del test_options["val"]["metrics"]
    run = run_basicsr("test", test_options)
    assert "Traceback" not in run.err
    assert [path.name for path in outside.iterdir()] == ["a.png"]
    if "outside" in line:
        assert run.status == 0, run.err
        assert (run.folder / "results/trial/visualization/Listed/a_trial.png").is_file()
    else:
        assert run.status == 2
        assert "1 of 1 images are missing" in run.err and "\0" not in run.err


class UpwardDataset(Dataset[Any]):
    """Of somebody else: its images say that they are above the folder."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return {"lq": torch.rand(3, 8, 8), "lq_path": "/somewhere/.."}


@pytest.mark.parametrize("model_type", ["ESCModel", "SRModel"])
def test_paths_of_other_data_sets(model_type: str, run_basicsr: Any, train_options: Any) -> None:
    DATASET_REGISTRY._obj_map.setdefault("UpwardDataset", UpwardDataset)
    train_options["datasets"]["val"] = {"name": "Up", "type": "UpwardDataset"}
    train_options["val"].pop("metrics")
    train_options["val"]["save_img"] = True
    train_options["model_type"] = model_type
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    pictures = {str(path.relative_to(run.experiment())) for path in run.experiment().rglob("*.png")}
    name = image_name("/somewhere/..")
    assert {f"visualization/{name}/{name}_{iteration}.png" for iteration in (2, 4)} <= pictures
    assert all(path.startswith("visualization/") or path == "training.png" for path in pictures)
