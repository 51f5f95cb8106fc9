"""What users get wrong: one message that says what, where and what to do, and nothing on the disk has changed."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
import torch
from ranks import run_forked

from esc_arch import ESC


def remove_an_image(folder: Path, options: Any) -> None:
    next((folder / "lq").iterdir()).unlink()


def write_garbage(folder: Path, options: Any) -> None:
    (folder / "lq" / "train2x2.png").write_bytes(b"no picture")


def take_lmdb_that_is_missing(folder: Path, options: Any) -> None:
    options["datasets"]["train"] |= {"dataroot_gt": "none.lmdb", "io_backend": {"type": "lmdb"}}


def save_weights_of_another_network(folder: Path, options: Any) -> None:
    torch.save({"params": ESC(**(network_arguments(options) | {"dim": 12})).state_dict()}, folder / "net.pth")
    options["path"]["pretrain_network_g"] = "net.pth"


def save_a_web_page(folder: Path, options: Any) -> None:
    (folder / "net.pth").write_text("<!DOCTYPE html><html>Sign in</html>")
    options["path"]["pretrain_network_g"] = "net.pth"


def name_a_missing_checkpoint(folder: Path, options: Any) -> None:
    options["path"]["pretrain_network_g"] = "nowhere/net.pth"


def resume_from_the_weights(folder: Path, options: Any) -> None:
    torch.save({"params": ESC(**network_arguments(options)).state_dict()}, folder / "net.pth")
    options["path"]["resume_state"] = "net.pth"


def resume_under_another_name(folder: Path, options: Any) -> None:
    torch.save({"epoch": 0, "iter": 2, "optimizers": [], "schedulers": []}, folder / "2.state")
    options["path"]["resume_state"] = "2.state"
    options["name"] = "other"


def network_arguments(options: Any) -> dict[str, Any]:
    return {key: value for key, value in options["network_g"].items() if key != "type"}


def change(*keys: str, value: Any) -> Callable[[Path, Any], None]:
    def apply(folder: Path, options: Any) -> None:
        for key in keys[:-1]:
            options = options[key]
        options[keys[-1]] = value

    return apply


#: what is done to a working folder and its options -> what the message must have
FOUND_BEFORE_THE_RUN: dict[str, tuple[Callable[[Path, Any], None], list[str]]] = {
    "missing data folder": (
        change("datasets", "train", "dataroot_gt", value="nowhere"),
        ["datasets:train:dataroot_gt", "there is no", "/nowhere"],
    ),
    "missing LMDB": (take_lmdb_that_is_missing, ["datasets:train:dataroot_gt", "none.lmdb"]),
    "LQ and GT counts": (remove_an_image, ["datasets:train:dataroot_lq", "1 of 6 images are missing"]),
    "unreadable image": (write_garbage, ["train2x2.png", "cannot be read as an image", "replace or remove"]),
    "patch larger than an image": (
        change("datasets", "train", "gt_size", value=64),
        ["datasets:train", "train0.png", "48x48", "gt_size 64"],
    ),
    "batch larger than the data set": (
        change("datasets", "train", "batch_size_per_gpu", value=7),
        ["train:batch_size_per_gpu: 6 images, fewer than one batch of 7. Lower it, raise"],
    ),
    "wrong scale": (change("scale", value=4), ["network_g:upscaling_factor", "scale is 4"]),
    "unknown network": (change("network_g", "type", value="esc"), ["network_g:type", "'esc'", "Did you mean 'ESC'"]),
    "unknown model type": (change("model_type", value="ESCModl"), ["model_type", "Did you mean 'ESCModel'"]),
    "unknown key": (
        change("network_g", "n_block", value=3),
        ["network_g:n_block", "no such argument", "Did you mean 'n_blocks'"],
    ),
    "value that cannot be": (change("network_g", "num_heads", value=3), ["network_g", "num_heads is 3", "divide dim"]),
    "a backend that cannot train here": (
        change("network_g", "attn_type", value="flex_flash"),
        ["network_g:attn_type: flex_flash given, which cannot train here", "runs on cuda, not on cpu", "Give auto"],
    ),
    "unknown optimiser": (
        change("train", "optim_g", value={"type": "AdamX", "lr": 0.1}),
        ["train:optim_g:type", "'AdamX'", "Adamax"],
    ),
    "checkpoint of another network": (
        save_weights_of_another_network,
        ["path:pretrain_network_g", "net.pth does not fit ESC", "proj.weight is", "strict_load_g: false"],
    ),
    "checkpoint that is a web page": (save_a_web_page, ["path:pretrain_network_g", "web page", "Download"]),
    "missing checkpoint": (name_a_missing_checkpoint, ["path:pretrain_network_g", "nowhere/net.pth"]),
    "weights as resume_state": (resume_from_the_weights, ["net.pth is not a training state: its epoch is None"]),
    "state of another run": (resume_under_another_name, ["2.state cannot be resumed", "other", "experiments_root"]),
    "state that is missing": (change("path", "resume_state", value="9.state"), ["path:resume_state", "9.state"]),
}


@pytest.fixture
def options(train_options: Any, photographs: Any, work_folder: Path) -> Any:
    """Options with images of their own, in a folder that has an earlier run of the same name."""
    for key in ("gt", "lq"):
        shutil.copytree(getattr(photographs, key), work_folder / key)
        train_options["datasets"]["train"][f"dataroot_{key}"] = key
    for folder in ("experiments", "tb_logger", "results"):
        (work_folder / folder / "trial").mkdir(parents=True)
        (work_folder / folder / "trial" / "precious").write_text("weeks of work")
    train_options["logger"]["use_tb_logger"] = True
    return train_options


def assert_refused(run: Any, *texts: str) -> None:
    assert run.status == 2
    for text in texts:
        assert text in run.err
    assert run.err.count("basicsr t") == 1  # one message: `basicsr train: ...`
    assert "Traceback" not in run.err + run.out


@pytest.mark.parametrize("mistake", FOUND_BEFORE_THE_RUN)
def test_a_mistake_is_told_before_anything_is_touched(
    mistake: str, run_basicsr: Any, options: Any, take_snapshot: Any
) -> None:
    spoil, texts = FOUND_BEFORE_THE_RUN[mistake]
    spoil(run_basicsr.folder, options)
    run_basicsr.option_file(options)
    before = take_snapshot(run_basicsr.folder)
    assert_refused(run_basicsr("train", options), *texts)
    assert take_snapshot(run_basicsr.folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run_basicsr: Any, options: Any, take_snapshot: Any) -> None:
    """Fault 24."""
    run_basicsr.option_file(options)
    before = take_snapshot(run_basicsr.folder)
    assert_refused(run_basicsr("train", options, "--force_yml", "num_gpu=1"), "num_gpu: 1", "no CUDA", "num_gpu: 0")
    assert take_snapshot(run_basicsr.folder) == before


@pytest.mark.parametrize("verb", ["train", "test"])
def test_an_option_file_that_is_not_there(verb: str, run_basicsr: Any, options: Any, take_snapshot: Any) -> None:
    before = take_snapshot(run_basicsr.folder)
    assert_refused(run_basicsr(verb, "none.yml"), "option file none.yml does not exist")
    assert take_snapshot(run_basicsr.folder) == before


def test_all_mistakes_are_told_at_once(run_basicsr: Any, options: Any) -> None:
    options["network_g"]["n_block"] = 3
    options["datasets"]["train"]["gt_size"] = 15
    options["model_type"] = "Nothing"
    run = run_basicsr("train", options)
    assert_refused(run, "3 problem(s)", "network_g:n_block", "gt_size: 15", "model_type: 'Nothing'")


@pytest.mark.parametrize("content", ["folder", "checkpoint"])
def test_mistakes_when_testing(
    content: str, run_basicsr: Any, options: Any, test_options: Any, take_snapshot: Any
) -> None:
    if content == "folder":
        test_options["datasets"]["test_1"]["dataroot_lq"] = "nowhere"
    else:
        save_weights_of_another_network(run_basicsr.folder, test_options)
    run_basicsr.option_file(test_options)
    before = take_snapshot(run_basicsr.folder)
    assert_refused(run_basicsr("test", test_options), "nowhere" if content == "folder" else "does not fit ESC")
    assert take_snapshot(run_basicsr.folder) == before


# --- what only shows while the data are read ----------------------------------------------------------------------


def cut_short(png: bytes) -> bytes:
    """A PNG with a good header and no more than the beginning of its pixels."""
    return png[: len(png) // 3]


def cut_an_image_short(folder: Path, options: Any) -> None:
    path = folder / "lq" / "train2x2.png"
    path.write_bytes(cut_short(path.read_bytes()))


def make_lmdbs(folder: Path, options: Any, spoil: Callable[[Any], None]) -> None:
    """LMDBs of single-colour images, and `spoil` for a transaction that writes to the LQ one."""
    for kind, side in (("gt", 48), ("lq", 24)):
        path = folder / f"{kind}.lmdb"
        png = cv2.imencode(".png", np.full((side, side, 3), 99, np.uint8))[1].tobytes()
        with lmdb.open(str(path), map_size=2**20) as environment, environment.begin(write=True) as transaction:
            for name in ("a", "b", "c"):
                transaction.put(name.encode(), png)
            if kind == "lq":
                spoil(transaction)
        (path / "meta_info.txt").write_text("".join(f"{name}.png ({side},{side},3) 1\n" for name in ("a", "b", "c")))
        options["datasets"]["train"][f"dataroot_{kind}"] = path.name
    options["datasets"]["train"]["io_backend"] = {"type": "lmdb"}
    del options["datasets"]["train"]["filename_tmpl"]


def damage_an_lmdb_entry(folder: Path, options: Any) -> None:
    make_lmdbs(folder, options, lambda transaction: transaction.put(b"b", b"no picture"))


def remove_an_lmdb_entry(folder: Path, options: Any) -> None:
    make_lmdbs(folder, options, lambda transaction: transaction.delete(b"b"))


def damage_an_lmdb(folder: Path, options: Any) -> None:
    make_lmdbs(folder, options, lambda transaction: None)
    (folder / "lq.lmdb" / "data.mdb").write_bytes(b"nothing of the kind" * 1000)


def one_small_image_behind_many(folder: Path, options: Any) -> None:
    """Every second image is measured before a run, not the last."""
    for kind, side, tail in (("gt", 14, ""), ("lq", 7, "x2")):
        first = folder / kind / f"train0{tail}.png"
        for number in range(100, 171):
            shutil.copy(first, folder / kind / f"train{number}{tail}.png")
        cv2.imwrite(str(folder / kind / f"zzz{tail}.png"), np.zeros((side, side, 3), np.uint8))
    options["train"]["total_iter"] = 40


FOUND_WHILE_READING: dict[str, tuple[Callable[[Path, Any], None], list[str]]] = {
    "image cut short": (cut_an_image_short, [r"lq/train2x2\.png is not an image", "Replace it"]),
    "image in an LMDB": (damage_an_lmdb_entry, [r"b in lq\.lmdb is not an image", r"10 bytes"]),
    "missing in an LMDB": (remove_an_lmdb_entry, [r"lq\.lmdb has no image 'b'", "create it again"]),
    "LMDB": (damage_an_lmdb, [r"Cannot open the LMDB lq\.lmdb", "basicsr prepare"]),
    "small image": (one_small_image_behind_many, [r"zzz\.png \(LQ 7 x 7, GT 14 x 14", "gt_size 16"]),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mistake", FOUND_WHILE_READING)
def test_data_that_cannot_be_read_are_named(
    mistake: str, workers: int, run_basicsr: Any, options: Any, take_snapshot: Any
) -> None:
    """Faults 11 and 12. By then the earlier run has been archived, as BasicSR does, and nothing of it is lost."""
    spoil, texts = FOUND_WHILE_READING[mistake]
    spoil(run_basicsr.folder, options)
    options["datasets"]["train"]["num_worker_per_gpu"] = workers
    before = take_snapshot(run_basicsr.folder / "experiments" / "trial")
    run = run_basicsr("train", options)
    assert run.status == 2, run.err
    message = run.err[run.err.index("basicsr train: ") :]
    for text in texts:
        assert re.search(text, message)
    assert message.count("\n") == 1
    assert "Traceback" not in run.err
    assert not (run_basicsr.folder / "experiments" / "trial" / "models" / "net_g_latest.pth").exists()
    (archived,) = (run_basicsr.folder / "experiments").glob("trial_archived_*")
    assert take_snapshot(archived) == before


def test_a_process_of_its_own_reports_with_its_exit_status(run_basicsr: Any, options: Any) -> None:
    cut_an_image_short(run_basicsr.folder, options)
    options["datasets"]["train"]["num_worker_per_gpu"] = 2
    run = run_forked(run_basicsr.folder, ["train", "-opt", run_basicsr.option_file(options)])
    assert run.status == 2
    assert "Traceback" not in run.err
    assert run.err.splitlines()[-1].startswith("basicsr train: lq/train2x2.png is not an image")


@pytest.mark.parametrize("automatic", [True, False])
def test_a_run_is_not_resumed_without_its_networks(
    run_basicsr: Any, options: Any, take_snapshot: Any, automatic: bool
) -> None:
    shutil.rmtree(run_basicsr.folder / "experiments")
    run = run_basicsr("train", options)
    assert run.status == 0, run.err
    for iteration in (2, 4):
        (run.experiment() / "models" / f"net_g_{iteration}.pth").unlink()
    before = take_snapshot(run.experiment() / "models")
    options["train"]["total_iter"] = 6
    if automatic:
        run = run_basicsr("train", options, "--auto_resume")
        assert "--auto_resume found no usable state" in run.err
        assert "2.state belongs to" in run.err and "net_g_4.pth, which is not there" in run.err
    else:
        options["path"]["resume_state"] = str(run.experiment() / "training_states" / "4.state")
        run = run_basicsr("train", options)
        assert "net_g_4.pth does not exist" in run.err
    assert run.status == 2
    assert take_snapshot(run.experiment() / "models") == before
    assert sorted(path.name for path in (run.folder / "experiments").iterdir()) == [".trial.lock", "trial"]


def test_a_pickle_with_code_is_not_run(run_basicsr: Any, options: Any) -> None:
    """Fault 16, through the command."""

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("was_run"),)

    buffer = io.BytesIO()
    torch.save({"params": Payload()}, buffer)
    for key in ("pretrain_network_g", "resume_state"):
        (run_basicsr.folder / "net.pth").write_bytes(buffer.getvalue())
        options["path"] = {key: "net.pth"}
        assert_refused(run_basicsr("train", options), "net.pth holds", "could run code")
    assert not (run_basicsr.folder / "was_run").exists()
