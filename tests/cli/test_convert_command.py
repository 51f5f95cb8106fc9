"""`basicsr convert`: what it prints, what it writes, and what it says when it cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from esc_arch import ESC
from esc_arch.archs import ESCFP, ESCRIB
from esc_arch.checkpoints import read_checkpoint
from esc_arch.cli import main

SMALL: dict[str, Any] = {
    "dim": 8,
    "pdim": 4,
    "kernel_size": 5,
    "n_blocks": 1,
    "conv_blocks": 1,
    "window_size": 4,
    "num_heads": 2,
    "upscaling_factor": 2,
}
SECTION = {"type": "ESC", **SMALL, "exp_ratio": 1.25, "use_ln": False, "attn_type": "auto"}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A checkpoint `net.pth` in the current folder; returns the weights that are to be chosen."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    weights = ESC(**SMALL).state_dict()
    torch.save({"params": ESC(**SMALL).state_dict(), "params_ema": weights, "iter": 500}, "net.pth")
    return weights


def convert(capsys: pytest.CaptureFixture[str], *arguments: str, refused: bool = False) -> str:
    """What is printed; a refusal is one line, and prints nothing else."""
    status = main(["convert", *arguments])
    printed = capsys.readouterr()
    assert status == (2 if refused else 0), printed.err
    if not refused:
        assert printed.err == ""
        return printed.out
    assert printed.err.startswith("basicsr convert: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.usefixtures("source")
def test_description(capsys: pytest.CaptureFixture[str]) -> None:
    printed = convert(capsys, "net.pth")
    assert yaml.safe_load(printed) == {"network_g": SECTION}
    order = re.findall(r"^  (\w+):", printed, re.MULTILINE)
    assert order[:9] == ["type", *SMALL]
    parameters = sum(parameter.numel() for parameter in ESC(**SMALL).parameters())
    assert f"# net.pth: weights under params_ema, {parameters:,} parameters, float32\n" in printed
    assert "# Other values: iter: 500\n# Left out: params (--param-key K takes other weights)\n" in printed
    assert "# Large kernel: free (not folded)\n" in printed
    assert "# neosr and traiNNer-redux call upscaling_factor `scale`.\n" in printed
    assert [path.name for path in Path().iterdir()] == ["net.pth"]


def test_what_a_file_says_cannot_break_out_of_its_comment(
    source: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"params": source, "note": "a\nb: " + "c" * 99, "evil\nkey": 1, "other\n\x1b[2J": {1, 2}}, "net.pth")
    printed = convert(capsys, "net.pth")
    assert yaml.safe_load(printed) == {"network_g": SECTION}
    assert "# Other values: note: a b: [...], evil\\nkey: 1\n# Left out: other\\n\\x1b[2J (--param" in printed


@pytest.mark.usefixtures("source")
def test_the_section_makes_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    section = yaml.safe_load(convert(capsys, "net.pth"))["network_g"]
    assert section.pop("type") == "ESC"
    ESC(**section).load_state_dict(read_checkpoint("net.pth")["params_ema"], strict=True)


def test_there_and_back(source: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    printed = convert(capsys, "net.pth", "-o", "net.safetensors")
    size = Path("net.safetensors").stat().st_size
    assert f"# Wrote net.safetensors ({size:,} bytes)\n" in printed
    convert(capsys, "net.safetensors", "-o", "back.pt", "--to", "pth")
    back = read_checkpoint("back.pt")
    assert (back["iter"], back["network_g"]) == (500, SECTION)
    assert all(torch.equal(back["params_ema"][name], tensor) for name, tensor in source.items())


def test_other_weights(source: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    printed = convert(capsys, "net.pth", "--param-key", "params", "-o", "raw.pth")
    assert "weights under params, " in printed
    assert "# Left out: params_ema" in printed
    assert not torch.equal(read_checkpoint("raw.pth")["params"]["last.weight"], source["last.weight"])


@pytest.mark.usefixtures("source")
def test_folding(capsys: pytest.CaptureFixture[str]) -> None:
    assert "# The large kernel was folded.\n" in convert(capsys, "net.pth", "--fold", "-o", "folded.safetensors")
    printed = convert(capsys, "folded.safetensors")
    assert "# Other values: iter: 500, folded: True\n" in printed
    assert "# Large kernel: folded\n" in printed


@pytest.mark.usefixtures("source")
def test_factors(capsys: pytest.CaptureFixture[str]) -> None:
    printed = convert(capsys, "net.pth", "--flashbias-rank", "16", "-o", "factors.pth")
    assert "# Bias tables replaced by factors of rank 16:\n#   layer          max error  energy kept\n" in printed
    assert re.search(r"^#   blocks\.0\.attn +\d\.\d\de-\d+ +100\.0000%$", printed, re.MULTILINE)
    output = re.search(r"^# Output on a photograph: max difference (\S+) \(of 0 .. 1\), PSNR (\S+) dB$", printed, re.M)
    assert output is not None
    assert float(output[1]) < 1e-5
    assert float(output[2]) > 100
    section = SECTION | {"attn_type": "FlashBias", "flashbias_rank": 16}
    assert yaml.safe_load(printed) == {"network_g": section}
    assert yaml.safe_load(convert(capsys, "factors.pth")) == {"network_g": section}


@pytest.mark.usefixtures("source")
def test_errors_of_a_rank_without_writing(capsys: pytest.CaptureFixture[str]) -> None:
    printed = convert(capsys, "net.pth", "--flashbias-rank", "2")
    kept = re.search(r"blocks\.0\.attn.* (\S+)%", printed)
    assert kept is not None
    assert 0 < float(kept[1]) < 90
    assert [path.name for path in Path().iterdir()] == ["net.pth"]


def test_window_of_rib(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(ESCRIB(**SMALL).state_dict(), tmp_path / "rib.pth")
    printed = convert(capsys, str(tmp_path / "rib.pth"))
    assert "bare weights, " in printed
    assert (
        "# Assumed: RIB's weights do not depend on window_size: 64 is that of the published model; `basicsr" in printed
    )
    assert yaml.safe_load(printed)["network_g"]["window_size"] == 64
    assert yaml.safe_load(printed)["network_g"]["gate_type"] is None
    printed = convert(capsys, str(tmp_path / "rib.pth"), "--window", "4")
    assert "Assumed" not in printed
    assert yaml.safe_load(printed)["network_g"]["window_size"] == 4


def test_no_kernel_to_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(ESCFP(**SMALL).state_dict(), tmp_path / "fp.pth")
    assert "Large kernel" not in convert(capsys, str(tmp_path / "fp.pth"))
    message = convert(capsys, str(tmp_path / "fp.pth"), "--fold", "-o", str(tmp_path / "x.pth"), refused=True)
    assert "ESCFP has no large kernel to fold" in message


@pytest.mark.usefixtures("source")
def test_nothing_is_replaced_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("net.pth").read_bytes()
    message = convert(capsys, "net.pth", "--fold", "-o", "net.pth", refused=True)
    assert "net.pth already exists. Choose another name, or replace it with --overwrite." in message
    assert Path("net.pth").read_bytes() == before
    convert(capsys, "net.pth", "--fold", "-o", "net.pth", "--overwrite")
    assert read_checkpoint("net.pth")["folded"] is True


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth"], "The checkpoint nowhere.pth does not exist"),
        (["net.pth", "--fold"], "--to, --fold and --overwrite need an output file: give -o OUTPUT."),
        (["net.pth", "--to", "pth"], "--to, --fold and --overwrite need an output file: give -o OUTPUT."),
        (["net.pth", "--overwrite"], "--to, --fold and --overwrite need an output file: give -o OUTPUT."),
        (
            ["net.pth", "-o", "net.ckpt"],
            "net.ckpt: end the name in .pth or .safetensors, or in another suffix with --to pth.",
        ),
        (
            ["net.pth", "-o", "x.safetensors", "--to", "pth"],
            "x.safetensors: end the name in .pth or .safetensors",
        ),
        (
            ["net.pth", "-o", "x.pth", "--to", "safetensors"],
            "x.pth: end the name in .pth or .safetensors",
        ),
        (["net.pth", "-o", "no/x.pth"], "Cannot write no/x.pth: it must be a file in an existing folder."),
        (["net.pth", "-o", ".", "--overwrite"], "Cannot write .: it must be a file in an existing folder."),
        (["net.pth", "--param-key", "ema"], "holds no weights under 'ema'; it has weights under params, params_ema."),
        (["net.pth", "--window", "8"], "The weights of net.pth have window 4"),
        (["net.pth", "--flashbias-rank", "17"], "The rank is 17"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in convert(capsys, *arguments, refused=True)
    assert [path.name for path in Path().iterdir()] == ["net.pth"]
