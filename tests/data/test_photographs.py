"""The demo data come from the installed scikit-image, and are what BasicSR trains and validates on."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from basicsr.data.paired_image_dataset import PairedImageDataset

from esc_arch.cli import prepare as cli
from esc_arch.cli.arguments import add_arguments
from esc_arch.data import photographs
from esc_arch.data.image_files import read_image
from esc_arch.data.photographs import TRAIN, VALIDATION, read_photograph
from esc_arch.errors import UserError


def test_photographs() -> None:
    assert not set(TRAIN) & set(VALIDATION)
    for name in TRAIN + VALIDATION:
        image = read_photograph(name)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert min(image.shape[:2]) >= photographs.CROP_SIZE
    np.testing.assert_array_equal(read_photograph("coffee")[:, :, ::-1], skimage.data.coffee())
    np.testing.assert_array_equal(read_photograph("coins"), np.stack([skimage.data.coins()] * 3, axis=2))


def test_missing_photograph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = r"'no_such' does not come with the installed scikit-image [\d.]+ \(AttributeError: .*\)\. Install"
    monkeypatch.setattr(photographs, "TRAIN", ("no_such",))
    with pytest.raises(UserError, match=message):
        photographs.prepare_demo(tmp_path)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(photographs, "TRAIN", ("coins", "chelsea"))
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_arguments(parser, "prepare")
    args = parser.parse_args(["demo", "-j", "2"])
    assert cli.run(args) == 0
    out = capsys.readouterr().out
    assert "gt_size can be up to 240." in out
    assert out.endswith(": basicsr train -opt options/train_ESC_x2_demo.yml\n")
    for phase, count in (("train", 2 * 3 + 2 * 3), ("val", 3)):
        training = phase == "train"
        root = Path("datasets/demo")
        dataset = PairedImageDataset(
            {
                "dataroot_gt": str(root / ("train_HR_sub.lmdb" if training else "val/HR")),
                "dataroot_lq": str(root / ("train_LR_bicubic_X2_sub.lmdb" if training else "val/LR_bicubic/X2")),
                "io_backend": {"type": "lmdb" if training else "disk"},
                "filename_tmpl": "{}" if training else "{}x2",
                "gt_size": 96,
                "use_hflip": True,
                "use_rot": True,
                "scale": 2,
                "phase": phase,
            }
        )
        assert len(dataset) == count
        pair = dataset[0]
        assert [2 * side for side in pair["lq"].shape[1:]] == list(pair["gt"].shape[1:])
        del dataset
    np.testing.assert_array_equal(read_image(root / "val/HR/coffee.png"), read_photograph("coffee")[:396])

    files = {path: path.stat().st_mtime_ns for path in root.rglob("*.mdb")} | {
        path: path.stat().st_mtime_ns for path in root.rglob("*.png")
    }
    assert cli.run(args) == 0
    said = capsys.readouterr().out
    assert len(re.findall("is complete already", said)) == 4
    assert "3 of 3 images are finished already." in said
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
