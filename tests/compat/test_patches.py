"""Each fault of basicsr 1.4.2 that is fixed, by its number in the list of them."""

from __future__ import annotations

import copy
import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import basicsr.data
import basicsr.train
import basicsr.utils
import lmdb
import numpy as np
import pytest
import torch
from basicsr.archs.vgg_arch import VGGFeatureExtractor
from basicsr.data import build_dataset
from basicsr.data.data_util import paired_paths_from_folder, paths_from_folder
from basicsr.data.transforms import paired_random_crop
from basicsr.models.base_model import BaseModel
from basicsr.utils import FileClient, imfrombytes
from basicsr.utils import logger as basicsr_logger
from basicsr.utils.file_client import LmdbBackend

from esc_arch import ESC
from esc_arch.checkpoints import read_checkpoint
from esc_arch.compat import PATCHES, apply_patches
from esc_arch.errors import UserError

# --- the patches themselves ---------------------------------------------------------------------------------------


#: A module, which others of basicsr import as well, and of which they keep the original.
CLOCK = ("basicsr.utils.logger", "time")


def current(module: str, name: str) -> Any:
    owner: Any = sys.modules[module]
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


@pytest.fixture(scope="module")
def originals() -> dict[tuple[str, str], Any]:
    """What the patches replaced, before they were applied once more."""
    found = {(module, name): current(module, name)._esc_arch_original for module, name, *_ in PATCHES}
    apply_patches()
    return found


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, name, *_ in PATCHES if (module, name) != CLOCK]
)
def test_every_patch_is_in_place_everywhere_and_never_nested(module: str, name: str, originals: Any) -> None:
    original = originals[module, name]
    assert original.__module__.startswith("basicsr")
    patched = current(module, name)
    assert patched._esc_arch_original is original
    assert patched is not original
    # no module of basicsr holds the original, or a patch that was replaced, under its name
    places = [
        vars(other)[name]
        for key, other in sys.modules.items()
        if key.partition(".")[0] == "basicsr" and name in vars(other)
    ]
    assert all(place is patched for place in places)


def test_the_clock_is_replaced_for_the_log_alone(originals: Any) -> None:
    assert current(*CLOCK)._esc_arch_original is time
    assert sys.modules["basicsr.train"].time is time  # type: ignore[attr-defined]


def test_the_command_s_pipelines_use_the_patches() -> None:
    assert basicsr.train.load_resume_state is current("basicsr.train", "load_resume_state")
    assert basicsr.utils.imfrombytes is current("basicsr.utils.img_util", "imfrombytes")
    assert basicsr.data.paired_image_dataset.imfrombytes is basicsr.utils.imfrombytes
    assert FileClient._backends["lmdb"].__init__ is LmdbBackend.__init__


# --- data ---------------------------------------------------------------------------------------------------------


def test_11_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read the image .*a\.png: No such file"):
        FileClient("disk").get(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"no picture", b""])
@pytest.mark.parametrize("float32", [True, False])
def test_11_an_image_that_cannot_be_decoded_is_named(content: bytes, float32: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.png is not an image .* \({len(content)} bytes\).*Replace it"):
        imfrombytes(FileClient("disk").get(path), float32=float32)
    with pytest.raises(UserError, match="An image is not an image"):
        imfrombytes(content, float32=float32)


@pytest.mark.parametrize("flag", ["color", "grayscale", "unchanged"])
def test_11_good_images_are_what_they_were(flag: str, photographs: Any) -> None:
    path = next(photographs.gt.iterdir())
    content = FileClient("disk").get(path)
    assert content == path.read_bytes()
    plain = imfrombytes(content, flag)
    assert plain.dtype == np.uint8
    original = current("basicsr.utils.img_util", "imfrombytes")._esc_arch_original
    np.testing.assert_array_equal(plain, original(path.read_bytes(), flag))
    np.testing.assert_array_equal(imfrombytes(content, flag, float32=True), original(content, flag, float32=True))


@pytest.fixture
def pair_of_lmdbs(tmp_path: Path) -> list[str]:
    paths = []
    for name in ("gt", "lq"):
        path = tmp_path / f"{name}.lmdb"
        with lmdb.open(str(path), map_size=2**20) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"a", name.encode())
        paths.append(str(path))
    return paths


