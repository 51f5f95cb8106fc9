"""FlashBias of ESC and ESC-Real as published, and weights of earlier versions, which had another convention."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.models.base_model import BaseModel
from networks import loop_bias, max_error, normal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from esc_arch import ESC, ESCFP, ESCLTE, ESCRIB, ESCReal, ESCRealM
from esc_arch.checkpoints import load_weights, read_checkpoint, select_weights
from esc_arch.checkpoints.conversion import open_checkpoint, save_checkpoint
from esc_arch.checkpoints.factorisation import factorise
from esc_arch.errors import UserError

WINDOW, RANK = 4, 4  # sqrt(rank) is a power of 2: converting is exact
SMALL = {
    "dim": 8,
    "pdim": 4,
    "kernel_size": 3,
    "n_blocks": 2,
    "conv_blocks": 1,
    "window_size": WINDOW,
    "num_heads": 2,
    "exp_ratio": 1.25,
}
KINDS = [ESC, ESCFP, ESCReal, ESCRealM, ESCLTE]


def build(kind: type[nn.Module] = ESC, *, seed: int = 0, **options: Any) -> Any:
    """A network whose parameters are all random."""
    net = kind(**SMALL, **options)
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=1000 * seed + number) * 0.3)
    return net.eval()


def factors(kind: type[nn.Module] = ESC, *, seed: int = 0, rank: int = RANK, **options: Any) -> Any:
    return build(kind, seed=seed, attn_type="FlashBias", flashbias_rank=rank, **options)


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(normal(1, 3, 9, 10, seed=5).to(next(net.parameters()).dtype))


def as_before_0_2(net: nn.Module, *, converted: bool = False) -> dict[str, Tensor]:
    """The weights of the same function as esc_arch 0.1 had them: larger q factors, and other orders of names."""
    weights = dict(net.state_dict())
    for name in [name for name in weights if name.endswith("flashbias_q")]:
        weights[name] = weights[name] * weights[name].shape[-1] ** 0.5
    if converted:  # by `basicsr convert`, from the published order
        return {name: weights[name] for name in sorted(weights, key=lambda name: "flashbias" in name)}
    order = ("convffns", "pconvs", "ln_out", "conv_out")

    def place(name: str) -> tuple[int, int]:
        parts = name.split(".")
        if parts[0] != "blocks":
            return (-1 if list(weights).index(name) < list(weights).index("blocks.0.ln_proj.weight") else 99), 0
        return int(parts[1]), order.index(parts[2]) if parts[2] in order else -1

    return {name: weights[name] for name in sorted(weights, key=place)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_has_no_factor_of_the_rank(kind: type[nn.Module]) -> None:
    attn = factors(kind).blocks[0].attn
    q, k = attn.position_bias()
    assert torch.equal(q, attn.flashbias_q) and torch.equal(k, attn.flashbias_k)
    rib = build(ESCRIB, attn_type="FlashBias", rank=RANK).blocks[0].attn
    assert torch.equal(rib.position_bias()[0], rib.flashbias_q * RANK**-0.5)


def test_factors_start_at_zero_and_have_the_published_rank() -> None:
    attn = ESC(**SMALL, attn_type="FlashBias").blocks[0].attn
    assert attn.flashbias_q.shape == attn.flashbias_k.shape == (2, WINDOW**2, 252)  # 256 - head_dim
    assert not attn.flashbias_q.any() and not attn.flashbias_k.any()
    assert ESC(**SMALL, attn_type="FlashBias", rank=7).blocks[0].attn.rank == 7  # the older name
    with pytest.raises(ValueError, match="flashbias_rank is 3 and rank is 4; they are one option"):
        ESC(**SMALL, attn_type="FlashBias", flashbias_rank=3, rank=4)


def test_positional_arguments_in_the_published_order() -> None:
    net = ESC(8, 4, 3, 1, 2, 4, 2, 3, 1.25, "Naive")
    assert net.upscaling_factor == 3 and net.window_size == 4
    assert len(net.blocks) == 1 and len(net.blocks[0].pconvs) == 2
    assert net.blocks[0].attn.attn_type == "naive"


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_decomposed_when_loaded(kind: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    """Each head's bias becomes its truncated singular value decomposition, sqrt(S) on both sides."""
    source, target = build(kind), factors(kind, seed=1)
    with caplog.at_level(logging.WARNING, logger="basicsr"):
        target.load_state_dict(source.state_dict(), strict=True)
    assert f"of attention with bias tables: FlashBias factors of rank {RANK} were made from them" in caplog.text
    for before, after in zip(source.blocks, target.blocks, strict=True):
        u, s, vh = torch.linalg.svd(loop_bias(before.attn.relative_position_bias.detach().double(), WINDOW))
        q, k = after.attn.flashbias_q.detach(), after.attn.flashbias_k.detach()
        assert max_error(q @ k.mT, (u * s[:, None])[..., :RANK] @ vh[:, :RANK]) < 1e-6
        assert max_error(q.norm(dim=1), s[:, :RANK].sqrt()) < 1e-6
        assert max_error(k.norm(dim=1), s[:, :RANK].sqrt()) < 1e-6
    own = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        assert "relative_position_bias" in name or torch.equal(own[name], parameter)


