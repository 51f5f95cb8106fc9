"""Which network weights are of: every kind there is, every choice that shapes leave, and what is said otherwise."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from esc_arch import UserError, archs
from esc_arch.checkpoints import load_weights, mismatch_message, recognise
from esc_arch.checkpoints.recognition import examine, own_names

FOLDER = Path(__file__).parents[1] / "golden"
MANIFEST: dict[str, dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
SMALL: dict[str, Any] = {
    "dim": 8,
    "pdim": 4,
    "kernel_size": 5,
    "n_blocks": 2,
    "conv_blocks": 1,
    "window_size": 4,
    "num_heads": 2,
    "upscaling_factor": 4,
}
META = "to_img.MetaUpsample"


def network(section: dict[str, Any], device: str = "meta") -> nn.Module:
    with torch.device(device):
        return getattr(archs, section["type"])(**{key: value for key, value in section.items() if key != "type"})


def small(kind: str = "ESC", device: str = "meta", **changes: Any) -> nn.Module:
    return network({"type": kind, **SMALL, **changes}, device)


def real_m(**changes: Any) -> dict[str, Tensor]:
    """Weights with a readable description of the tail."""
    return dict(small("ESCRealM", device="cpu", **changes).state_dict())


def tail_of_another_toolbox(kind: str, dim: int, mid: int) -> dict[str, Tensor]:
    """Some weights of tails that traiNNer-redux has besides, x2, with its description."""
    layers = {
        "lda": {
            **({"0": (mid, dim, 3, 3), "2.proj_q": (mid // 4, mid, 1, 1)} if mid != dim else {}),
            **({"0.proj_q": (mid // 4, mid, 1, 1), "1": (3, mid, 3, 3)} if mid == dim else {"3": (3, mid, 3, 3)}),
        },
        "pa_up": {"1": (mid, dim, 3, 3), "2.conv.0": (mid, mid, 1, 1), "4": (mid, mid, 3, 3), "6": (3, mid, 3, 3)},
    }[kind]
    numbers = [3, {"lda": 6, "pa_up": 7}[kind], 2, dim, 3, mid, 4]
    description = {META: torch.tensor(numbers, dtype=torch.uint8)}
    return {f"to_img.{name}.weight": torch.zeros(shape) for name, shape in layers.items()} | description


@pytest.mark.parametrize("name", MANIFEST)
def test_recorded_networks(name: str) -> None:
    """Of every recorded network: type and options, and the network they make gives the recorded output."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    options = MANIFEST[name]["options"]
    # All that weights do not say: see the documentation of `recognise`
    unsaid = {"window_size": 64} if options.get("attn_type") == "RIB" else {}
    unsaid |= {"unshuffle_mod": True} if options.get("upscaling_factor", 2) > 2 and "unshuffle_mod" in options else {}
    alone = recognise(weights)
    assert alone["type"] == MANIFEST[name]["type"]
    assert {key: alone[key] for key in options} == options | unsaid

    section = recognise(weights, known=options)
    assert {key: section[key] for key in options} == options
    net = network(section, "cpu").eval()
    net.load_state_dict(own_names(weights), strict=True)
    asked, output = ({"scale": 2.5}, "output.x2.5") if section["type"] == "ESCLTE" else ({}, "output")
    with torch.no_grad():
        assert torch.allclose(net(tensors["input"], **asked), tensors[output], rtol=0, atol=1e-4)


PUBLISHED = [
    ({"type": "ESC"}, 967_500),
    ({"type": "ESC", "n_blocks": 3, "upscaling_factor": 3}, 612_255),
    (
        {
            "type": "ESC",
            "dim": 192,
            "pdim": 48,
            "n_blocks": 8,
            "window_size": 48,
            "num_heads": 12,
            "use_ln": True,
            "upscaling_factor": 2,
        },
        12_455_916,
    ),
    ({"type": "ESCFP"}, 539_263),
    ({"type": "ESCReal"}, 2_265_307),
    ({"type": "ESCRIB", "gate_type": "DWC", "upscaling_factor": 2}, 1_007_796),
]


@pytest.mark.parametrize(("section", "parameters"), PUBLISHED)
def test_published_networks(section: dict[str, Any], parameters: int) -> None:
    net = network(section)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    recognised = recognise(net.state_dict())
    parameters = list(inspect.signature(getattr(archs, section["type"])).parameters.values())
    defaults = {parameter.name: parameter.default for parameter in parameters}
    assert recognised == {key: defaults.get(key) for key in recognised} | section
    # Nothing is left to a default but how attention is computed, and what this kind of attention does not have
    attention_options = {"backend", "rank", "flashbias_rank", "rib_hidden_dim", "rib_n_freqs", "upsampler_type"}
    assert defaults.keys() - recognised.keys() <= attention_options - (
        {"rank"} if section["type"] == "ESCRIB" else set()
    )