def client_of(paths: list[str]) -> FileClient:
    return FileClient("lmdb", db_paths=paths, client_keys=["gt", "lq"])


def test_11_an_entry_that_an_lmdb_lacks_is_named(pair_of_lmdbs: list[str]) -> None:
    with pytest.raises(UserError, match=r"lq\.lmdb has no image 'b', but its meta_info\.txt lists it: create it again"):
        client_of(pair_of_lmdbs).get("b", "lq")


def test_13_one_lmdb_serves_several_data_sets(pair_of_lmdbs: list[str], tmp_path: Path) -> None:
    (tmp_path / "link.lmdb").symlink_to(pair_of_lmdbs[0])
    gt, lq = pair_of_lmdbs
    clients = [client_of([path, lq]) for path in (gt, gt + os.sep, str(tmp_path / "link.lmdb"))]
    assert [client.get("a", key) for client in clients for key in ("gt", "lq")] == [b"gt", b"lq"] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_13_a_forked_worker_reads_an_lmdb_that_is_open_already(pair_of_lmdbs: list[str]) -> None:
    client = client_of(pair_of_lmdbs)
    assert client.get("a", "gt") == b"gt"
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writer, client.get("a", "gt") + client_of(pair_of_lmdbs).get("a", "lq"))
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as answers:
        assert answers.read() == b"gtlq"
    assert client.get("a", "gt") == b"gt"


def test_an_lmdb_that_is_cut_short_while_it_is_read(pair_of_lmdbs: list[str]) -> None:
    """The process would be ended by SIGBUS."""
    client = client_of(pair_of_lmdbs)
    assert client.get("a", "lq") == b"lq"
    size = os.path.getsize(os.path.join(pair_of_lmdbs[1], "data.mdb"))
    os.truncate(os.path.join(pair_of_lmdbs[1], "data.mdb"), 4096)
    with pytest.raises(UserError, match=rf"lq\.lmdb was cut short while it was read: data\.mdb has 4,096 of {size:,} "):
        client.get("a", "lq")
    assert client.get("a", "gt") == b"gt"