@pytest.mark.parametrize("rank", [WINDOW**2, WINDOW**2 + 5])
def test_tables_at_full_rank_give_the_same_network(rank: int) -> None:
    source, target = build(), factors(rank=rank, seed=1)
    load_weights(target.double(), source.double().state_dict(), strict=True, source="net.pth")
    assert max_error(output(target), output(source)) < 1e-9


def test_tables_of_another_window() -> None:
    source, target = build().double(), ESC(**SMALL | {"window_size": 5}, attn_type="FlashBias", rank=25).double()
    target.load_state_dict(source.state_dict(), strict=True)
    same = ESC(**SMALL | {"window_size": 5}).double()
    same.load_state_dict(source.state_dict())
    assert max_error(output(target), output(same)) < 1e-9


@pytest.mark.parametrize("converted", [False, True], ids=["trained", "converted"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_earlier_versions(kind: type[nn.Module], converted: bool, caplog: pytest.LogCaptureFixture) -> None:
    """By torch.load and load_state_dict alone, as in programs of one's own."""
    source, target = factors(kind), factors(kind, seed=1)
    with caplog.at_level(logging.WARNING, logger="basicsr"):
        target.load_state_dict(as_before_0_2(source, converted=converted), strict=True)
    assert "of an earlier esc_arch, whose FlashBias divided q k^T by sqrt(rank)" in caplog.text
    assert torch.equal(output(target), output(source))
    caplog.clear()
    again = factors(kind, seed=2)
    again.load_state_dict(target.state_dict())
    assert torch.equal(output(again), output(target))
    assert caplog.text == ""


@pytest.mark.parametrize("where", ["load_weights", "convert", "train"])
def test_files_of_earlier_versions(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`.pth` of a training, and both formats of `basicsr convert`, which say the network with `rank`."""
    source = factors(upscaling_factor=2)
    section = {"type": "ESC", **SMALL, "upscaling_factor": 2, "attn_type": "FlashBias", "rank": RANK}
    old = as_before_0_2(source)
    if where == "train":
        torch.save({"params": old, "params_ema": old}, tmp_path / "old.pth")
    else:
        torch.save({"params": as_before_0_2(source, converted=True), "network_g": section}, tmp_path / "old.pth")
        metadata = {"format": "pt", "esc_arch": "0.1.0", "network_g": json.dumps(section)}
        save_file(old, tmp_path / "old.safetensors", metadata)
    for path in tmp_path.glob("old.*"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="basicsr"):
            if where == "convert":
                opened = open_checkpoint(path)
                assert opened.network_g["flashbias_rank"] == RANK and "rank" not in opened.network_g
                assert list(opened.weights) == list(source.state_dict())
                save_checkpoint(opened, tmp_path / "new.pth", file_format="pth")
                path = tmp_path / "new.pth"
            target = factors(upscaling_factor=2, seed=1)
            load_weights(target, select_weights(read_checkpoint(path), "params", path), strict=True, source=path)
        assert torch.equal(output(target), output(source))
        assert where == "convert" or caplog.text.count("esc_arch") == 1


@pytest.mark.parametrize("file_format", ["pth", "safetensors"])
def test_files_of_this_version_are_taken_as_they_are(
    file_format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(build(upscaling_factor=2).state_dict(), tmp_path / "tables.pth")
    made, _ = factorise(open_checkpoint(tmp_path / "tables.pth"), RANK)
    path = tmp_path / f"new.{file_format}"
    save_checkpoint(made, path, file_format=file_format)
    net = factors(upscaling_factor=2)
    with caplog.at_level(logging.INFO, logger="basicsr"):
        load_weights(net, select_weights(read_checkpoint(path), "params", path), strict=True, source=path)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in made.weights.items())
    assert "FlashBias" not in caplog.text
    assert open_checkpoint(path).assumptions == []


def test_names_that_were_sorted_are_taken_as_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """safetensors without metadata: their order says nothing, so what is assumed is said."""
    source, target = factors(), factors(seed=1)
    save_file(dict(source.state_dict()), tmp_path / "net.safetensors")
    with caplog.at_level(logging.WARNING, logger="basicsr"):
        target.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert "of unknown origin: its FlashBias factors are taken as published" in caplog.text
    assert torch.equal(output(target), output(source))


@pytest.mark.parametrize("rank", [{"rank": RANK}, {}, {"flashbias_rank": RANK}], ids=str)
def test_options_that_another_program_notes_do_not_make_weights_older(rank: Any, tmp_path: Path) -> None:
    """`rank` is still an option's name, and the rank may be the default."""
    source = factors(upscaling_factor=2)
    section = {"type": "ESC", **SMALL, "upscaling_factor": 2, "attn_type": "FlashBias", **rank}
    path = tmp_path / "net.pth"
    torch.save({"params": source.state_dict(), "network_g": section}, path)
    net = factors(upscaling_factor=2, seed=1)
    load_weights(net, select_weights(read_checkpoint(path), "params", path), strict=True, source=path)
    assert torch.equal(output(net), output(source))


def test_weights_under_two_keys_are_converted_once(tmp_path: Path) -> None:
    source = factors(upscaling_factor=2)
    old, path = as_before_0_2(source), tmp_path / "net.pth"
    section = {"type": "ESC", **SMALL, "upscaling_factor": 2, "attn_type": "FlashBias", "rank": RANK}
    torch.save({"params": old, "params_ema": old, "network_g": section}, path)
    for key in ("params", "params_ema"):
        net = factors(upscaling_factor=2, seed=1)
        load_weights(net, select_weights(read_checkpoint(path), key, path), strict=True, source=path)
        assert torch.equal(output(net), output(source))


def test_a_noted_escrib_keeps_its_convention_by_either_name(tmp_path: Path) -> None:
    source = build(ESCRIB, attn_type="FlashBias", rank=RANK)
    section = {"type": "esc_arch.ESCRIB", **SMALL, "attn_type": "FlashBias", "rank": RANK}
    weights = dict(source.state_dict())
    torch.save({"params": {name: weights[name] for name in sorted(weights)}, "network_g": section}, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")["params"]
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [RANK, WINDOW**2])
def test_tables_that_are_no_numbers(value: float, rank: int) -> None:
    weights = dict(build().state_dict())
    weights["blocks.1.attn.relative_position_bias"] = torch.full((2, (2 * WINDOW - 1) ** 2), value)
    with pytest.raises(UserError, match=r"^blocks\.1\.attn\.relative_position_bias holds infinite numbers or NaN"):
        factors(rank=rank).load_state_dict(weights)


def load_by_basicsr_itself(net: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """As models do whose load_network is not replaced: what differs in shape is renamed, and put at the end."""
    torch.save({"params": weights}, file)
    model: Any = object.__new__(BaseModel)
    model.opt, model.device = {"dist": False}, torch.device("cpu")
    BaseModel.load_network._esc_arch_original(model, net, str(file), False, "params")


@pytest.mark.parametrize("converted", [False, True], ids=["trained", "converted"])
def test_earlier_weights_of_another_scale_loaded_by_basicsr_itself(converted: bool, tmp_path: Path) -> None:
    source, target, same = (factors(seed=seed, upscaling_factor=scale) for seed, scale in ((0, 2), (1, 3), (2, 3)))
    load_by_basicsr_itself(target, as_before_0_2(source, converted=converted), tmp_path / "net.pth")
    same.load_state_dict(source.state_dict())
    assert torch.equal(output(target), output(same))


def test_earlier_weights_of_another_window_loaded_by_basicsr_itself(tmp_path: Path) -> None:
    target, same = (ESC(**SMALL | {"window_size": 5}, attn_type="FlashBias", rank=RANK).eval() for _ in range(2))
    source = factors()
    load_by_basicsr_itself(target, as_before_0_2(source), tmp_path / "net.pth")
    same.load_state_dict(source.state_dict())
    assert torch.equal(output(target), output(same))


@pytest.mark.parametrize("changes", [{"num_heads": 4}, {"dim": 12}], ids=str)
@pytest.mark.parametrize("attention", [{"attn_type": "FlashBias", "rank": RANK}, {}], ids=["factors", "tables"])
def test_what_cannot_be_adapted_stays_left_out(attention: Any, changes: Any, tmp_path: Path) -> None:
    source, target = build(**attention), ESC(**SMALL | attention | changes)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    load_by_basicsr_itself(target, dict(source.state_dict()), tmp_path / "net.pth")
    for name, tensor in target.state_dict().items():
        fits = tensor.shape == source.state_dict()[name].shape
        assert torch.equal(tensor, source.state_dict()[name] if fits else before[name])


def test_factors_of_escrib_have_one_convention(caplog: pytest.LogCaptureFixture) -> None:
    source, target = (build(ESCRIB, attn_type="FlashBias", rank=RANK, seed=seed) for seed in (0, 1))
    weights = dict(source.state_dict())
    with caplog.at_level(logging.WARNING, logger="basicsr"):
        target.load_state_dict({name: weights[name] for name in sorted(weights)})
    assert torch.equal(output(target), output(source))
    assert caplog.text == ""
