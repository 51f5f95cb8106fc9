"""No file that someone downloads runs code: each is given a payload that would leave a mark."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import basicsr.metrics.niqe
import numpy as np
import pytest
import torch
from basicsr.archs import inception, vgg_arch
from basicsr.archs.basicvsr_arch import EDVRFeatureExtractor
from basicsr.archs.spynet_arch import SpyNet
from basicsr.archs.tof_arch import SPyNetTOF
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import run_command

from esc_arch import LPIPSLoss, UserError
from esc_arch.checkpoints import read_checkpoint

MARK = "mark"


class Payload:
    """Makes the file `mark` in the current folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(MARK),)


@pytest.fixture(autouse=True)
def no_mark(work_folder: Path) -> Iterator[None]:
    yield
    assert not (work_folder / MARK).exists()


def test_the_payload_works(work_folder: Path) -> None:
    """Read without protection, on purpose, it leaves its mark: that it leaves none elsewhere says something."""
    torch.save({"params": Payload()}, "net.pth")
    torch.load("net.pth", weights_only=False)
    assert (work_folder / MARK).exists()
    (work_folder / MARK).unlink()


def save_new(path: str) -> None:
    torch.save({"params": Payload()}, path)


def save_legacy(path: str) -> None:
    torch.save({"params": Payload()}, path, _use_new_zipfile_serialization=False)


def save_plain_pickle(path: str) -> None:
    Path(path).write_bytes(pickle.dumps({"params": Payload()}))


def save_beside_weights(path: str) -> None:
    torch.save({"params": {"proj.weight": torch.zeros(1)}, "optimizer": Payload()}, path)


FORMS: list[Callable[[str], None]] = [save_new, save_legacy, save_plain_pickle, save_beside_weights]


@pytest.fixture(params=[None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"], ids=["default", "protection switched off"])
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setenv(request.param, "1")


# --- option files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.PosixPath [mark]]",
        "!!python/object/apply:os.system ['touch mark']",
        "!!python/object/new:os.system ['touch mark']",
    ],
)
@pytest.mark.parametrize("verb", ["train", "test"])
def test_tags_of_an_option_file(verb: str, value: str, run_basicsr: Any) -> None:
    Path("trial.yml").write_text(f"name: trial\nnetwork_g: {value}\n")
    run = run_basicsr(verb, "trial.yml")
    assert run.status == 2
    assert "the tag '!!python/" in run.err and "is not allowed" in run.err


@pytest.mark.parametrize(
    "entry",
    [
        "train:total_iter=__import__('os').system('touch mark')",
        "train:total_iter=[__import__('os').system('touch mark')]",
        "train:total_iter=!!python/object/apply:os.system ['touch mark']",
        "train\"]=1;__import__('os').system('touch mark');opt[\"x=1",
    ],
)
def test_entries_of_force_yml(entry: str, run_basicsr: Any, train_options: Any) -> None:
    run = run_basicsr("train", train_options, "--force_yml", entry, "network_g:type=Nothing")
    assert run.status == 2


# --- checkpoints and states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", FORMS)
@pytest.mark.parametrize("key", ["pretrain_network_g", "resume_state"])
def test_checkpoints_named_in_option_files(
    key: str, save: Any, run_basicsr: Any, train_options: Any, environment: None
) -> None:
    save("net.pth")
    train_options["path"] = {key: "net.pth"}
    run = run_basicsr("train", train_options)
    assert run.status == 2
    assert "net.pth" in run.err and "Traceback" not in run.err and "weights_only" not in run.err


def test_auto_resume_takes_no_state_with_code(run_basicsr: Any, train_options: Any, environment: None) -> None:
    assert run_basicsr("train", train_options).status == 0
    save_new(str(run_basicsr.folder / "experiments" / "trial" / "training_states" / "9.state"))
    run = run_basicsr("train", train_options, "--auto_resume")
    assert run.status == 0
    assert "--auto_resume skips a state" in run.err and "could run code" in run.err
    assert "iter: 4." in run.log()