def test_an_lmdb_that_is_cut_short_after_its_check(pair_of_lmdbs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its size is taken, which reading it relies on."""
    opened = lmdb.open

    def cut_and_open(path: str, **options: Any) -> Any:
        environment = opened(path, **options)
        os.truncate(os.path.join(os.fsdecode(path), "data.mdb"), 8192)
        return environment

    monkeypatch.setattr(lmdb, "open", cut_and_open)
    with pytest.raises(UserError, match=r"Cannot open the LMDB .*: data\.mdb was cut short or is damaged"):
        client_of(pair_of_lmdbs)


def test_an_lmdb_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.lmdb").mkdir()
    (tmp_path / "a.lmdb" / "data.mdb").write_bytes(b"nothing" * 1000)
    with pytest.raises(UserError, match=r"Cannot open the LMDB .*a\.lmdb: .*[^.]\. Create it again: `basicsr prepare`"):
        FileClient("lmdb", db_paths=str(tmp_path / "a.lmdb"))


def test_44_images_come_in_the_order_of_their_names(photographs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted(path.name for path in photographs.gt.iterdir())
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: sorted(scandir(path), key=lambda entry: entry.name, reverse=True))
    assert [Path(path).name for path in paths_from_folder(str(photographs.gt))] == names
    assert list(basicsr.utils.scandir(str(photographs.gt))) == names
    folders = [str(photographs.lq), str(photographs.gt)]
    pairs = paired_paths_from_folder(folders, ["lq", "gt"], "{}x2")
    assert [Path(pair["gt_path"]).name for pair in pairs] == names


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(
    ("gt", "lq", "sizes"),
    [((14, 20), (7, 10), "LQ 10 x 7, GT 20 x 14"), ((32, 32), (15, 16), "LQ 16 x 15, GT 32 x 32")],
)
def test_a_patch_that_cannot_be_cut_names_its_image(
    gt: tuple[int, int], lq: tuple[int, int], sizes: str, tensors: bool
) -> None:
    def image(size: tuple[int, int]) -> Any:
        return torch.zeros(1, 3, *size) if tensors else np.zeros((*size, 3), np.float32)

    with pytest.raises(UserError, match=rf"gt_size 16 can be cut from a\.png \({sizes}, width x height\).*2 times LQ"):
        paired_random_crop(image(gt), image(lq), 16, 2, "a.png")


def test_12_a_batch_larger_than_the_data_set(train_options: Any, basicsr_log: Any) -> None:
    opt = train_options | {"world_size": 1, "rank": 0, "dist": False, "num_gpu": 0}
    for phase, section in opt["datasets"].items():
        section |= {"phase": phase, "scale": 2}
    opt["datasets"]["train"]["batch_size_per_gpu"] = 7
    with pytest.raises(UserError, match=r"datasets: train \(Train\) has 6 images, fewer than one batch of 7.*Lower"):
        basicsr.train.create_train_val_dataloader(opt, logging.getLogger("basicsr"))


def test_a_dataset_reads_pairs_as_before(train_options: Any, basicsr_log: Any) -> None:
    options = train_options["datasets"]["val"] | {"phase": "val", "scale": 2}
    dataset = build_dataset(options)
    assert [tuple(dataset[index]["lq"].shape) for index in range(2)] == [(3, 24, 16), (3, 21, 27)]


# --- starting -----------------------------------------------------------------------------------------------------


def test_45_option_files_are_utf8_under_any_locale(run_basicsr: Any, train_options: Any) -> None:
    train_options["train"]["total_iter"] = 1
    train_options["datasets"]["train"]["name"] = "Fälle 高分辨率"
    file = run_basicsr.option_file(train_options)
    path = run_basicsr.folder / file
    path.write_text("# größer\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    run = run_basicsr.in_new_process("train", file, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert run.status == 0, run.err
    assert "Traceback" not in run.err
    assert "name: Fälle 高分辨率\n" in run.log()
    assert (run.experiment() / file).read_text(encoding="utf-8").endswith(path.read_text(encoding="utf-8"))


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_26_every_optimiser_of_torch(kind: str, make_model: Any, train_options: Any) -> None:
    model = make_model(train=train_options["train"] | {"optim_g": {"type": kind, "lr": 0.25, "weight_decay": 0.5}})
    assert type(model.optimizer_g) is getattr(torch.optim, kind)
    assert (model.optimizer_g.defaults["lr"], model.optimizer_g.defaults["weight_decay"]) == (0.25, 0.5)


@pytest.mark.parametrize("kind", ["AdamX", "lr_scheduler"])
def test_26_an_unknown_optimiser(kind: str) -> None:
    with pytest.raises(UserError, match=rf"The optimiser '{kind}' is not in torch\.optim, which has: .*AdamW"):
        BaseModel.get_optimizer(BaseModel({"num_gpu": 0, "is_train": True}), kind, [], 0.1)


def test_25_without_a_network_it_says_where_vgg_weights_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match="no route") as error:
        VGGFeatureExtractor(["conv1_1"])
    for folder in ("experiments/pretrained_models/vgg19-dcbb9e9d.pth", "torch/hub/checkpoints"):
        assert str(tmp_path / folder) in str(error.value)


def save(path: Path, **content: Any) -> str:
    torch.save(content, path)
    return str(path)


@pytest.fixture
def arguments(train_options: Any) -> dict[str, Any]:
    return {key: value for key, value in train_options["network_g"].items() if key != "type"}


def flat_weights(arguments: dict[str, Any], value: float) -> dict[str, torch.Tensor]:
    """An ESC's weights; the last convolution gives the same for all the subpixels of a colour, at any scale."""
    weights = {name: torch.randn_like(tensor) for name, tensor in ESC(**arguments).state_dict().items()}
    colours = torch.tensor([value, 2 * value, 3 * value])
    for name in ("to_img.weight", "to_img.bias"):
        per_channel = colours.repeat_interleave(weights[name].shape[0] // 3)
        weights[name] = per_channel.reshape(-1, *[1] * (weights[name].ndim - 1)).expand_as(weights[name]).clone()
    return weights


@pytest.mark.parametrize("model_type", ["SRModel", "ESCModel"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("scale", [3, 4])
def test_36_a_checkpoint_of_another_scale_is_adapted(
    model_type: str, strict: bool, scale: int, make_model: Any, arguments: Any, tmp_path: Path, basicsr_log: Any
) -> None:
    """For the raw and the averaged network, as pretrained weights of a run."""
    raw, average = flat_weights(arguments, 1.0), flat_weights(arguments, 10.0)
    file = save(tmp_path / "x2.pth", params=raw, params_ema=average)
    network = {"type": "ESC"} | arguments | {"upscaling_factor": scale}
    path = {"pretrain_network_g": file, "strict_load_g": strict}
    model = make_model(path, model_type=model_type, scale=scale, network_g=network)
    for net, source, value in ((model.net_g, raw, 1.0), (model.net_g_ema, average, 10.0)):
        for name, tensor in net.state_dict().items():
            if not name.startswith("to_img"):
                assert torch.equal(tensor, source[name])
        for colour, part in enumerate(net.to_img.weight.chunk(3), start=1):
            assert len(part) == scale**2
            torch.testing.assert_close(part, torch.full_like(part, colour * value))
    assert basicsr_log.text.count(f"is of another scale: to_img.weight was interpolated from x2 to x{scale}.") == 2


@pytest.mark.parametrize("strict", [True, False])
def test_34_nothing_is_trained_from_a_checkpoint_of_another_network(
    strict: bool, make_model: Any, tmp_path: Path
) -> None:
    file = save(tmp_path / "net.pth", params={"conv.weight": torch.ones(3)})
    with pytest.raises(UserError, match=r"Nothing in .*fits ESC, so it would stay untrained"):
        make_model({"pretrain_network_g": file, "strict_load_g": strict})


def test_34_what_fits_is_loaded_if_asked(make_model: Any, arguments: Any, tmp_path: Path, basicsr_log: Any) -> None:
    weights = flat_weights(arguments, 1.0)
    weights["old.weight"] = weights.pop("proj.weight")
    file = save(tmp_path / "net.pth", params=weights)
    with pytest.raises(UserError, match="does not fit ESC: 1 missing"):
        make_model({"pretrain_network_g": file, "strict_load_g": True})
    model = make_model({"pretrain_network_g": file, "strict_load_g": False})
    assert torch.equal(model.net_g.last.weight, weights["last.weight"])
    assert "1 missing in it (proj.weight); 1 not in the network (old.weight)" in basicsr_log.text


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"params": {"module." + n: t for n, t in w.items()}}])
@pytest.mark.parametrize("param_key", ["params", "params_ema", None])
def test_35_weights_in_any_wrapping_are_loaded_by_a_model(
    wrap: Callable[..., Any], param_key: str | None, make_model: Any, arguments: Any, tmp_path: Path
) -> None:
    weights = flat_weights(arguments, 1.0)
    torch.save(wrap(weights), tmp_path / "net.pth")
    model = make_model({"pretrain_network_g": str(tmp_path / "net.pth"), "param_key_g": param_key})
    for net in (model.net_g, model.net_g_ema):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("nesting", ["compiled", "parallel outside", "parallel inside"])
def test_38_a_compiled_network_is_averaged_saved_and_loaded(
    nesting: str, make_model: Any, arguments: Any, tmp_path: Path
) -> None:
    model = make_model()
    plain = model.net_g
    inner = torch.nn.DataParallel(plain) if nesting == "parallel inside" else plain
    model.net_g = torch.compile(inner)  # nothing is compiled before it is called
    if nesting == "parallel outside":
        model.net_g = torch.nn.DataParallel(model.net_g)
    assert model.get_bare_model(model.net_g) is plain
    with torch.no_grad():
        plain.proj.weight.fill_(3.0)
        model.net_g_ema.proj.weight.fill_(1.0)
    model.model_ema(decay=0.5)
    torch.testing.assert_close(model.net_g_ema.proj.weight, torch.full_like(plain.proj.weight, 2.0))
    model.save(0, 7)
    saved = torch.load(tmp_path / "models" / "net_g_7.pth", weights_only=True)
    for weights, value in zip((saved["params"], saved["params_ema"]), (3.0, 2.0), strict=True):
        ESC(**arguments).load_state_dict(weights, strict=True)
        assert weights["proj.weight"].unique().tolist() == [value]
    model.load_network(model.net_g, str(tmp_path / "models" / "net_g_7.pth"), True, "params_ema")
    assert plain.proj.weight.unique().tolist() == [2.0]


def test_6_a_state_saved_by_a_model_is_read_safely(make_model: Any, tmp_path: Path) -> None:
    """Schedulers hold more than numbers; still nothing but data is read."""
    model = make_model()
    model.lq, model.gt = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 16, 16)
    for iteration in range(1, 5):
        model.update_learning_rate(iteration)
        model.optimize_parameters(iteration)
    model.save(1, 4)
    state = read_checkpoint(tmp_path / "states" / "4.state")
    other = make_model()
    other.resume_training(state)
    assert other.get_current_learning_rate() == model.get_current_learning_rate() == [5e-4]
    other.update_learning_rate(5)
    assert other.schedulers[0].last_epoch == 4


