"""Checkpoints in other formats and forms: nothing is lost, nothing runs, and outputs stay what they were."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from esc_arch import UserError, archs
from esc_arch.checkpoints import load_weights, read_checkpoint, select_weights
from esc_arch.checkpoints.conversion import (
    Checkpoint,
    build_network,
    fold,
    is_folded,
    open_checkpoint,
    save_checkpoint,
)
from esc_arch.checkpoints.factorisation import factorise, output_error
from esc_arch.version import __version__

SMALL: dict[str, Any] = {
    "dim": 8,
    "pdim": 4,
    "kernel_size": 5,
    "n_blocks": 2,
    "conv_blocks": 1,
    "window_size": 4,
    "num_heads": 2,
    "upscaling_factor": 2,
}
WINDOW, TOKENS = 4, 16
KINDS = ["ESC", "ESCFP", "ESCReal", "ESCRealM", "ESCRIB"]


def network(kind: str = "ESC", **changes: Any) -> nn.Module:
    """Small and randomised, as nothing may hide behind zeros; descriptions in buffers stay."""
    options = SMALL | ({"upscaling_factor": 4} if kind == "ESCReal" else {}) | changes
    net = getattr(archs, kind)(**options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.dim() < 3 else 0.2))
    return net


def weights_of(kind: str = "ESC", **changes: Any) -> dict[str, Tensor]:
    return dict(network(kind, **changes).state_dict())


def checkpoint_of(kind: str, folder: Path, **changes: Any) -> Checkpoint:
    torch.save({"params": weights_of(kind, **changes)}, folder / "made.pth")
    return open_checkpoint(folder / "made.pth", window_size=WINDOW)


def image(height: int = 9, width: int = 11) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, types, shapes and bits (so that NaN equals NaN and -0.0 is not 0.0)."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        as_bytes = (part.contiguous().reshape(-1).view(torch.uint8) for part in (actual[name], tensor))
        assert torch.equal(*as_bytes), name


class TestRoundTrip:
    def there_and_back(self, content: dict[str, Any], folder: Path) -> dict[str, Any]:
        torch.save(content, folder / "a.pth")
        save_checkpoint(open_checkpoint(folder / "a.pth"), folder / "b.safetensors", file_format="safetensors")
        save_checkpoint(open_checkpoint(folder / "b.safetensors"), folder / "c.pth", file_format="pth")
        assert not list(folder.glob(".*"))
        return read_checkpoint(folder / "c.pth")

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_network(self, kind: str, tmp_path: Path) -> None:
        weights = weights_of(kind)
        back = self.there_and_back({"params": weights}, tmp_path)
        assert_same(back["params"], weights)
        assert back.keys() == {"params", "network_g"}

    def test_types_and_strange_values(self, tmp_path: Path) -> None:
        weights = weights_of("ESCRealM", upsampler="dysample")
        types = [torch.float16, torch.bfloat16, torch.float64, torch.float32]
        for index, (name, tensor) in enumerate(weights.items()):
            if tensor.is_floating_point():
                weights[name] = tensor.to(types[index % len(types)])
        weights["last.bias"] = torch.tensor([3e38, -3e38, -0.0, 1e-45, 1, 2, 3, 4])
        back = self.there_and_back({"params_ema": weights}, tmp_path)
        assert_same(back["params_ema"], weights)
        assert back["params_ema"]["to_img.MetaUpsample"].dtype == torch.uint8
        assert back["params_ema"]["to_img.2.init_pos"].dim() == 4

    def test_shared_and_non_contiguous_tensors(self, tmp_path: Path) -> None:
        weights = weights_of()
        weights["blocks.1.ln_out.weight"] = weights["blocks.0.ln_out.weight"]
        many = torch.randn(2, 8)
        weights["blocks.0.ln_attn.weight"], weights["blocks.0.ln_attn.bias"] = many[0], many[1]
        weights["blocks.0.attn.to_out.weight"] = torch.randn(1, 1, 8, 8).permute(3, 2, 1, 0)
        weights["last.weight"] = weights["last.weight"].to(memory_format=torch.channels_last)
        back = self.there_and_back({"params": weights}, tmp_path)
        assert_same(back["params"], weights)

    def test_plain_values_are_kept_and_others_named(self, tmp_path: Path) -> None:
        """What cannot be text, and other weights, are left out, and that is said."""
        beside = {"iter": 7, "epoch": 1.5, "note": "x", "format": "mine", "opt": {"lr": [1e-4, None]}, "flag": True}
        others: dict[Any, Any] = {"optimizer": {"state": torch.ones(1)}, "pair": (1, 2), "params": weights_of(), 5: "x"}
        content = {"params_ema": weights_of(use_ln=True), **beside, **others}
        back = self.there_and_back(content, tmp_path)
        assert {key: back[key] for key in beside} == beside
        assert back.keys() == {"params_ema", "network_g", *beside}
        opened = open_checkpoint(tmp_path / "a.pth")
        assert opened.left_out == ["optimizer", "pair", "params", "5"]
        assert opened.beside == beside

    def test_what_safetensors_say(self, tmp_path: Path) -> None:
        self.there_and_back({"params_ema": weights_of(), "iter": 7, "note": "x"}, tmp_path)
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata.pop("network_g")) == {
            "type": "ESC",
            **SMALL,
            "exp_ratio": 1.25,
            "use_ln": False,
            "attn_type": "auto",
        }
        assert json.loads(metadata.pop("beside")) == {"iter": 7}
        assert metadata == {"format": "pt", "esc_arch": __version__, "param_key": "params_ema", "note": "x"}

    def test_what_weights_do_not_say_is_kept(self, tmp_path: Path) -> None:
        torch.save({"params": weights_of("ESCRIB", rib_n_freqs=3)}, tmp_path / "a.pth")
        assert open_checkpoint(tmp_path / "a.pth").network_g["window_size"] == 64
        opened = open_checkpoint(tmp_path / "a.pth", window_size=WINDOW)
        for name in ("b.safetensors", "c.pth", "d.safetensors"):
            save_checkpoint(opened, tmp_path / name, file_format=name.partition(".")[2])
            opened = open_checkpoint(tmp_path / name)
            assert opened.network_g == {
                "type": "ESCRIB",
                **SMALL,
                "exp_ratio": 1.25,
                "gate_type": None,
                "use_ln": False,
                "attn_type": "RIB",
                "rank": 16,
                "rib_hidden_dim": 32,
                "rib_n_freqs": 3,
            }
            assert opened.assumptions == []

    def test_a_bare_state_dict_gets_the_key_that_basicsr_looks_for(self, tmp_path: Path) -> None:
        weights = weights_of()
        assert_same(self.there_and_back(weights, tmp_path)["params"], weights)
        assert open_checkpoint(tmp_path / "b.safetensors").key is None

    def test_files_of_others(self, tmp_path: Path) -> None:
        """safetensors without metadata, with strings of other programs, or with what looks like ours and is not."""
        weights = weights_of()
        foreign = {"author": "someone"}
        for metadata in (None, foreign, foreign | {"network_g": "{]", "beside": "[1]"}):
            save_file(weights, tmp_path / "a.safetensors", metadata)
            opened = open_checkpoint(tmp_path / "a.safetensors")
            assert_same(opened.weights, weights)
            assert opened.beside == (foreign if metadata else {})
        save_checkpoint(opened, tmp_path / "b.safetensors", file_format="safetensors")
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            assert foreign.items() <= file.metadata().items()

    def test_renamed_files_keep_what_they_say(self, tmp_path: Path) -> None:
        """The content decides how a file is read, metadata included."""
        self.there_and_back({"params_ema": weights_of(), "iter": 7}, tmp_path)
        for name, renamed in (("b.safetensors", "d.pth"), ("c.pth", "e.safetensors")):
            as_named = open_checkpoint(tmp_path / name)
            (tmp_path / name).rename(tmp_path / renamed)
            opened = open_checkpoint(tmp_path / renamed)
            assert_same(opened.weights, as_named.weights)
            assert (opened.key, opened.beside, opened.network_g) == (
                as_named.key, as_named.beside, as_named.network_g
            )  # fmt: skip

    def test_basicsr_s_way_of_loading(self, tmp_path: Path) -> None:
        net = network()
        self.there_and_back({"params_ema": dict(net.state_dict())}, tmp_path)
        for name in ("b.safetensors", "c.pth"):
            other = archs.ESC(**SMALL).eval()
            weights = select_weights(read_checkpoint(tmp_path / name), "params_ema", name)
            load_weights(other, weights, strict=True, source=name)
            assert torch.equal(other(image()), net(image()))


@pytest.mark.parametrize("key", ["params_ema", "params", "params-ema", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "net_g.", "module.generator."])
def test_wrappings(key: str | None, prefix: str, tmp_path: Path) -> None:
    weights = weights_of()
    wrapped = {prefix + name: nn.Parameter(tensor) for name, tensor in weights.items()}
    torch.save(wrapped if key is None else {key: wrapped}, tmp_path / "a.pth")
    opened = open_checkpoint(tmp_path / "a.pth")
    assert_same(opened.weights, weights)
    assert opened.key == key
    save_checkpoint(opened, tmp_path / "b.safetensors", file_format="safetensors")
    assert_same(open_checkpoint(tmp_path / "b.safetensors").weights, weights)


def test_which_of_several_weights(tmp_path: Path) -> None:
    torch.save({"params": weights_of(n_blocks=1), "params_ema": weights_of()}, tmp_path / "a.pth")
    chosen = open_checkpoint(tmp_path / "a.pth")
    assert (chosen.key, chosen.left_out, chosen.network_g["n_blocks"]) == ("params_ema", ["params"], 2)
    chosen = open_checkpoint(tmp_path / "a.pth", param_key="params")
    assert (chosen.key, chosen.left_out, chosen.network_g["n_blocks"]) == ("params", ["params_ema"], 1)
    with pytest.raises(
        UserError, match=r"a\.pth holds no weights under 'ema'; it has weights under params, params_ema\."
    ):
        open_checkpoint(tmp_path / "a.pth", param_key="ema")
    torch.save(weights_of(), tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"b\.pth holds no weights under 'ema'; omit the key"):
        open_checkpoint(tmp_path / "b.pth", param_key="ema")


class TestRefusals:
    def test_code(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
                return os.mkdir, (str(tmp_path / "trapped"),)

        for content in ({"params": weights_of(), "x": Trap()}, {"params": weights_of() | {"x": Trap()}}):
            torch.save(content, tmp_path / "a.pth")
            with pytest.raises(UserError, match=r"a\.pth holds posix\.mkdir\. What is more than tensors and plain"):
                open_checkpoint(tmp_path / "a.pth")
        (tmp_path / "b.pth").write_bytes(pickle.dumps({"x": Trap()}, protocol=2))
        with pytest.raises(UserError, match=r"b\.pth"):
            open_checkpoint(tmp_path / "b.pth")
        assert not (tmp_path / "trapped").exists()

    def test_other_networks(self, tmp_path: Path) -> None:
        torch.save({"params": {0: torch.ones(1)}}, tmp_path / "b.pth")
        with pytest.raises(UserError, match=r"b\.pth holds no weights under any of params_ema, params"):
            open_checkpoint(tmp_path / "b.pth")
        torch.save({"params": nn.Linear(2, 2).state_dict()}, tmp_path / "a.pth")
        with pytest.raises(
            UserError, match=r"a\.pth: These are not the weights of an ESC network .* hold weight, bias"
        ):
            open_checkpoint(tmp_path / "a.pth")

    @pytest.mark.parametrize(
        ("kind", "name", "shape", "message"),
        [
            ("ESC", "last.bias", None, r"is almost ESC with dim: 8, .*: 1 missing in it \(last\.bias\)\."),
            ("ESC", "extra", (1,), r"is almost ESC with .*: 1 not in the network \(extra\)\."),
            (
                "ESCRIB",
                "last.1.weight",
                (8, 8, 1, 1),
                r"is .*last\.1\.weight is \(8, 8, 1, 1\) and should be \(8, 8, 3, 3\)",
            ),
            ("ESC", "plk_filter", (4, 4, 4, 4), r"looks like ESC with .*, but that is invalid: kernel_size is 4"),
        ],
    )
    def test_almost_a_network(
        self, kind: str, name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path
    ) -> None:
        weights = weights_of(kind)
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
        torch.save({"params": weights}, tmp_path / "a.pth")
        with pytest.raises(UserError, match=r"a\.pth " + message):
            open_checkpoint(tmp_path / "a.pth")

    def test_a_window_that_is_not_to_be_chosen(self, tmp_path: Path) -> None:
        torch.save({"params": weights_of()}, tmp_path / "a.pth")
        assert open_checkpoint(tmp_path / "a.pth", window_size=WINDOW).network_g["window_size"] == WINDOW
        with pytest.raises(UserError, match=r"The weights of .*a\.pth have window 4; only RIB takes another one\."):
            open_checkpoint(tmp_path / "a.pth", window_size=8)
        with pytest.raises(UserError, match="The window given is 0; it must be at least 1"):
            open_checkpoint(tmp_path / "a.pth", window_size=0)

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        checkpoint = checkpoint_of("ESC", tmp_path)
        with pytest.raises(UserError, match=r"Cannot write .*no/b\.pth: No such file or directory\."):
            save_checkpoint(checkpoint, tmp_path / "no" / "b.pth", file_format="pth")

    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = checkpoint_of("ESC", tmp_path)
        (tmp_path / "b.pth").write_bytes(b"old")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"Cannot write .*b\.pth: No space left on device\."):
            save_checkpoint(checkpoint, tmp_path / "b.pth", file_format="pth")
        assert (tmp_path / "b.pth").read_bytes() == b"old"
        assert {path.name for path in tmp_path.iterdir()} == {"made.pth", "b.pth"}


class TestFold:
    @pytest.mark.parametrize("kind", ["ESC", "ESCReal", "ESCRealM", "ESCRIB"])
    def test_output_stays(self, kind: str, tmp_path: Path) -> None:
        checkpoint = checkpoint_of(kind, tmp_path)
        kernel = checkpoint.weights["plk_filter"].clone()
        folded = fold(checkpoint)
        assert (is_folded(checkpoint.weights), is_folded(folded.weights)) == (False, True)
        assert (checkpoint.beside, folded.beside) == ({}, {"folded": True})
        assert torch.equal(checkpoint.weights["plk_filter"], kernel)
        assert not torch.equal(folded.weights["plk_filter"], kernel)
        assert output_error(checkpoint, folded, image())[0] < 3e-5  # a kernel rounded otherwise, and ten blocks
        assert_same(fold(folded).weights, folded.weights)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_types(self, dtype: torch.dtype, tmp_path: Path) -> None:
        torch.save({name: tensor.to(dtype) for name, tensor in weights_of().items()}, tmp_path / "a.pth")
        folded = fold(open_checkpoint(tmp_path / "a.pth"))
        kernel = open_checkpoint(tmp_path / "a.pth").weights["plk_filter"].double()
        turned = torch.rot90(kernel, 1, (-2, -1))
        variants = [view.flip(axes) for view in (kernel, turned) for axes in ((), (-1,), (-2,), (-2, -1))]
        average = torch.stack(variants).mean(dim=0).to(dtype)
        assert folded.weights["plk_filter"].dtype == dtype
        assert torch.allclose(folded.weights["plk_filter"].double(), average.double(), rtol=1e-12, atol=1e-14)
        assert_same(fold(folded).weights, folded.weights)

    def test_is_what_the_network_does(self, tmp_path: Path) -> None:
        net = network()
        torch.save(net.fold().state_dict(), tmp_path / "a.pth")
        assert is_folded(open_checkpoint(tmp_path / "a.pth").weights)

    def test_nothing_to_fold(self, tmp_path: Path) -> None:
        checkpoint = checkpoint_of("ESCFP", tmp_path)
        assert is_folded(checkpoint.weights) is None
        with pytest.raises(UserError, match="ESCFP has no large kernel to fold"):
            fold(checkpoint)


def loop_bias(table: Tensor) -> Tensor:
    """(h, 49) -> (h, 16, 16) in float64, the formula as nested loops."""
    bias = torch.empty(table.shape[0], TOKENS, TOKENS, dtype=torch.float64)
    for query in range(TOKENS):
        for key in range(TOKENS):
            (qy, qx), (ky, kx) = divmod(query, WINDOW), divmod(key, WINDOW)
            bias[:, query, key] = table[:, (ky - qy + WINDOW - 1) * (2 * WINDOW - 1) + kx - qx + WINDOW - 1]
    return bias


class TestFactors:
    @pytest.mark.parametrize("kind", ["ESC", "ESCFP", "ESCReal", "ESCRealM"])
    def test_of_full_rank_change_nothing(self, kind: str, tmp_path: Path) -> None:
        checkpoint = checkpoint_of(kind, tmp_path)
        made, errors = factorise(checkpoint, TOKENS)
        assert made.network_g == checkpoint.network_g | {"attn_type": "FlashBias", "flashbias_rank": TOKENS}
        assert max(error.largest for error in errors) < 1e-5
        assert min(error.kept for error in errors) == pytest.approx(1)
        largest, psnr = output_error(checkpoint, made, image())
        assert largest < 1e-4
        assert psnr > 80
        unchanged = {name for name in checkpoint.weights if "relative_position_bias" not in name}
        assert made.weights.keys() - unchanged == {
            f"blocks.{block}.attn.flashbias_{side}" for block in range(SMALL["n_blocks"]) for side in "qk"
        }
        assert_same({n: made.weights[n] for n in unchanged}, {n: checkpoint.weights[n] for n in unchanged})
        assert "blocks.0.attn.relative_position_bias" in checkpoint.weights  # the argument is as it was

    @pytest.mark.parametrize("rank", [1, 3, 7])
    def test_are_the_best_of_their_rank(self, rank: int, tmp_path: Path) -> None:
        """By the theorem of Eckart and Young: the squared error is what the other singular values amount to."""
        checkpoint = checkpoint_of("ESC", tmp_path)
        made, errors = factorise(checkpoint, rank)
        net = build_network(made.network_g)
        net.load_state_dict(made.weights)
        assert len(errors) == SMALL["n_blocks"]
        for block, error in enumerate(errors):
            assert error.layer == f"blocks.{block}.attn"
            bias = loop_bias(checkpoint.weights[f"{error.layer}.relative_position_bias"].double())
            squares = torch.linalg.svdvals(bias).square()
            q, k = (factor.detach().double() for factor in net.blocks[block].attn.position_bias())
            difference = q @ k.mT - bias
            assert difference.square().sum().item() == pytest.approx(squares[:, rank:].sum().item(), rel=1e-5)
            assert error.largest == pytest.approx(difference.abs().max().item(), rel=1e-4)
            assert error.kept == pytest.approx((squares[:, :rank].sum() / squares.sum()).item(), rel=1e-5)

    def test_a_bias_of_one_number_has_rank_1(self, tmp_path: Path) -> None:
        weights = weights_of()
        for name in weights:
            if name.endswith("relative_position_bias"):
                weights[name] = torch.full_like(weights[name], 100.0)
        torch.save(weights, tmp_path / "a.pth")
        checkpoint = open_checkpoint(tmp_path / "a.pth")
        made, errors = factorise(checkpoint, 1)
        assert errors[-1].kept == pytest.approx(1)
        assert output_error(checkpoint, made, image())[0] < 1e-4
        assert all(bool(tensor.isfinite().all()) for tensor in made.weights.values())

    def test_both_factors_are_of_one_size(self, tmp_path: Path) -> None:
        made, _ = factorise(checkpoint_of("ESC", tmp_path), 3)
        q, k = (made.weights[f"blocks.1.attn.flashbias_{side}"] for side in "qk")
        assert torch.allclose(q.norm(dim=1), k.norm(dim=1), rtol=1e-4)

    def test_layers_in_the_order_of_their_numbers(self, tmp_path: Path) -> None:
        checkpoint = checkpoint_of("ESC", tmp_path, n_blocks=11)
        _, errors = factorise(checkpoint, 1)
        assert [error.layer for error in errors] == [f"blocks.{block}.attn" for block in range(11)]

    def test_output_error_grows_as_the_rank_falls(self, tmp_path: Path) -> None:
        checkpoint = checkpoint_of("ESC", tmp_path)
        outputs = [output_error(checkpoint, factorise(checkpoint, rank)[0], image()) for rank in (1, 4, 10)]
        assert outputs[0][0] > outputs[1][0] > outputs[2][0] > 0
        assert outputs[0][1] < outputs[1][1] < outputs[2][1]
        assert output_error(checkpoint, checkpoint, image()) == (0, float("inf"))

    def test_half_precision(self, tmp_path: Path) -> None:
        torch.save({name: tensor.half() for name, tensor in weights_of().items()}, tmp_path / "a.pth")
        made, errors = factorise(open_checkpoint(tmp_path / "a.pth"), TOKENS)
        assert {tensor.dtype for tensor in made.weights.values()} == {torch.float16}
        assert 0 < errors[-1].largest < 1e-2

    def test_are_recognised_and_written(self, tmp_path: Path) -> None:
        made, _ = factorise(fold(checkpoint_of("ESC", tmp_path)), 3)
        save_checkpoint(made, tmp_path / "b.safetensors", file_format="safetensors")
        opened = open_checkpoint(tmp_path / "b.safetensors")
        assert opened.network_g == made.network_g
        assert opened.beside == {"folded": True}
        assert_same(opened.weights, made.weights)

    @pytest.mark.parametrize("rank", [0, TOKENS + 1])
    def test_ranks_that_there_are_not(self, rank: int, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=rf"The rank is {rank}; for windows of 4 x 4 it must be within 1 \.\. 16\."):
            factorise(checkpoint_of("ESC", tmp_path), rank)

    @pytest.mark.parametrize(("kind", "attn_type"), [("ESCRIB", "RIB"), ("ESCRIB", "FlashBias"), ("ESC", "FlashBias")])
    def test_without_tables(self, kind: str, attn_type: str, tmp_path: Path) -> None:
        checkpoint = checkpoint_of(kind, tmp_path, attn_type=attn_type)
        with pytest.raises(
            UserError, match=rf"This {kind} has no bias table to factorise: its attn_type is {attn_type}\."
        ):
            factorise(checkpoint, 2)

    def test_of_numbers_that_are_none(self, tmp_path: Path) -> None:
        weights = weights_of()
        weights["blocks.1.attn.relative_position_bias"][0, 3] = float("nan")
        torch.save(weights, tmp_path / "a.pth")
        with pytest.raises(UserError, match=r"blocks\.1\.attn\.relative_position_bias with 1 of 98 numbers"):
            factorise(open_checkpoint(tmp_path / "a.pth"), 2)


class TestNetworksWithFactors:
    @pytest.mark.parametrize("kind", ["ESC", "ESCFP", "ESCReal", "ESCRealM"])
    def test_backends_agree(self, kind: str) -> None:
        nets = [
            network(kind, attn_type=name, rank=3, backend=b)
            for name, b in (("FlashBias", "naive"), ("flashbias", "SDPA"))
        ]
        assert [net.blocks[0].attn.attn_type for net in nets] == ["naive", "sdpa"]
        with torch.no_grad():
            assert torch.allclose(nets[0](image()), nets[1](image()), rtol=0, atol=1e-4)

    def test_a_backend_of_a_table_is_named_by_attn_type(self) -> None:
        with pytest.raises(ValueError, match=r"backend is 'sdpa', but only attn_type: FlashBias takes one; .*'auto'"):
            network(backend="sdpa")

    @pytest.mark.parametrize("attn_type", [None, "FlashBais"])
    def test_attention_that_there_is_not(self, attn_type: str | None) -> None:
        with pytest.raises(ValueError, match=f"attn_type {attn_type!r} is not known"):
            network(attn_type=attn_type)