@pytest.mark.parametrize("kind", ["ESC", "ESCFP", "ESCReal", "ESCRealM", "ESCRIB"])
def test_factors_are_told_from_tables(kind: str) -> None:
    rank = "rank" if kind == "ESCRIB" else "flashbias_rank"
    weights = small(kind, attn_type="FlashBias", **{rank: 3}, window_size=6).state_dict()
    section = recognise(weights)
    assert {key: section[key] for key in ("type", "attn_type", rank, "window_size", "num_heads")} == {
        "type": kind,
        "attn_type": "FlashBias",
        rank: 3,
        "window_size": 6,
        "num_heads": 2,
    }
    assert not {"rank", "flashbias_rank"} - {rank} & section.keys()
    assert network(section).state_dict().keys() == weights.keys()
    if kind != "ESCRIB":
        section = recognise(small(kind).state_dict())
        assert section["attn_type"] == "auto"
        assert not {"rank", "flashbias_rank"} & section.keys()


def test_rib_and_its_siren_are_told_apart() -> None:
    """By the features that the coordinates have: a siren has none but the two coordinates."""
    for attn_type, expected in (("RIB", {"rib_n_freqs": 10}), ("RIBSiren", {})):
        weights = small("ESCRIB", attn_type=attn_type, rib_hidden_dim=6, use_ln=True).state_dict()
        section = recognise(weights)
        assert {key: value for key, value in section.items() if key in ("attn_type", "rib_n_freqs", "use_ln")} == {
            "attn_type": attn_type,
            "use_ln": True,
            **expected,
        }
        assert network(section).state_dict().keys() == weights.keys()


@pytest.mark.parametrize("ratio", [1.25, 2, 1.3, 0.57, 0.575, 1.1, 3, 2.718281828])
@pytest.mark.parametrize("dim", [8, 48, 100])
def test_exp_ratio(dim: int, ratio: float) -> None:
    """A ratio that gives the very width; the one that was given, where it is published or has few digits."""
    net = small(dim=dim, exp_ratio=ratio)
    found = recognise(net.state_dict())["exp_ratio"]
    assert network(recognise(net.state_dict())).blocks[0].convffns[0].proj.weight.shape[0] == int(dim * ratio)
    if ratio in (1.25, 2, 3) or (dim == 100 and ratio in (1.3, 1.1)):
        assert found == ratio
    assert recognise(net.state_dict(), known={"exp_ratio": ratio})["exp_ratio"] == ratio
    assert recognise(net.state_dict(), known={"exp_ratio": 9, "dim": 1})["exp_ratio"] == found  # weights decide


def test_without_pairs_of_convffn_and_conv_attn() -> None:
    section = recognise(small(conv_blocks=0, n_blocks=1).state_dict())
    assert (section["conv_blocks"], section["exp_ratio"], section["use_ln"]) == (0, 1.25, False)


