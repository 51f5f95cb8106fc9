"""Weights of another window: what their position biases become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from esc_arch import UserError
from esc_arch.checkpoints import load_weights
from esc_arch.modules import FlashWindowAttention
from esc_arch.modules.window_attention import resize_bias_factors, resize_bias_table
from esc_arch.ops.window_attention.bias import dense_bias
from esc_arch.options.network_checks import check_networks

SMALL = {"dim": 8, "pdim": 4, "kernel_size": 3, "n_blocks": 2, "conv_blocks": 1, "num_heads": 2, "upscaling_factor": 2}


def network(kind: str, window: int, **options: Any) -> nn.Module:
    net = ARCH_REGISTRY.get(kind)(**SMALL | {"window_size": window} | options)
    random = torch.Generator().manual_seed(window)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.2
    return net


def warnings_in(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelname == "WARNING"]


# --- tables -----------------------------------------------------------------------------------------------------------


def bias_of(table: Tensor, window: int, head: int, dy: int, dx: int) -> Tensor:
    return table[head, (dy + window - 1) * (2 * window - 1) + dx + window - 1]


@pytest.mark.parametrize(("source", "window"), [(6, 4), (4, 6), (3, 1), (1, 3), (5, 5)])
def test_table_has_the_values_of_the_same_distances(source: int, window: int) -> None:
    table = torch.randn(2, (2 * source - 1) ** 2)
    resized, told = resize_bias_table(table, window)
    assert (told, resized.shape) == (source, (2, (2 * window - 1) ** 2))
    for dy in range(1 - window, window):
        for dx in range(1 - window, window):
            nearest = [max(1 - source, min(source - 1, d)) for d in (dy, dx)]
            for head in range(2):
                assert bias_of(resized, window, head, dy, dx) == bias_of(table, source, head, *nearest)


def test_table_of_a_smaller_window_biases_each_pair_of_tokens_as_before() -> None:
    """The tokens of a 4 x 4 corner of a 6 x 6 window have the same distances as those of a 4 x 4 window."""
    table = torch.randn(2, 11**2)
    resized, _ = resize_bias_table(table, 4)
    corner = torch.arange(36).view(6, 6)[1:5, 1:5].flatten()
    assert torch.equal(dense_bias(resized, 4), dense_bias(table, 6)[:, corner][:, :, corner])


@pytest.mark.parametrize("shape", [(2, 50), (2, 64), (2, 7, 7)])
def test_what_is_no_table(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"is not \(heads, \(2 window - 1\)\^2\)"):
        resize_bias_table(torch.zeros(shape), 4)


# --- factors ----------------------------------------------------------------------------------------------------------


def test_factors_are_interpolated_over_the_grid() -> None:
    """A factor linear in the tokens' coordinates stays so, away from the border."""
    centres = (torch.arange(8) + 0.5) / 8
    linear = torch.stack([centres[:, None].expand(8, 8), centres.expand(8, 8)], dim=-1)
    factors = torch.stack([linear.reshape(64, 2), 3 * linear.reshape(64, 2)])
    resized, told = resize_bias_factors(factors, 4)
    assert (told, resized.shape) == (8, (2, 16, 2))
    expected = (torch.arange(4) + 0.5) / 4
    for head in range(2):
        grid = resized[head].view(4, 4, 2) / (1, 3)[head]
        torch.testing.assert_close(grid[:, 1, 0], expected)
        torch.testing.assert_close(grid[2, :, 1], expected)
    larger, _ = resize_bias_factors(factors, 16)
    grid = larger[0].view(16, 16, 2)
    torch.testing.assert_close(grid[1:-1, 5, 0], (torch.arange(16)[1:-1] + 0.5) / 16)


@pytest.mark.parametrize("shape", [(2, 15, 3), (2, 16)])
def test_what_is_no_factor(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"is not \(heads, window\^2, rank\)"):
        resize_bias_factors(torch.zeros(shape), 4)


# --- networks ---------------------------------------------------------------------------------------------------------

KINDS = [
    ("ESC", {}, "relative_position_bias"),
    ("ESCReal", {"upscaling_factor": 4}, "relative_position_bias"),
    ("ESC", {"attn_type": "FlashBias", "rank": 3}, "flashbias_"),
    ("ESCRIB", {"attn_type": "FlashBias", "rank": 3}, "flashbias_"),
]


