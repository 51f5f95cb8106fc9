"""Checkpoints that were damaged, or made to do harm: a network, or one message; nothing runs and nothing swells."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import INTERESTING, TEXTS, Tally, bounded, fuzz, mutate_tree, mutated
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors
from torch import Tensor

import esc_arch
from esc_arch import UserError
from esc_arch.checkpoints import reading, recognise
from esc_arch.checkpoints.conversion import CHECKPOINT_FORMATS, build_network, open_checkpoint, save_checkpoint

SMALL = {"dim": 8, "pdim": 4, "kernel_size": 3, "n_blocks": 1, "conv_blocks": 1, "window_size": 4, "num_heads": 2}
SECTIONS: list[dict[str, Any]] = [
    {"type": "ESC", **SMALL, "upscaling_factor": 2},
    {"type": "ESC", **SMALL, "upscaling_factor": 2, "attn_type": "FlashBias", "rank": 2},
    {"type": "ESCFP", **SMALL, "upscaling_factor": 3},
    {"type": "ESCReal", **SMALL, "upscaling_factor": 4, "use_dysample": True},
    {"type": "ESCRealM", **SMALL, "upscaling_factor": 2, "upsampler": "pixelshuffle", "mid_dim": 8},
    {"type": "ESCRIB", **SMALL, "upscaling_factor": 2, "rank": 2, "rib_hidden_dim": 4, "rib_n_freqs": 2},
    {"type": "ESCLTE", **SMALL, "hidden_dim": 8, "mlp_dims": [8]},
]


def weights_of(section: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in build_network(section).state_dict().items()}


WEIGHTS = [weights_of(section) for section in SECTIONS]


def stored(content: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES = {
    ".pth": [stored({"params": weights, "iter": 5}) for weights in WEIGHTS],
    ".pt": [stored({"params_ema": weights, "notes": ["a", {"b": 1.5}]}, zipped=False) for weights in WEIGHTS],
    ".safetensors": [
        save_safetensors(weights, {"format": "pt", "network_g": json.dumps(section), "param_key": "params"})
        for weights, section in zip(WEIGHTS, SECTIONS, strict=True)
    ],
}


def zipped_with(pickled: bytes) -> bytes:
    """A checkpoint of PyTorch's format around a pickle."""
    buffer = io.BytesIO(FILES[".pth"][0])
    result = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(result, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, pickled if entry.filename.endswith("data.pkl") else old.read(entry))
    return result.getvalue()


def safetensors_of(header: object, size: int | None = None, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def pickle_of(data: bytes) -> bytes:
    """What `zipped_with` puts into a checkpoint."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def parts_of(data: bytes) -> tuple[bytes, bytes]:
    """Header and tensors of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


#: Damage anywhere, which checksums find, and within what the formats say of the tensors, with checksums that are right.
DAMAGED = {
    ".pth": st.one_of(
        mutated(FILES[".pth"], most=2), mutated([pickle_of(FILES[".pth"][0])], most=3).map(lambda pkl: zipped_with(pkl))
    ),
    ".pt": mutated(FILES[".pt"], most=2),
    ".safetensors": st.one_of(
        mutated(FILES[".safetensors"], most=2),
        *(
            mutated([parts_of(data)[0]], most=3).map(
                lambda header, data=data: safetensors_of(header, data=parts_of(data)[1])
            )
            for data in FILES[".safetensors"]
        ),
    ),
}


def use(path: Path) -> None:
    """All that a file someone downloaded is put through: `esc_arch.load`, and `basicsr convert` to both formats."""
    esc_arch.load(path, device="cpu")
    checkpoint = open_checkpoint(path)
    for file_format in CHECKPOINT_FORMATS:
        save_checkpoint(checkpoint, path.with_name(f"converted.{file_format}"), file_format=file_format)


@pytest.mark.parametrize("suffix", DAMAGED)
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    tally, path = Tally(), tmp_path / f"net{suffix}"

    @fuzz(25, 1500)
    @given(DAMAGED[suffix])
    def run(data: bytes) -> None:
        path.write_bytes(data)
        with tally.example():
            use(path)

    run()
    tally.check(f"{suffix} files")


#: Not finite, none, of other types, sparse, without content, and of sizes that they do not have in the file.
ODD_TENSORS = [
    torch.empty(0),
    torch.tensor(1.0),
    torch.full((2, 3), float("nan")),
    torch.zeros(3, 3, dtype=torch.complex64),
    torch.zeros(4, 4, dtype=torch.bool),
    torch.zeros(4, 4, dtype=torch.int64),
    torch.zeros(4, 4).to(torch.float8_e4m3fn),
    torch.eye(3).to_sparse(),
    torch.eye(4).to_sparse_csr(),
    torch.zeros(2, 2, device="meta"),
    torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.qint8),
    torch.nn.Parameter(torch.zeros(2)),
    torch.zeros(1).expand(1 << 40),
    torch.zeros(1).expand(3, 1 << 20, 1 << 20, 3),
]


def nested(depth: int, width: int) -> Any:
    """Lists in lists, each the same one `width` times: `width ** depth` if written out."""
    value: Any = []
    for _ in range(depth):
        value = [value] * width
    return value


ODD_VALUES = [*ODD_TENSORS, *TEXTS, *INTERESTING, None, True, float("nan"), [], {}, (), {1: 2}, nested(60, 2), b"\xff"]