class TestTailsOfESCRealM:
    @pytest.mark.parametrize("described", [True, False])
    @pytest.mark.parametrize("scale", [1, 2, 3, 4])
    @pytest.mark.parametrize(
        "upsampler", ["pixelshuffledirect", "pixelshuffle", "nearest+conv", "dysample", "transpose+conv"]
    )
    def test_each(self, upsampler: str, scale: int, described: bool) -> None:
        weights = real_m(upsampler=upsampler, upscaling_factor=scale, mid_dim=12)
        if not described:
            del weights[META]
        section = recognise(weights)
        uses_mid_dim = upsampler in ("pixelshuffle", "dysample")
        assert (section["upsampler"], section["upscaling_factor"], section["unshuffle_mod"], section["mid_dim"]) == (
            upsampler,
            scale,
            True,
            12 if described or uses_mid_dim else 48,
        )

    @pytest.mark.parametrize(
        "buffer", [[2, 0, 1, 8, 3, 12, 4], [9, 99, 9, 9, 9, 9, 9], [3, 7, 4, 8, 3, 12, 4], [1, 2, 3]]
    )
    def test_weights_decide_against_the_description(self, buffer: list[int]) -> None:
        weights = real_m(upsampler="dysample", upscaling_factor=3, mid_dim=4)
        weights[META] = torch.tensor(buffer, dtype=torch.uint8)
        section = recognise(weights)
        assert (section["upsampler"], section["upscaling_factor"], section["mid_dim"]) == ("dysample", 3, 4)

    @pytest.mark.parametrize(
        ("upsampler", "scale", "mid_dim", "assumed"),
        [
            ("nearest+conv", 2, 48, "nearest+conv of x3 has the same shapes as nearest+conv of x2"),
        ],
    )
    def test_where_shapes_leave_a_choice(self, upsampler: str, scale: int, mid_dim: int, assumed: str) -> None:
        options = {"upsampler": upsampler, "upscaling_factor": scale, "mid_dim": mid_dim, "unshuffle_mod": False}
        weights = real_m(**options)
        described = examine(weights)
        assert options.items() <= described[0].items()
        assert described[1] == []
        del weights[META]
        alone = examine(weights)
        assert alone[1] == [assumed + "."]
        assert (alone[0]["upsampler"], alone[0]["upscaling_factor"]) != (upsampler, scale)
        known = examine(weights, known=options)
        assert options.items() <= known[0].items()
        assert known[1] == []

    @pytest.mark.parametrize("upsampler", ["conv", "pixelshuffledirect", "pixelshuffle", "nearest+conv", "dysample"])
    def test_scale_1_without_unshuffle_is_one_convolution(self, upsampler: str) -> None:
        weights = real_m(upsampler=upsampler, upscaling_factor=1, unshuffle_mod=False)
        assert {name for name in weights if name.startswith("to_img.")} == {META, "to_img.0.weight", "to_img.0.bias"}
        assert weights["to_img.0.weight"].shape == (3, 8, 3, 3)
        examined = examine(weights)
        assert (examined[0]["upsampler"], examined[0]["upscaling_factor"]) == ("conv", 1)
        assert examined[1] == []

    @pytest.mark.parametrize("scale", [2, 3, 4])
    def test_transposed_convolutions_without_folding(self, scale: int) -> None:
        options = {"upsampler": "transpose+conv", "upscaling_factor": scale, "unshuffle_mod": False}
        weights = real_m(**options)
        assert weights[META].tolist() == [3, 5, scale, 8, 3, 48, 4]
        recognised = examine(weights, known={"unshuffle_mod": False})
        assert options.items() <= recognised[0].items()
        assert recognised[1] == []

    @pytest.mark.parametrize("narrowed", [True, False])
    @pytest.mark.parametrize("kind", ["lda", "pa_up"])
    def test_of_another_toolbox(self, kind: str, narrowed: bool) -> None:
        weights = {name: tensor for name, tensor in real_m().items() if not name.startswith("to_img.")}
        message = (
            r"its tail \(to_img\..* is none of conv, .* Other upsamplers of traiNNer-redux, such as lda and pa_up, are"
        )
        with pytest.raises(UserError, match=message):
            recognise(weights | tail_of_another_toolbox(kind, 8, 6 if narrowed else 8))

    def test_with_another_convolution(self) -> None:
        weights = real_m(upsampler="dysample", mid_dim=8)
        weights["to_img.0.end_conv.weight"] = torch.zeros(3, 8, 3, 3)
        with pytest.raises(
            UserError, match=r"its tail \(.*to_img\.0\.end_conv.* is none of conv, .*transpose\+conv for 8"
        ):
            recognise(weights)

    def test_without_narrowing(self) -> None:
        section = recognise(small("ESCRealM", upsampler="dysample", mid_dim=8).state_dict())
        assert (section["upsampler"], section["mid_dim"]) == ("dysample", 8)

    def test_a_width_too_large_for_the_description(self) -> None:
        section = recognise(real_m(upsampler="nearest+conv", mid_dim=300))
        assert section["mid_dim"] == 48


def test_dysample_of_escreal_has_any_scale() -> None:
    section = recognise(small("ESCReal", use_dysample=True, upscaling_factor=5).state_dict())
    assert (section["type"], section["use_dysample"], section["upscaling_factor"]) == ("ESCReal", True, 5)


def test_window_of_rib_is_assumed_unless_known() -> None:
    weights = small("ESCRIB").state_dict()
    assumed = examine(weights)
    assert assumed[0]["window_size"] == 64
    assert len(assumed[1]) == 1
    assert "do not depend on window_size: 64 is that of the published model" in assumed[1][0]
    known = examine(weights, known={"window_size": 4})
    assert (known[0]["window_size"], known[1]) == (4, [])
    assert examine(weights, known={"window_size": "wide"}) == assumed


@pytest.mark.parametrize(
    "known",
    [
        {"exp_ratio": float("inf"), "mid_dim": -3},
        {"exp_ratio": float("nan"), "mid_dim": "x"},
        {"exp_ratio": [], "mid_dim": None, "upsampler": {}, "upscaling_factor": "4", "type": 3},
    ],
)
def test_nonsense_known_from_elsewhere_changes_nothing(known: dict[str, Any]) -> None:
    weights = small("ESCRealM").state_dict()
    assert recognise(weights, known) == recognise(weights)


