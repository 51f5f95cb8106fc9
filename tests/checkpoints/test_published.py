"""Weights by name: downloaded once from a server, here one of this process, and checked; and those of the package."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NETWORK
from skimage.data import coffee
from skimage.metrics import peak_signal_noise_ratio

import esc_arch
from esc_arch import ESC, UserError
from esc_arch.checkpoints import published
from esc_arch.checkpoints.conversion import open_checkpoint
from esc_arch.checkpoints.published import INCLUDED, NamedWeights, find, named_weights, resolve
from esc_arch.cli import main
from esc_arch.data.photographs import VALIDATION
from esc_arch.ops.resize import matlab_resize, round_to_8bit

NAME = "ESC_tiny_X2"


class Server(ThreadingHTTPServer):
    """Sends `content` as any file, and how it was asked for it is in `requests`.

    Attributes:
        ranges: True if it can send parts.
        sent: bytes after which it ends the connection.
        status: what it answers in place of a file.
        length: what it says that the length is, if not that of what it sends.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.requests = b"", list[tuple[str, str | None]]()
        self.ranges, self.sent, self.status = True, 10**9, 200
        self.length: str | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.requests.append((self.path, asked))
        time.sleep(0.05)  # for others to come meanwhile
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        body = self.server.content[start:]
        self.send_response(416 if not body else 206 if start else self.server.status)
        self.send_header("Content-Length", self.server.length or str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.sent])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / f"{NAME}.pth"
    torch.save({"params": ESC(**{key: value for key, value in NETWORK.items() if key != "type"}).state_dict()}, path)
    return path


