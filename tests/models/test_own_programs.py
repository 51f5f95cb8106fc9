"""Programs of others that build models from a dictionary of their own, as BasicSR's tests do: no command line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.data import build_dataset
from basicsr.models import build_model
from basicsr.models.sr_model import SRModel
from basicsr.models.srgan_model import SRGANModel
from conftest import NETWORK
from small_real import use_small_vgg19
from torch.utils.data import DataLoader

from esc_arch.models import ESCLTEModel

Options = dict[str, Any]

MODELS = (
    *("SRModel", "SRGANModel", "ESRGANModel"),
    *("ESCModel", "ESRModel", "ESCRealMSEModel", "ESCRealGANModel", "ESCLTEModel"),
)
USM = {"gt_usm": False, "l1_gt_usm": False, "percep_gt_usm": False, "gan_gt_usm": False}


def plain_options(model_type: str) -> Options:
    """No name, rank, world size, logger, seed or folders."""
    network = dict(NETWORK) if model_type != "ESCLTEModel" else dict(NETWORK) | {"type": "ESCLTE"}
    adam = {"type": "Adam", "lr": 1e-4}
    opt: Options = {
        "model_type": model_type, "scale": 2, "num_gpu": 0, "is_train": True, "dist": False,
        "network_g": network, "network_d": {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 4},
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "ema_decay": 0.999, "optim_g": adam, "optim_d": dict(adam), "total_iter": 2, "warmup_iter": -1,
            "scheduler": {"type": "MultiStepLR", "milestones": [1], "gamma": 0.5},
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
            "gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "loss_weight": 0.1},
        },
        "val": {"metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}}},
    }  # fmt: skip
    return opt | USM | {"high_order_degradation": False}


def batch(model: Any) -> Options:
    if isinstance(model, ESCLTEModel):
        return {"lq": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 16, 16)}
    side = 32  # USM sharpening needs more than 25 pixels
    return {"lq": torch.rand(2, 3, side // 2, side // 2), "gt": torch.rand(2, 3, side, side)}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_from_a_plain_dictionary(
    model_type: str, photographs: Any, val_set: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_vgg19(monkeypatch)
    opt = plain_options(model_type)
    model = build_model(copy.deepcopy(opt))
    for iteration in (1, 2):
        model.update_learning_rate(iteration)
        model.feed_data(batch(model))
        model.optimize_parameters(iteration)
    assert all(isinstance(value, float) for value in dict(model.get_current_log()).values())
    model.opt["path"] |= {"models": str(tmp_path), "training_states": str(tmp_path)}
    model.save(0, 1)
    nets = {"net_g_1.pth"} | ({"net_d_1.pth"} if isinstance(model, SRGANModel) else set())
    assert {path.name for path in tmp_path.iterdir()} == nets | {"1.state"}

    loader = DataLoader(build_dataset(val_set | {"scale": 2, "phase": "val"}))
    pictures = tmp_path / "pictures"
    for changes in ({"is_train": True}, {"is_train": False, "name": "demo"}):
        model.opt |= changes
        model.opt["path"]["visualization"] = str(pictures / str(changes["is_train"]))
        model.opt["val"] |= {"suffix": None, "pbar": True}
        model.nondist_validation(loader, 1, None, save_img=True)
        assert 0 < model.metric_results["psnr"] < 60
        assert len(list((pictures / str(changes["is_train"])).rglob("*.png"))) == 2
    del model.opt["val"]["metrics"], model.metric_results
    model.validation(loader, 1, None, save_img=False)
    assert not hasattr(model, "metric_results")
    del model.net_g_ema
    model.feed_data({"lq": torch.rand(1, 3, 5, 6)})
    model.test()
    assert model.output.shape == (1, 3, 10, 12) and model.net_g.training

    again = build_model(opt)
    again.load_network(again.net_g, str(tmp_path / "net_g_1.pth"))
    again.resume_training(torch.load(tmp_path / "1.state", weights_only=True))
    for name, tensor in model.net_g.state_dict().items():
        assert torch.equal(again.net_g.state_dict()[name], tensor)
    assert again.optimizers[0].state_dict()["state"].keys() == model.optimizers[0].state_dict()["state"].keys()


def test_a_constructor_is_called_with_the_very_options() -> None:
    opt = plain_options("SRModel")
    assert SRModel(opt).opt is opt