@pytest.mark.parametrize("prefix", ["net_g.", "model.", "generator.", "model.net_g."])
def test_a_prefix_of_all_names_is_no_obstacle(prefix: str) -> None:
    net = small()
    weights = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    assert recognise(weights) == recognise(net.state_dict())


def changed(kind: str = "ESC", **tensors: tuple[int, ...] | None) -> dict[str, Tensor]:
    """Weights with other shapes for some (two underscores for a point), or without them."""
    weights = dict(small(kind).state_dict())
    for name, shape in tensors.items():
        name = name.replace("__", ".")
        del weights[name]
        if shape is not None:
            weights[name] = torch.empty(shape, device="meta")
    return weights


REFUSED: list[tuple[dict[str, Tensor], str]] = [
    ({}, r"not the weights of an ESC network .* those of none of .*ESC, ESCFP, ESCLTE, .* They hold nothing\."),
    (
        {f"body.{i}.weight": torch.empty(1) for i in range(20)} | {"conv.bias": torch.empty(1)},
        r"not the weights of an ESC network .* They hold body\.0\.w.* and 13 more",
    ),
    (changed(plk_filter=None), r"nearly those of an ESC network, but plk_filter is missing\."),
    (
        changed(to_img__weight=(13, 8, 3, 3)),
        r"nearly .* to_img\.weight is \(13, 8, 3, 3\), which is not 3 colours times a square of sub-pixels\.",
    ),
    (changed(plk_filter=()), r"nearly .* plk_filter is \(\), of too few dimensions\."),
    (
        changed(blocks__0__attn__relative_position_bias=(2, 64)),
        r"relative_position_bias is \(2, 64\), which is not \(heads, \(2 window - 1\)\^2\)\.",
    ),
    (
        changed(blocks__0__attn__relative_position_bias=(2, 50)),
        r"relative_position_bias is \(2, 50\), which is not \(heads, \(2 window - 1\)\^2\)\.",
    ),
    (
        changed(blocks__0__attn__relative_position_bias=None),
        r"nearly .* but blocks\.0\.attn\.relative_position_bias is missing\.",
    ),
    (
        changed("ESCRealM", to_img__0__weight=(47, 8, 3, 3)),
        r"nearly those of an ESCRealM, but its tail \(.*to_img\.0\.weight\) is none of conv, .*transpose\+conv for 8",
    ),
]