@pytest.fixture
def folder(work_folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads go; `NAME` is the only name besides those of the package."""
    place = work_folder.parent / "weights"
    monkeypatch.setenv("ESC_ARCH_WEIGHTS", str(place))
    count = sum(tensor.numel() for tensor in torch.load(tiny, weights_only=True)["params"].values())
    named = NamedWeights(NAME, "ESC", 2, "noise", count, hashlib.sha256(tiny.read_bytes()).hexdigest())
    use(monkeypatch, named)
    return place


@pytest.fixture
def server(folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        server.content = tiny.read_bytes()
        monkeypatch.setenv("ESC_ARCH_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/mirror/")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def use(monkeypatch: pytest.MonkeyPatch, named: NamedWeights) -> None:
    monkeypatch.setattr(published, "named_weights", lambda: {named.name: named})


def test_a_download(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("esc_TINY_x2.pth", NAME):  # the second finds it
        assert resolve(name) == folder / f"{NAME}.pth"
    assert (folder / f"{NAME}.pth").read_bytes() == server.content
    assert server.requests == [(f"/mirror/{NAME}.pth", None)]
    assert [path.name for path in folder.iterdir()] == [f"{NAME}.pth"]
    assert capsys.readouterr().err == (
        f"Downloading http://127.0.0.1:{server.server_port}/mirror/{NAME}.pth to {folder / NAME}.pth\n"
    )


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_after_a_cut(server: Server, folder: Path, ranges: bool) -> None:
    server.sent, server.ranges = 1000, ranges
    with pytest.raises(UserError, match=rf"^{NAME} cannot be downloaded \(it ended after 1,000 of .*continues"):
        resolve(NAME)
    assert [path.stat().st_size for path in folder.iterdir()] == [1000]
    server.sent = 10**9
    assert resolve(NAME).read_bytes() == server.content
    assert [asked for _, asked in server.requests] == [None, "bytes=1000-"]


def test_a_download_that_only_lacks_its_name(server: Server, folder: Path) -> None:
    folder.mkdir()
    (folder / f"{NAME}.pth.partial").write_bytes(server.content)
    assert resolve(NAME).read_bytes() == server.content
    assert [asked for _, asked in server.requests] == [f"bytes={len(server.content)}-"]


def test_a_length_that_is_no_number(server: Server) -> None:
    server.length = "many"
    with pytest.raises(UserError, match=rf"^{NAME} cannot be downloaded \(invalid literal .*'many'\)\. Get "):
        resolve(NAME)


def test_two_at_once(server: Server) -> None:
    threads = [threading.Thread(target=resolve, args=(NAME,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resolve(NAME).read_bytes() == server.content
    assert len(server.requests) == 1


def test_a_wrong_checksum(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, replace(published.named_weights()[NAME], sha256="0" * 64))
    with pytest.raises(UserError, match=rf"{NAME}\.pth is not {NAME}: its SHA-256 is \w+, not 0+\. It was removed\."):
        resolve(NAME)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"scale": 3}, r"its network is ESC x2 with [\d,]+ parameters, not ESC x3"),
        ({"type": "ESCFP"}, r"its network is ESC x2 with [\d,]+ parameters, not ESCFP x2"),
        ({"parameters": 7}, r"its network is ESC x2 with [\d,]+ parameters, not ESC x2 with 7 parameters"),
    ],
)
def test_another_network(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], found: str
) -> None:
    use(monkeypatch, replace(published.named_weights()[NAME], sha256=None, **changes))
    with pytest.raises(UserError, match=found):
        resolve(NAME)
    assert not list(folder.iterdir())


def test_a_web_page(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, replace(published.named_weights()[NAME], sha256=None))
    server.content = b"<!DOCTYPE html>Please log in"
    with pytest.raises(UserError, match="it is a web page"):
        resolve(NAME)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:{port}", "HTTP Error 404: Not Found"),
        ("http://127.0.0.1:1", r"\[Errno \d+\] Connection refused"),
        ("file:///no/such/folder", r"\[Errno 2\] No such file or directory.*"),
        ("mirror", "unknown url type: .*"),
    ],
)
def test_no_download(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, address: str, reason: str) -> None:
    server.status = 404
    address = address.format(port=server.server_port)
    monkeypatch.setenv("ESC_ARCH_WEIGHTS_URL", address)
    file = re.escape(str(folder / NAME))
    with pytest.raises(UserError, match=rf"\({reason}\)\. Get {address}/{NAME}\.pth .* save it as {file}\.pth, or set"):
        resolve(NAME)
    assert not (folder / f"{NAME}.pth").exists()


def test_a_mirror_in_a_folder(folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESC_ARCH_WEIGHTS_URL", tiny.parent.as_uri())
    assert resolve(NAME).read_bytes() == tiny.read_bytes()


def test_files_that_are_there(server: Server, folder: Path, tiny: Path, work_folder: Path) -> None:
    folder.mkdir()
    (folder / f"{NAME}.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=rf"{folder / NAME}\.pth is not {NAME}: its SHA-256 .* Remove it"):
        resolve(NAME)
    (folder / f"{NAME}.pth").write_bytes(tiny.read_bytes())
    assert resolve(NAME) == folder / f"{NAME}.pth"
    (folder / f"{NAME}.pth").unlink()
    (folder / f"{NAME}.pth").mkdir()
    with pytest.raises(UserError, match=rf"{NAME}: The checkpoint .* is a folder.* Remove it"):
        resolve(NAME)
    (work_folder / NAME).write_bytes(b"a file of the user's")
    assert resolve(NAME) == Path(NAME) and find(NAME) is None
    assert not server.requests


def test_the_address_of_the_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ESC_ARCH_WEIGHTS", "ESC_ARCH_WEIGHTS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    named = named_weights()["ESC_DFLIP_X4"]
    assert named.url == "https://github.com/dslisleedh/ESC/releases/download/1.0.0/ESC_DFLIP_X4.pth"
    assert named.path == tmp_path / "esc_arch" / "weights" / "ESC_DFLIP_X4.pth"


def test_other_names(work_folder: Path) -> None:
    for text in ("folder/ESC_DFLIP_X4", "mine.pth", "net_g_latest.safetensors"):
        assert resolve(text) == Path(text)
    for text, guess in (("ESC_DFLP_X4", "ESC_DFLIP_X4"), ("esc_real_x4_gna.pth", "ESC_Real_X4_GAN")):
        with pytest.raises(
            UserError, match=f"^{text} is neither a file .* Did you mean '{guess}'\\? Allowed: ESC_DFLIP"
        ):
            resolve(text)
    with pytest.raises(UserError, match=r"^mine is neither .* weights\. Allowed: ESC_DFLIP_X2, .*ESC_small_X4\.$"):
        resolve("mine")


@pytest.mark.parametrize("scale", INCLUDED)
def test_weights_of_the_package(scale: int) -> None:
    named = named_weights()[INCLUDED[scale]]
    assert named.path.stat().st_size <= 3_000_000
    assert published._why_wrong(named, named.path) is None
    assert open_checkpoint(named.path).assumptions == []
    assert "coffee" in VALIDATION
    large = torch.from_numpy(coffee()[100:196, 200:296].copy()).permute(2, 0, 1)[None] / 255
    size = (96 // scale, 96 // scale)
    small = round_to_8bit(matlab_resize(large, size))
    bicubic = round_to_8bit(matlab_resize(small, (96, 96)))
    result = round_to_8bit(esc_arch.load(named.name, device="cpu")(small).clamp(0, 1))
    scores = [peak_signal_noise_ratio(np.asarray(large), np.asarray(each), data_range=1) for each in (result, bicubic)]
    assert scores[0] > scores[1] + 0.3


def test_the_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESC_ARCH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("ESC_ARCH_WEIGHTS_URL", "http://127.0.0.1:1")
    (tmp_path / "ESC_light_X3.pth").write_bytes(b"")
    assert main(["weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == [*named_weights()]
    assert [line.split()[0] for line in lines if line.endswith(str(tmp_path / "ESC_light_X3.pth"))] == ["ESC_light_X3"]
    assert "https://github.com/dslisleedh/ESC/releases/tag/1.0.0" in lines[-1]


def test_option_files(server: Server, folder: Path, train_options: dict[str, Any], run_basicsr: Any) -> None:
    train_options["path"]["pretrain_network_g"] = NAME
    done = run_basicsr("check", train_options)
    assert (done.status, server.requests) == (0, [])
    assert f"path:pretrain_network_g: {NAME} will be downloaded from http://127.0.0.1" in done.out
    done = run_basicsr("check", train_options, "--force_yml", "scale=4", "network_g:upscaling_factor=4")
    assert f"path:pretrain_network_g: {NAME} is of scale 2, and network_g of 4. Give weights" in done.err + done.out
    done = run_basicsr("train", train_options)
    assert (done.status, len(server.requests)) == (0, 1)
    assert f"Loaded ESC from {folder / NAME}.pth" in done.log()
    train_options["path"]["pretrain_network_g"] = "ESC_tinny_X2"
    done = run_basicsr("check", train_options)
    assert done.status == 2 and f"Did you mean '{NAME}'?" in done.err