@pytest.mark.parametrize("save", FORMS)
def test_reading_any_checkpoint(save: Any, environment: None) -> None:
    save("net.pth")
    with pytest.raises(UserError, match=r"net\.pth"):
        read_checkpoint("net.pth")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("iter", "../../../precious", "its iter is ../../../precious"),
        ("iter", -1, "its iter is -1"),
        ("iter", True, "its iter is True"),
        ("epoch", torch.zeros(3), "its epoch is tensor"),
        ("optimizers", None, "its optimizers is None"),
        ("optimizers", [7], "its optimizers is [7]"),
        ("optimizers", [{"param_groups": 3}], "does not fit the optimisers of the option file"),
        ("random", [{"torch": "x"}], "is damaged, or of another program (KeyError"),
        ("model", {"scaler": 3}, "is damaged, or of another program"),
        ("samples", "many", "is damaged, or of another program (TypeError"),
    ],
    ids=str,
)
def test_states_with_odd_content(key: str, value: Any, message: str, run_basicsr: Any, train_options: Any) -> None:
    """One message; names of files are made of the iteration."""
    assert run_basicsr("train", train_options).status == 0
    path = run_basicsr.folder / "experiments/trial/training_states/2.state"
    torch.save(torch.load(path, weights_only=True) | {key: value}, path)
    train_options["path"]["resume_state"] = str(path)
    run = run_basicsr("train", train_options)
    assert run.status == 2
    assert message in run.err and "Traceback" not in run.err


# --- files that BasicSR and losses load beside those ----------------------------------------------------------------


@pytest.fixture
def hub(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch.hub keeps what it downloads, and reads it from without any protection."""
    monkeypatch.setenv("TORCH_HOME", str(work_folder / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = work_folder / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("save", [save_new, save_legacy, save_plain_pickle])
@pytest.mark.parametrize("place", ["hub", "experiments"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_of_vgg(place: str, save: Any, hub: Path, environment: None) -> None:
    folder = hub if place == "hub" else Path("experiments/pretrained_models")
    folder.mkdir(parents=True, exist_ok=True)
    save(str(folder / Path(vgg_arch.VGG_PRETRAIN_PATH).name))
    building_costs_nothing = torch.device("meta")
    with (
        building_costs_nothing,
        pytest.raises(UserError, match=r"the VGG19 weights \(.*(which could run code|is damaged).*Delete it and get"),
    ):
        vgg_arch.VGGFeatureExtractor(["conv1_1"])


@pytest.mark.parametrize("place", ["hub", "experiments"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_of_fid(place: str, hub: Path, environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = SimpleNamespace(Mixed_5b=None)
    monkeypatch.setattr(inception.models, "inception_v3", lambda **_: network)
    for name in ("A", "C", "E_1", "E_2"):
        monkeypatch.setattr(inception, f"FIDInception{name}", lambda *_, **__: None)
    folder = hub if place == "hub" else Path("experiments/pretrained_models")
    folder.mkdir(parents=True, exist_ok=True)
    save_new(str(folder / Path(inception.LOCAL_FID_WEIGHTS).name))
    with pytest.raises(UserError, match=r"FID's Inception weights .*could run code"):
        inception.fid_inception_v3()


@pytest.mark.parametrize("network", [SpyNet, SPyNetTOF, EDVRFeatureExtractor], ids=lambda network: network.__name__)
def test_weights_that_networks_of_basicsr_load(network: Any, environment: None) -> None:
    save_new("net.pth")
    arguments = (5, 8, "net.pth") if network is EDVRFeatureExtractor else ("net.pth",)
    with pytest.raises(UserError, match=rf"{network.__name__}'s weights \(net\.pth\) holds .*could run code"):
        network(*arguments)


def test_the_dictionary_of_dfdnet(environment: None) -> None:
    save_new("net.pth")
    with pytest.raises(UserError, match=r"DFDNet's weights \(net\.pth\) holds .*could run code"):
        ARCH_REGISTRY.get("DFDNet")(8, "net.pth")


def test_weights_of_lpips(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that loads as lpips and torchvision do."""
    save_new(str(hub / "vgg16-397923af.pth"))

    class LPIPS(torch.nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()
            torch.hub.load_state_dict_from_url("https://download.pytorch.org/models/vgg16-397923af.pth")

    package = ModuleType("lpips")
    package.LPIPS = LPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(UserError, match=r"LPIPSLoss.*which could run code"):
        LPIPSLoss()


def test_parameters_of_niqe(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, mu_pris_param=np.array([Payload()], dtype=object))
    (work_folder / "niqe_pris_params.npz").write_bytes(buffer.getvalue())
    monkeypatch.setattr(basicsr.metrics.niqe, "__file__", str(work_folder / "niqe.py"))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        basicsr.metrics.niqe.calculate_niqe(np.zeros((200, 200, 3)), crop_border=0)


def test_modules_in_the_current_folder(work_folder: Path) -> None:
    for name in ("typing", "logging", "argparse", "torch"):
        Path(f"{name}.py").write_text(f"open({MARK!r}, 'w')")
    for start in (["-m", "esc_arch"], ["-mesc_arch"]):
        assert run_command([sys.executable, *start, "--version"], work_folder).out.startswith("esc_arch ")


def test_the_environment_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from esc_arch.compat.archs import tensors_only

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = dict(os.environ)
    with tensors_only("outer"):
        with tensors_only("inner"):
            assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
    assert dict(os.environ) == before