@pytest.mark.parametrize(("weights", "message"), REFUSED)
def test_what_is_no_network_of_the_family(weights: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recognise(weights)


def test_unshuffling_by_a_number_that_is_none() -> None:
    weights = dict(small("ESCRealM", upscaling_factor=2).state_dict())
    weights["proj.1.weight"] = torch.empty(8, 27, 3, 3, device="meta")
    with pytest.raises(UserError, match=r"proj\.1\.weight is \(8, 27, 3, 3\), which is not .* square of 2 or 4 pixels"):
        recognise(weights)


DIFFERENCES = [
    (("ESC", {"n_blocks": 1}), ("ESC", {}), "the checkpoint is ESC with n_blocks: 1, the network ESC with n_blocks: 2"),
    (
        ("ESCRealM", {"upscaling_factor": 3}),
        ("ESCRealM", {}),
        "the checkpoint is ESCRealM with upscaling_factor: 3, the network ESCRealM with upscaling_factor: 4",
    ),
    (
        ("ESCRealM", {"upsampler": "pixelshuffle", "mid_dim": 4}),
        ("ESCRealM", {"upsampler": "nearest+conv"}),
        "the checkpoint is ESCRealM with upsampler: pixelshuffle, mid_dim: 4, "
        "the network ESCRealM with upsampler: nearest+conv, mid_dim: 48",
    ),
    (
        ("ESC", {"attn_type": "FlashBias", "rank": 3}),
        ("ESC", {}),
        "the checkpoint is ESC with attn_type: FlashBias, flashbias_rank: 3, the network ESC with attn_type: auto;",
    ),
    (
        ("ESCFP", {"exp_ratio": 2}),
        ("ESC", {}),
        "the checkpoint is ESCFP with exp_ratio: 2, the network ESC with exp_ratio: 1.25",
    ),
    (("ESCReal", {"exp_ratio": 1.25}), ("ESC", {}), "the checkpoint is ESCReal, the network ESC;"),
    (
        ("ESCLTE", {"normalize": True}),
        ("ESCLTE", {}),
        "the checkpoint is ESCLTE with normalize: True, the network ESCLTE with normalize: False; "
        "1 not in the network (image_mean_std)",
    ),
    (
        ("ESCLTE", {}),
        ("ESCLTE", {"normalize": True}),
        "the checkpoint is ESCLTE with normalize: False, the network ESCLTE with normalize: True; "
        "1 missing in it (image_mean_std)",
    ),
]


@pytest.mark.parametrize(("checkpoint", "wanted", "message"), DIFFERENCES)
def test_another_network_than_the_one_to_load_into(
    checkpoint: tuple[str, dict[str, Any]], wanted: tuple[str, dict[str, Any]], message: str
) -> None:
    weights = small(checkpoint[0], device="cpu", **checkpoint[1]).state_dict()
    net = small(wanted[0], device="cpu", **wanted[1])
    with pytest.raises(UserError) as caught:
        load_weights(net, weights, strict=True, source="net.pth")
    text = str(caught.value)
    assert text.startswith(f"net.pth does not fit {wanted[0]}: {message}")
    assert any(what in text for what in ("missing in it", "not in the network", "of other shapes"))
    # The same is found before anything is built in memory
    assert mismatch_message(small(wanted[0], **wanted[1]), weights, strict=True, source="net.pth") == text


def test_nothing_is_said_of_options_where_they_are_the_same() -> None:
    net = small()
    weights = dict(net.state_dict())
    del weights["last.bias"]
    message = mismatch_message(net, weights, strict=True, source="net.pth")
    assert message is not None
    assert message.startswith("net.pth does not fit ESC: 1 missing in it (last.bias). Make network_g")


def test_nothing_is_said_of_options_of_other_networks() -> None:
    message = mismatch_message(nn.Linear(2, 2), small().state_dict(), strict=True, source="net.pth")
    assert message is not None
    assert message.startswith("Nothing in net.pth fits Linear, so it would stay untrained: 2 missing in it")


def test_loading_drops_a_prefix_when_nothing_fits_with_it() -> None:
    net = small(device="cpu")
    weights = {f"net_g.{name}": torch.full_like(tensor, 0.5) for name, tensor in net.state_dict().items()}
    load_weights(net, weights, strict=True, source="net.pth")
    assert all(bool((tensor == 0.5).all()) for tensor in net.state_dict().values())
    assert all(name.startswith("net_g.") for name in weights)


def test_loading_keeps_a_prefix_that_is_the_network_s_own() -> None:
    """Here the weights of a part, without its name, would fit the whole."""
    net = nn.Linear(2, 2)
    net.part = nn.Linear(2, 2)
    load_weights(net, {"part.weight": torch.full((2, 2), 5.0)}, strict=False, source="net.pth")
    assert bool((net.part.weight == 5).all())
    assert not bool((net.weight == 5).any())


@pytest.mark.parametrize("buffer", [None, torch.zeros(7, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)])
def test_the_description_of_a_tail_may_be_absent_or_wrong(buffer: Tensor | None) -> None:
    net = small("ESCRealM", device="cpu")
    description = net.state_dict()[META].clone()
    weights = dict(net.state_dict())
    weights.pop(META)
    if buffer is not None:
        weights[META] = buffer
    load_weights(net, weights, strict=True, source="net.pth")
    assert torch.equal(net.state_dict()[META], description)


def test_the_description_of_a_tail_does_not_make_other_weights_fit() -> None:
    with pytest.raises(UserError, match=r"Nothing in net\.pth fits ESCRealM"):
        load_weights(small("ESCRealM", device="cpu"), {"x.weight": torch.ones(1)}, strict=False, source="net.pth")


@pytest.mark.parametrize("mlp_dims", [[], [12], [12, 20]])
@pytest.mark.parametrize(("use_ln", "normalize"), [(False, False), (True, False), (False, True)])
def test_arbitrary_scale(mlp_dims: list[int], use_ln: bool, normalize: bool) -> None:
    body = {"dim": 8, "pdim": 4, "kernel_size": 13, "n_blocks": 2, "conv_blocks": 1, "window_size": 8, "num_heads": 2}
    options: dict[str, Any] = body | {"exp_ratio": 1.25, "use_ln": use_ln, "hidden_dim": 10, "mlp_dims": mlp_dims}
    options |= {"normalize": normalize}
    net = archs.ESCLTE(**options)
    section = recognise(net.state_dict())
    assert section == {"type": "ESCLTE", **options, "upscaling_factor": 4, "attn_type": "auto"}
    assert recognise(net.state_dict(), {"upscaling_factor": 2.5})["upscaling_factor"] == 2.5
    network(section).load_state_dict(net.state_dict())
