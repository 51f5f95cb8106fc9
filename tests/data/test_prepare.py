"""What ``basicsr prepare`` makes is what BasicSR reads, exactly; nothing is lost, half written or overwritten."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.matlab_functions import imresize
from ranks import SERVER, finish, start_forked

from esc_arch.cli import prepare as cli
from esc_arch.cli.arguments import add_arguments
from esc_arch.data import benchmark, image_files, lmdb_writer, prepare, worker_pool
from esc_arch.data.image_files import Image, folder_sources, read_image, sub_image_starts
from esc_arch.data.lmdb_check import listed_sizes
from esc_arch.data.lmdb_writer import LmdbWriter
from esc_arch.errors import UserError

CUT = ["--crop-size", "48", "--overlap", "24", "-j", "1"]


def photograph(height: int, width: int, seed: int = 0) -> Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 0.7)


def save(path: Path, image: Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


@pytest.fixture
def hr_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set_HR"
    for index, size in enumerate([(101, 130), (96, 96), (50, 200), (80, 75)]):
        save(folder / f"im{index}.png", photograph(*size, index))
    return folder


def basicsr_prepare(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser, "prepare")
    return cli.run(parser.parse_args([str(argument) for argument in arguments]))


def expected_lr(hr: Image, scale: int) -> Image:
    return (np.clip(imresize(hr.astype(np.float32) / 255, 1 / scale), 0, 1) * 255.0).round().astype(np.uint8)


def content(lmdb_path: Path) -> dict[str, bytes]:
    with lmdb.open(str(lmdb_path), readonly=True, lock=False) as env, env.begin() as transaction:
        return {key.decode(): bytes(value) for key, value in transaction.cursor()}


def images(lmdb_path: Path) -> dict[str, Image]:
    return {key: cv2.imdecode(np.frombuffer(data, np.uint8), 1) for key, data in content(lmdb_path).items()}


def everything(out: Path) -> dict[str, tuple[dict[str, bytes], str]]:
    """What every LMDB in `out` has by key, and its meta_info.txt."""
    lmdbs = [meta.parent for meta in sorted(out.glob("*.lmdb/meta_info.txt"))]
    return {path.name: (content(path), (path / "meta_info.txt").read_text()) for path in lmdbs}


# --- training data ---


def test_lr_is_made_of_the_whole_image_and_cut_at_corresponding_places(hr_folder: Path, tmp_path: Path) -> None:
    assert basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path / "out", *CUT) == 0
    names = {1: "HR"} | {scale: f"LR_bicubic_X{scale}" for scale in (2, 3, 4)}
    lmdbs = {scale: tmp_path / "out" / f"set_{name}_sub.lmdb" for scale, name in names.items()}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [".prepare.lock", *(path.name for path in lmdbs.values())]
    )
    hr_pieces = images(lmdbs[1])
    assert list(hr_pieces) == sorted(listed_sizes(lmdbs[1]))

    hr = read_image(hr_folder / "im0.png")[:96, :120]  # 101 x 130, to a multiple of 12
    places = [(top, left) for top in (0, 24, 48) for left in (0, 24, 48, 72)]
    assert [key for key in hr_pieces if key.startswith("im0")] == [f"im0_s{i:03d}" for i in range(1, 13)]
    for scale, path in lmdbs.items():
        pieces = images(path)
        assert pieces.keys() == hr_pieces.keys()
        whole = hr if scale == 1 else expected_lr(hr, scale)
        for index, (top, left) in enumerate(places, start=1):
            expected = whole[top // scale : (top + 48) // scale, left // scale : (left + 48) // scale]
            np.testing.assert_array_equal(pieces[f"im0_s{index:03d}"], expected)
        assert listed_sizes(path) == {
            key: (piece.shape[0] // scale, piece.shape[1] // scale) for key, piece in hr_pieces.items()
        }


@pytest.mark.parametrize(
    ("length", "starts"),
    [(40, [0]), (48, [0]), (60, [0, 12]), (72, [0, 24]), (84, [0, 24, 36]), (96, [0, 24, 48])],
)
def test_sub_image_starts(length: int, starts: list[int]) -> None:
    assert sub_image_starts(length, 48, 24) == starts


def test_small_image_is_one_sub_image(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", photograph(24, 60))
    basicsr_prepare("train", "-i", tmp_path / "in", "-o", tmp_path, "--name", "n", *CUT)
    assert listed_sizes(tmp_path / "n_HR_sub.lmdb") == {"a_s001": (24, 48), "a_s002": (24, 48)}
    assert listed_sizes(tmp_path / "n_LR_bicubic_X4_sub.lmdb") == {"a_s001": (6, 12), "a_s002": (6, 12)}


def test_basicsr_reads_pairs_for_training(hr_folder: Path, tmp_path: Path) -> None:
    basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path, "--scales", 2, *CUT)
    dataset = PairedImageDataset(
        {
            "dataroot_gt": str(tmp_path / "set_HR_sub.lmdb"),
            "dataroot_lq": str(tmp_path / "set_LR_bicubic_X2_sub.lmdb"),
            "io_backend": {"type": "lmdb"},
            "gt_size": 48,
            "use_hflip": False,
            "use_rot": False,
            "scale": 2,
            "phase": "train",
        }
    )
    assert len(dataset) == len(listed_sizes(tmp_path / "set_HR_sub.lmdb"))
    for index in range(len(dataset)):
        pair = dataset[index]
        assert pair["gt"].shape == (3, 48, 48)
        assert pair["lq"].shape == (3, 24, 24)
        # means of 2 x 2 pixels come close to bicubic, of the right place only
        means = torch.nn.functional.avg_pool2d(pair["gt"], 2)
        assert (means - pair["lq"]).abs().mean() < 0.04 < (means.roll(1, 2) - pair["lq"]).abs().mean()


def test_dots_and_other_characters_become_underscores(tmp_path: Path) -> None:
    for name in ("a.b.png", "größe.JPG", ".hidden.png", "notes.txt"):
        save((tmp_path / "in" / name).with_suffix(".png"), photograph(48, 48))
    (tmp_path / "in" / "größe.png").rename(tmp_path / "in" / "größe.PNG")
    basicsr_prepare("train", "-i", tmp_path / "in", "-o", tmp_path, "--name", "x", "--scales", 2, *CUT)
    assert list(listed_sizes(tmp_path / "x_HR_sub.lmdb")) == ["a_b_s001", "gr__e_s001", "notes_s001"]


@pytest.mark.parametrize(
    ("names", "stored"),
    [(("a.b.png", "a_b.png"), "a_b"), (("é.png", "ü.png"), "_"), (("a.jpg", "a.png"), "a")],
)
def test_names_that_collide(tmp_path: Path, names: tuple[str, str], stored: str) -> None:
    for name in names:
        save(tmp_path / "in" / name, photograph(48, 48))
    message = f"{names[0]} and {names[1]} would both be stored as '{stored}'. Rename or remove"
    with pytest.raises(UserError, match=message):
        basicsr_prepare("train", "-i", tmp_path / "in", "-o", tmp_path / "out", *CUT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["", "x2"])
def test_given_lr_images(hr_folder: Path, tmp_path: Path, suffix: str) -> None:
    """LR images of the uncropped HR are cropped to fit."""
    for path in hr_folder.iterdir():
        hr = read_image(path)
        save(tmp_path / "LR" / f"{path.stem}{suffix}.png", photograph(-(-hr.shape[0] // 2), hr.shape[1] // 2, 7))
    out, lr = tmp_path / "out", tmp_path / "LR"
    assert basicsr_prepare("train", "-i", hr_folder, "-o", out, "--lr", f"2={lr}", *CUT) == 0
    whole = read_image(lr / f"im0{suffix}.png")
    pieces = images(out / "set_LR_bicubic_X2_sub.lmdb")
    np.testing.assert_array_equal(pieces["im0_s001"], whole[:24, :24])
    np.testing.assert_array_equal(pieces["im0_s012"], whole[24:48, 36:60])
    np.testing.assert_array_equal(
        images(out / "set_LR_bicubic_X3_sub.lmdb")["im1_s001"],
        expected_lr(read_image(hr_folder / "im1.png"), 3)[:16, :16],
    )
    # other LR images are other settings
    save(lr / f"im0{suffix}.png", photograph(52, 65, 8))
    with pytest.raises(UserError, match=r"X2_sub.lmdb exists, .* made with other settings: digest of the given LR"):
        basicsr_prepare("train", "-i", hr_folder, "-o", out, "--lr", f"2={lr}", *CUT)


@pytest.mark.parametrize("size", [(40, 65), (50, 80)])
def test_given_lr_image_that_does_not_fit(hr_folder: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    for path in hr_folder.iterdir():
        save(tmp_path / "LR" / path.name, photograph(*size))
    message = (
        rf"The LR image im0\.png has {size[0]} x {size[1]} pixels \(height x width\) and does not fit im0\.png "
        r"at scale 2: 48 x 60 pixels are needed, and no more than 6 can be cut off\. Replace or remove both"
    )
    with pytest.raises(UserError, match=message):
        basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path / "out", "--lr", f"2={tmp_path / 'LR'}", *CUT)


def test_given_lr_image_is_missing(hr_folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "LR" / "im0x2.png", photograph(50, 65))
    with pytest.raises(UserError, match=r"LR has no LR image of scale 2 for im1\.png. Its name must be im1x2 or im1"):
        basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path / "out", "--lr", f"2={tmp_path / 'LR'}", *CUT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop-size", "50"], r"The crop size is 50, but must be a multiple of 12 .* at the scales 2, 3, 4"),
        (["--overlap", "20"], r"The step \(crop size less overlap\) is 28, but must be a multiple of 12"),
        (["--overlap", "48"], r"An overlap of 48 does not go with a crop size of 48: it must be at least 0 and less"),
        (["--overlap", "-12"], r"An overlap of -12 does not go"),
        (["--scales", "1", "2"], r"The scales are \[1, 2\], but must be integers of at least 2"),
        (["--name", "a/b"], r"The name 'a/b' cannot begin a file name\. Give --name without any folder"),
        (["--name", ""], r"The name '' cannot begin a file name"),
        (["--lr", "2"], r"--lr 2 is invalid\. Give a scale and its folder, as in --lr 2=LR_bicubic/X2"),
        (["--lr", "x=a"], r"--lr x=a is invalid"),
        (["--lr", "2=missing"], r"missing is not a folder\. Give the folder that holds the images"),
        (["-j", "0"], "-j 0: give 1 or more processes"),
    ],
)
def test_arguments_that_cannot_be_used(hr_folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path / "out", *CUT, *arguments)
    assert not (tmp_path / "out").exists()


def test_lr_for_a_scale_that_is_not_made(hr_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LR folders are given for the scales \[4\], but the scales are \[2\]"):
        basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path / "out", "--scales", 2, "--lr", f"4={hr_folder}", *CUT)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> None:  # whoever runs this may be root
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("iterdir", "is_dir"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=f"^{tmp_path} cannot be read: Permission de"),
        ):
            patch.setattr(Path, name, closed)
            folder_sources(tmp_path)


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no image \(\.png .*\)\. Folders inside it are not searched"):
        basicsr_prepare("train", "-i", tmp_path, "-o", tmp_path / "out", *CUT)


@pytest.mark.parametrize("name", ["DIV2K_train_HR", "DIV2K_train", "DIV2K_train/HR"])
def test_default_name(tmp_path: Path, name: str) -> None:
    save(tmp_path / name / "a.png", photograph(48, 48))
    basicsr_prepare("train", "-i", tmp_path / name, "-o", tmp_path / "out", "--scales", 4, *CUT)
    assert (tmp_path / "out" / "DIV2K_train_LR_bicubic_X4_sub.lmdb").is_dir()


# --- images that cannot be used ---


@pytest.mark.parametrize("kind", ["train", "benchmark"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut png", "cut jpg"])
def test_unreadable_image(tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / "in" / ("b.jpg" if damage == "cut jpg" else "b.png")
    save(tmp_path / "in" / "a.png", photograph(48, 48))
    save(path, photograph(48, 48))
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>"}.get(damage, whole[: len(whole) * 9 // 10]))
    message = "is cut short" if damage == "cut jpg" else "is not an image that OpenCV can read"
    with pytest.raises(UserError, match=f"{path} {message}"):
        basicsr_prepare(kind, "-i", path.parent, "-o", tmp_path / "out", *(CUT if kind == "train" else ["-j", "1"]))
    assert not list((tmp_path / "out").glob("*.lmdb"))


def test_jpeg_cut_short_is_noticed_with_any_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV 4 makes a whole image of it."""
    path = tmp_path / "a.jpg"
    save(path, photograph(48, 48))
    assert read_image(path).shape == (48, 48, 3)
    path.write_bytes(path.read_bytes()[:-30])
    monkeypatch.setattr(image_files.cv2, "imdecode", lambda data, flags: photograph(48, 48))
    with pytest.raises(UserError, match="is cut short"):
        read_image(path)