@st.composite
def changed_weights(draw: st.DrawFn) -> dict[Any, Any]:
    """The content of a checkpoint with entries left out, renamed, exchanged, reshaped, enlarged or put in."""
    weights: dict[Any, Any] = dict(draw(st.sampled_from(WEIGHTS)))
    content: dict[Any, Any] = {draw(st.sampled_from(("params", "params_ema", "model", "x"))): weights, "iter": 1}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(map(str, weights))))
        tensor = weights.get(name)
        kind = draw(st.sampled_from(("resize", "resize", "renumber", "type", "tree")))
        if kind == "tree" or not isinstance(tensor, Tensor):
            mutate_tree(draw, content, ODD_VALUES, most=2)
            break
        if kind == "type":
            weights[name] = draw(st.sampled_from(ODD_TENSORS))
        elif kind == "renumber":
            number = draw(st.sampled_from(("0", "1", "7", "999999999", "9" * 5000, "-1", "²", "٣")))
            weights[name.replace(".0.", f".{number}.", 1)] = weights.pop(name)
        elif tensor.dim() and not tensor.is_quantized:
            axis = draw(st.integers(0, tensor.dim() - 1))
            size = draw(st.sampled_from((0, 1, 2, 3, 5, 12, 49, 128, 65536)))
            shape = [*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]]
            weights[name] = torch.zeros(1, dtype=tensor.dtype).expand(shape)
        if not weights:
            break
    return content


def test_changed_weights(tmp_path: Path) -> None:
    tally, path = Tally(), tmp_path / "net.pth"

    @fuzz(80, 3000)
    @given(changed_weights(), st.booleans())
    def run(content: dict[Any, Any], zipped: bool) -> None:
        try:
            path.write_bytes(stored(content, zipped=zipped))
        except (RuntimeError, UnicodeError, NotImplementedError):
            return  # torch.save itself cannot write it (in the old format no sparse tensor, say): no file to be read
        with tally.example():
            use(path)

    run()
    tally.check("changed weights")


@pytest.mark.parametrize("shape", [(0,), (), (12, 0)])
def test_a_tail_that_is_empty_is_not_made_to_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(stored({"params": WEIGHTS[0] | {"to_img.bias": torch.zeros(shape)}}))
    with pytest.raises(UserError, match=r"net\.pth is almost ESC with .*: 1 of other shapes \(to_img.bias is \("):
        esc_arch.load(path, device="cpu")


def test_weights_that_were_read_already() -> None:
    """As spandrel hands them over."""
    tally = Tally()

    @fuzz(40, 3000)
    @given(changed_weights())
    def run(content: dict[Any, Any]) -> None:
        weights = next(iter(content.values()), None)
        if isinstance(weights, dict) and all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
        ):
            with tally.example():
                recognise(weights)

    run()
    tally.check("weights")


class Runs:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [bytes, zipped_with], ids=["bare", "zip"])
def test_nothing_runs(tmp_path: Path, protocol: int, wrap: Callable[[bytes], bytes]) -> None:
    mark, path = tmp_path / "mark", tmp_path / "net.pth"
    bad = pickle.dumps({"params": Runs(mark)}, protocol)
    tally = Tally()

    @fuzz(3, 100)
    @given(st.one_of(st.just(bad), mutated([bad], most=2)))
    def run(data: bytes) -> None:
        path.write_bytes(wrap(data))
        with tally.example():
            use(path)

    run()
    assert tally.counts["refused"] > 0
    assert not mark.exists()


def entry_of(dtype: str, shape: list[int], ends: list[int]) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": ends}}


def bomb() -> bytes:
    """A checkpoint with a record of 64 MB of zeros, compressed to 300 KB."""
    buffer = io.BytesIO(FILES[".pth"][0])
    result = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for entry in old.infolist():
            if entry.filename.endswith("data/0"):
                new.writestr(entry.filename, bytes(64 << 20))
            else:
                new.writestr(entry.filename, old.read(entry))
    return result.getvalue()


def enlarged() -> bytes:
    """A network of 51 GB, each tensor of it one number that is repeated."""
    with torch.device("meta"):
        large = build_network({**SECTIONS[0], "dim": 1 << 16, "pdim": 16})
    return stored({"params": {n: torch.zeros(1).expand(t.shape) for n, t in large.state_dict().items()}})


LIARS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "safetensors: length of the header": (
        ".safetensors",
        lambda: safetensors_of({}, 2**63),
        "damaged or was cut short",
    ),
    "safetensors: a long header": (".safetensors", lambda: safetensors_of({}, 99_000_000), "damaged or was cut short"),
    "safetensors: a tensor": (
        ".safetensors",
        lambda: safetensors_of(entry_of("F32", [1 << 40], [0, 1 << 42])),
        "damaged or was cut short",
    ),
    "safetensors: overflow": (
        ".safetensors",
        lambda: safetensors_of(entry_of("F32", [1 << 62, 1 << 62], [0, 64])),
        "damaged or was cut short",
    ),
    "safetensors: unknown type": (
        ".safetensors",
        lambda: safetensors_of(entry_of("F99", [16], [0, 64])),
        "damaged or was cut short",
    ),
    "safetensors: nesting": (".safetensors", lambda: safetensors_of(b"[" * 100_000), "damaged or was cut short"),
    "zip: compressed zeros": (".pth", bomb, "would take"),
    "a tensor larger than the file": (".pth", enlarged, "would take"),
}


@pytest.mark.parametrize("name", LIARS)
def test_files_that_lie_about_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    suffix, make, message = LIARS[name]
    monkeypatch.setattr(reading, "LARGEST_GROWTH", 1 << 24)  # writing gigabytes would take its time
    path = tmp_path / f"net{suffix}"
    path.write_bytes(make())
    with bounded(), pytest.raises(UserError, match=message) as error:
        use(path)
    assert path.name in str(error.value)