@pytest.mark.parametrize(("kind", "options", "adapted"), KINDS)
@pytest.mark.parametrize(("source", "window"), [(8, 4), (4, 8)])
@pytest.mark.parametrize("by", ["load_weights", "load_state_dict", "renamed"])
def test_networks_load_weights_of_another_window(
    kind: str, options: Any, adapted: str, source: int, window: int, by: str, basicsr_log: pytest.LogCaptureFixture
) -> None:
    weights = network(kind, source, **options).state_dict()
    net = network(kind, window, **options)
    if by == "load_weights":
        load_weights(net, weights, strict=True, source="theirs.pth")
    elif by == "load_state_dict":
        net.load_state_dict(weights)
    else:
        net.load_state_dict({name + ".ignore" * (adapted in name): tensor for name, tensor in weights.items()})
    changed = 0
    for name, tensor in net.state_dict().items():
        expected = weights[name]
        if adapted in name:
            resize = resize_bias_factors if adapted == "flashbias_" else resize_bias_table
            expected, changed = resize(expected, window)[0], changed + 1
        assert torch.equal(tensor, expected), name
    assert changed == 2 * (2 if adapted == "flashbias_" else 1)
    (line,) = warnings_in(basicsr_log)
    start = "theirs.pth" if by == "load_weights" else "The checkpoint"
    assert (
        line
        == f"{start} is of another window: its position biases were adapted from window {source} to window {window}."
    )


def test_attention_in_a_smaller_window_is_that_of_the_larger_one_masked_to_it() -> None:
    torch.manual_seed(0)
    large = FlashWindowAttention(dim=8, window_size=8, num_heads=2, attn_type="naive")
    nn.init.normal_(large.relative_position_bias)
    small = FlashWindowAttention(dim=8, window_size=4, num_heads=2, attn_type="naive")
    table, _ = resize_bias_table(large.relative_position_bias.detach(), 4)
    small.load_state_dict(large.state_dict() | {"relative_position_bias": table})
    x = torch.randn(1, 8, 8, 8)
    q, k, v = large.to_qkv(x).flatten(2).unflatten(1, (3, 2, 4)).unbind(1)
    scores = q.transpose(-2, -1) @ k * 4**-0.5 + dense_bias(large.relative_position_bias, 8)
    token = torch.arange(64)
    part = token // 32 * 2 + token % 8 // 4
    scores = scores.masked_fill(part[:, None] != part, -torch.inf)
    expected = large.to_out((v @ scores.softmax(-1).transpose(-2, -1)).reshape(1, 8, 8, 8))
    torch.testing.assert_close(small(x), expected)


def test_rib_needs_nothing(basicsr_log: pytest.LogCaptureFixture) -> None:
    weights = network("ESCRIB", 8).state_dict()
    net = network("ESCRIB", 4)
    net.load_state_dict(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert warnings_in(basicsr_log) == []


def test_the_same_window_is_left_alone(basicsr_log: pytest.LogCaptureFixture) -> None:
    network("ESC", 4).load_state_dict(network("ESC", 4).state_dict())
    assert warnings_in(basicsr_log) == []


def test_another_window_and_another_scale(basicsr_log: pytest.LogCaptureFixture) -> None:
    net = network("ESC", 4, upscaling_factor=3)
    load_weights(net, network("ESC", 8).state_dict(), strict=True, source="x2.pth")
    window, *scale = warnings_in(basicsr_log)
    assert scale == [
        f"x2.pth is of another scale: to_img.{p} was interpolated from x2 to x3." for p in ("weight", "bias")
    ]
    assert "adapted from window 8 to window 4" in window


@pytest.mark.parametrize(
    "change", [{"num_heads": 4}, {"attn_type": "FlashBias", "rank": 3}], ids=["heads", "another kind of bias"]
)
def test_other_differences_are_reported(change: Any, basicsr_log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"theirs\.pth does not fit ESC"):
        load_weights(network("ESC", 4), network("ESC", 8, **change).state_dict(), strict=True, source="theirs.pth")
    assert warnings_in(basicsr_log) == []


def test_checked_before_a_run_and_trained(train_options: Any, run_basicsr: Any, tmp_path: Path) -> None:
    options = {key: value for key, value in train_options["network_g"].items() if key != "type"}
    torch.save({"params": network("ESC", 6, **options | {"window_size": 6}).state_dict()}, tmp_path / "six.pth")
    train_options["path"]["pretrain_network_g"] = str(tmp_path / "six.pth")
    assert list(check_networks(train_options, True)) == []
    train_options["train"]["total_iter"] = 1
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    assert "six.pth is of another window: its position biases were adapted from window 6 to window 4." in run.log()