def test_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"Cannot read {tmp_path}/a.png: .*No such file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(("scale", "smallest"), [(2, 4), (3, 6), (4, 8), (7, 14)])
def test_images_too_small_for_imresize(tmp_path: Path, scale: int, smallest: int) -> None:
    """The limit is imresize's own: it fails below and works from there on."""
    with pytest.raises(RuntimeError):
        imresize(np.zeros((scale, 96, 3), np.float32), 1 / scale)
    save(tmp_path / "in" / "a.png", photograph(smallest, 96))
    basicsr_prepare("benchmark", "-i", tmp_path / "in", "-o", tmp_path / "out", "--scales", scale, "-j", 1)
    assert read_image(tmp_path / "out" / "LR_bicubic" / f"X{scale}" / f"ax{scale}.png").shape == (2, 96 // scale, 3)
    save(tmp_path / "in" / "a.png", photograph(smallest - 1, 96))
    message = rf"a\.png has {smallest - 1} x 96 pixels .* each side needs {smallest} for the scales {scale}\. Remove it"
    with pytest.raises(UserError, match=message):
        basicsr_prepare(
            "benchmark", "-i", tmp_path / "in", "-o", tmp_path / "out", "--scales", scale, "-j", 1, "--overwrite"
        )


# --- interruptions ---


class Counter:
    """Counts the HR images that are read; raises `error` at the `stop`-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None = None, stop: int = 0):
        self.count, self.error, self.stop = 0, error, stop
        self.read = image_files.read_hr
        for module in (prepare, benchmark):
            monkeypatch.setattr(module, "read_hr", self)

    def __call__(self, source: image_files.Source, scales: tuple[int, ...], **crop: bool) -> Image:
        self.count += 1
        if self.error and self.count == self.stop:
            raise self.error
        return self.read(source, scales, **crop)


def test_continues_to_the_same_data(
    hr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path / "expected", *CUT)
    monkeypatch.setattr(lmdb_writer, "WRITE_BYTES", 0)
    out = tmp_path / "out"
    Counter(monkeypatch, KeyboardInterrupt, stop=3)
    assert basicsr_prepare("train", "-i", hr_folder, "-o", out, *CUT) == 130
    assert "The same command continues" in capsys.readouterr().err
    assert not list(out.glob("*.lmdb"))

    counter = Counter(monkeypatch)
    assert basicsr_prepare("train", "-i", hr_folder, "-o", out, *CUT) == 0
    assert counter.count == 2
    assert "2 of 4 images are finished already." in capsys.readouterr().out
    assert everything(out) == everything(tmp_path / "expected")

    counter.count = 0
    assert basicsr_prepare("train", "-i", hr_folder, "-o", out, *CUT) == 0
    assert counter.count == 0
    assert capsys.readouterr().out.count("is complete already.") == 4


def test_continues_when_some_lmdbs_are_in_place(
    hr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = LmdbWriter.finish

    def fail_at_x3(writer: LmdbWriter) -> None:
        if "X3" in writer.path.name:
            raise KeyboardInterrupt
        finish(writer)

    basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path / "expected", *CUT)
    monkeypatch.setattr(lmdb_writer, "WRITE_BYTES", 0)
    monkeypatch.setattr(LmdbWriter, "finish", fail_at_x3)
    out = tmp_path / "out"
    assert basicsr_prepare("train", "-i", hr_folder, "-o", out, *CUT) == 130
    assert len(list(out.glob("*.lmdb"))) == 2
    monkeypatch.undo()
    counter = Counter(monkeypatch)
    assert basicsr_prepare("train", "-i", hr_folder, "-o", out, *CUT) == 0
    assert counter.count == 0
    assert everything(out) == everything(tmp_path / "expected")


def test_a_scale_can_be_added(hr_folder: Path, tmp_path: Path) -> None:
    basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path, "--scales", 4, *CUT)
    before = everything(tmp_path)
    basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path, "--scales", 2, 4, *CUT)
    assert everything(tmp_path).items() > before.items()


def test_a_changed_image_begins_anew(hr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_writer, "WRITE_BYTES", 0)
    Counter(monkeypatch, KeyboardInterrupt, stop=3)
    assert basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path, *CUT) == 130
    monkeypatch.undo()
    save(hr_folder / "im0.png", photograph(101, 130, 99))
    counter = Counter(monkeypatch)
    assert basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path, *CUT) == 0
    assert counter.count == 4


def prepare_slowly(told: Connection, arguments: list[str]) -> int:
    """In a process group of its own, whose processes all hold `told`."""
    os.setsid()
    os.dup2(told.fileno(), 1)
    write = LmdbWriter.write

    def write_slowly(*given: Any) -> None:
        write(*given)
        print("written", flush=True)
        time.sleep(0.1)

    lmdb_writer.WRITE_BYTES = 0
    LmdbWriter.write = write_slowly  # type: ignore[method-assign]
    return basicsr_prepare(*arguments)


@pytest.mark.skipif(os.name != "posix", reason="process groups and signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_by_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """With two worker processes: no process is left behind, and what is missing is done by another run."""
    folder, out = tmp_path / "in", tmp_path / "out"
    for index in range(24):
        save(folder / f"{index:02d}.png", photograph(96, 96, index))
    arguments = ["train", "-i", folder, "-o", out, "--name", "set", "--scales", "2", *CUT[:-1]]
    reads, told = SERVER.Pipe(duplex=False)
    process = start_forked(tmp_path, prepare_slowly, told, [*map(str, arguments), "2"])
    told.close()
    with os.fdopen(os.dup(reads.fileno())) as output:
        assert [output.readline() for _ in range(5)] == ["written\n"] * 5
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does it
        else:
            process.kill()
        output.read()  # returns when every process that holds the pipe has ended
    (run,) = finish(tmp_path, [process])
    assert run.status == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert run.err == "\nStopped. The same command continues from here.\n"
    assert not list(out.glob("*.lmdb"))

    counter = Counter(monkeypatch)
    assert basicsr_prepare(*arguments, "1") == 0
    assert 0 < counter.count <= 22
    assert f"{24 - counter.count} of 24 images are finished already." in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "again")
    assert basicsr_prepare("train", "-i", tmp_path / "again", "-o", tmp_path / "expected", *arguments[5:], "1") == 0
    assert everything(out) == everything(tmp_path / "expected")


def test_killed_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def __init__(self, *arguments: object, **keywords: object) -> None: ...

        def submit(self, *arguments: object) -> None:
            raise BrokenProcessPool

        def shutdown(self, **keywords: object) -> None: ...

    monkeypatch.setattr(worker_pool, "ProcessPoolExecutor", Pool)
    message = r"A worker process was killed, .*memory.* fewer processes than -j 2"
    with pytest.raises(UserError, match=message), worker_pool.map_in_order(abs, range(16), jobs=2) as results:
        list(results)


def test_broken_link_is_not_replaced(hr_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set_HR_sub.lmdb").symlink_to(tmp_path / "away")
    with pytest.raises(UserError, match=r"set_HR_sub\.lmdb exists, and it was not made by this command"):
        basicsr_prepare("train", "-i", hr_folder, "-o", tmp_path, *CUT)


@pytest.mark.parametrize("kind", ["train", "benchmark"])
def test_full_disk(hr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lmdb_writer.lmdb, "open", fail)
    monkeypatch.setattr(benchmark, "write_atomically", fail)
    arguments = [kind, "-i", hr_folder, "-o", tmp_path / "out", *(CUT if kind == "train" else ["-j", "1"])]
    message = rf"Cannot write to {tmp_path}/out: .*No space left.*Free space there: [\d,]+ MiB"
    with pytest.raises(UserError, match=message):
        basicsr_prepare(*arguments)
    assert not list((tmp_path / "out").rglob("*.lmdb")) + list((tmp_path / "out").rglob("*.png"))
    monkeypatch.undo()
    assert basicsr_prepare(*arguments) == 0


# --- never overwriting ---


def test_lmdbs_in_the_way(hr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    basicsr_prepare("train", "-i", hr_folder, "-o", out, "--scales", 2, *CUT)
    foreign = out / "set_LR_bicubic_X4_sub.lmdb"
    (foreign / "data").mkdir(parents=True)
    before = everything(out)
    other = ["train", "-i", hr_folder, "-o", out, "--scales", 2, 4, "--crop-size", 96, "--overlap", 48, "-j", 1]
    with pytest.raises(UserError) as error:
        basicsr_prepare(*other)
    message = str(error.value)
    assert "HR_sub.lmdb exists, and it was made with other settings: HR size multiple was 2, is now 4; crop" in message
    assert f"{foreign} exists, and it was not made by this command." in message
    assert message.endswith("Give --overwrite to replace it, or another folder or name.")
    assert not list(out.glob(".*.partial"))

    monkeypatch.setattr(lmdb_writer, "WRITE_BYTES", 0)
    Counter(monkeypatch, KeyboardInterrupt, stop=3)
    assert basicsr_prepare(*other, "--overwrite") == 130
    assert everything(out) == before
    assert (foreign / "data").is_dir()

    monkeypatch.undo()
    counter = Counter(monkeypatch)
    assert basicsr_prepare(*other, "--overwrite") == 0
    assert counter.count < 4
    assert not list(out.glob(".*.old"))
    counter.count = 0
    assert basicsr_prepare(*other) == 0
    assert counter.count == 0


# --- benchmarks ---


@pytest.mark.parametrize("crop", ["common", "per-scale"])
def test_benchmark_layout(hr_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], crop: str) -> None:
    save(hr_folder / "v1.2.png", photograph(60, 60))
    out = tmp_path / "out"
    assert basicsr_prepare("benchmark", "-i", hr_folder, "-o", out, "--crop", crop, "-j", 1) == 0
    assert f"dataroot_lq: {out}/LR_bicubic/X3\n    filename_tmpl: '{{}}x3'\n" in capsys.readouterr().out
    for scale in (2, 3, 4):
        dataset = PairedImageDataset(
            {
                "dataroot_gt": str(out / "HR"),
                "dataroot_lq": str(out / "LR_bicubic" / f"X{scale}"),
                "filename_tmpl": f"{{}}x{scale}",
                "io_backend": {"type": "disk"},
                "scale": scale,
                "phase": "val",
            }
        )
        assert len(dataset) == 5
        pairs = {Path(pair["gt_path"]).stem: pair for pair in (dataset[index] for index in range(5))}
        assert sorted(pairs) == ["im0", "im1", "im2", "im3", "v1.2"]
        multiple = 12 if crop == "common" else scale  # of 101 x 130
        hr = read_image(hr_folder / "im0.png")[: 101 // multiple * multiple, : 130 // multiple * multiple]
        for name, expected in (("gt", hr), ("lq", expected_lr(hr, scale))):
            array = (pairs["im0"][name].numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)[:, :, ::-1]
            np.testing.assert_array_equal(array, expected)


def test_benchmark_keeps_hr_whole_and_takes_further_scales(
    hr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a scale's files are depends on no other scale, so that adding one replaces nothing."""
    arguments = ["benchmark", "-i", hr_folder, "-o", tmp_path / "out", "-j", 1, "--scales"]
    assert basicsr_prepare(*arguments, 2) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(before) == 8
    written = read_image(tmp_path / "out" / "HR" / "im0.png")
    np.testing.assert_array_equal(written, read_image(hr_folder / "im0.png"))
    assert basicsr_prepare(*arguments, 2, 3) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert basicsr_prepare(*arguments, 2, 3, "--overwrite", "--crop", "common") == 0
    assert read_image(tmp_path / "out" / "HR" / "im0.png").shape == (96, 126, 3)


def test_benchmark_continues(
    hr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["benchmark", "-i", hr_folder, "-o", tmp_path / "out", "-j", 1]
    Counter(monkeypatch, KeyboardInterrupt, stop=3)
    assert basicsr_prepare(*arguments) == 130
    (tmp_path / "out" / "LR_bicubic" / "X2" / "im1x2.png").unlink()  # as if killed in the midst of im1
    monkeypatch.undo()
    counter = Counter(monkeypatch)
    assert basicsr_prepare(*arguments) == 0
    assert counter.count == 3
    assert "1 of 4 images are finished already." in capsys.readouterr().out
    save(hr_folder / "more.png", photograph(48, 48))
    counter.count = 0
    assert basicsr_prepare(*arguments) == 0
    assert counter.count == 1
    assert len(list((tmp_path / "out").rglob("*.png"))) == 20


def test_benchmark_never_overwrites(hr_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ["benchmark", "-i", hr_folder, "-o", out, "-j", 1, "--crop", "common"]
    save(out / "HR" / "im1.png", photograph(10, 10))
    foreign = (out / "HR" / "im1.png").read_bytes()
    message = (
        r"HR/im1\.png exists, and was not made by this command with these settings \(one of 1 such files\)\. "
        r"Give --overwrite to replace them"
    )
    for _ in range(2):  # nothing it does the first time makes it think otherwise the second
        with pytest.raises(UserError, match=message):
            basicsr_prepare(*arguments)
    assert [path.name for path in out.rglob("*.png")] == ["im1.png"]

    Counter(monkeypatch, KeyboardInterrupt, stop=2)
    assert basicsr_prepare(*arguments, "--overwrite") == 130
    assert (out / "HR" / "im1.png").read_bytes() == foreign
    monkeypatch.undo()
    with pytest.raises(UserError, match=message):  # still the foreign one
        basicsr_prepare(*arguments)
    assert basicsr_prepare(*arguments, "--overwrite") == 0
    assert basicsr_prepare(*arguments) == 0
    with pytest.raises(UserError, match=r"one of 8 such files"):  # cropped otherwise
        basicsr_prepare(*arguments, "--scales", 4)

    Counter(monkeypatch, KeyboardInterrupt, stop=2)
    assert basicsr_prepare(*arguments, "--scales", 4, "--overwrite") == 130
    with pytest.raises(UserError, match=r"one of 8 such files"):  # im0 is neither the former one nor known as the new
        basicsr_prepare(*arguments)


def test_benchmark_among_other_images(hr_folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "out" / "HR" / "other.png", photograph(48, 48))
    message = r"HR/other\.png does not belong to these images, but BasicSR would read it with them\. Move it away"
    with pytest.raises(UserError, match=message):
        basicsr_prepare("benchmark", "-i", hr_folder, "-o", tmp_path / "out", "-j", 1, "--overwrite")


def test_benchmark_into_its_own_sources(tmp_path: Path) -> None:
    save(tmp_path / "HR" / "a.png", photograph(50, 50))
    with pytest.raises(UserError, match=r"HR would be written to, but sources are never changed\. Choose another -o"):
        basicsr_prepare("benchmark", "-i", tmp_path / "HR", "-o", tmp_path, "-j", 1, "--overwrite")
    assert read_image(tmp_path / "HR" / "a.png").shape == (50, 50, 3)


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"files": 3}'])
def test_benchmark_with_a_record_of_another_kind(hr_folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "prepare.json").write_text(text)
    with pytest.raises(UserError, match=r"prepare\.json was not written by this command, or is damaged\. Remove it"):
        basicsr_prepare("benchmark", "-i", hr_folder, "-o", tmp_path, "-j", 1)


def test_sources_are_sorted(hr_folder: Path) -> None:
    assert [source.name for source in folder_sources(hr_folder)] == [f"im{index}.png" for index in range(4)]