@pytest.mark.parametrize("kind", ["PairedImageDataset", "SingleImageDataset", "RealESRGANDataset"])
def test_names_in_lists_may_have_blanks(kind: str, tmp_path: Path) -> None:
    """As programs build them, whose lists no check has seen; without one, all files of the folder are read."""
    names = ("a b.png", "c.png", "d (1).png", "e (1,2).png", "f (1,2).png")
    for name in names:
        (tmp_path / name).touch()
    listed = tmp_path.parent / f"{tmp_path.name}.txt"
    listed.write_text("a b.png (16,16,3)\n\nc.png\nd (1).png (16,16,3)\ne (1,2).png (16,16,3)\nf (1,2).png\n")
    options = {"name": "Set", "type": kind, "dataroot_gt": str(tmp_path), "dataroot_lq": str(tmp_path), "scale": 1}
    options |= {"io_backend": {"type": "disk"}, "phase": "val", **BLUR, "use_hflip": False, "use_rot": False}
    expected = [str(tmp_path / name) for name in names]
    for list_file in (str(listed), None):
        given = options | {"meta_info" if kind == "RealESRGANDataset" else "meta_info_file": list_file}
        paths = build_dataset(copy.deepcopy(given)).paths
        assert [path["gt_path"] if isinstance(path, dict) else path for path in paths] == expected
        assert [path["lq_path"] if isinstance(path, dict) else path for path in paths] == expected


BLUR = {
    f"{key}{stage}": value
    for stage in ("", "2")
    for key, value in {
        "blur_kernel_size": 21, "kernel_list": ["iso"], "kernel_prob": [1], "sinc_prob": 0.1, "blur_sigma": [0.2, 3],
        "betag_range": [0.5, 4], "betap_range": [1, 2],
    }.items()
} | {"final_sinc_prob": 0.8}  # fmt: skip


@pytest.mark.parametrize(("module", "told"), [("tensorboard.summary.writer.event_file_writer", False), ("other", True)])
def test_the_thread_of_tensorboard_prints_no_traceback(
    module: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it cannot write is one line when it is asked to write next."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    basicsr_logger.init_tb_logger(str(tmp_path)).close()

    def fail(thread: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    thread = type("Writer", (threading.Thread,), {"run": fail, "__module__": module})()
    thread.start()
    thread.join()
    assert ("No space left on device" in capsys.readouterr().err) == told
