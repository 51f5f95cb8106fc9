"""LMDBs are complete or not there, can be continued, and are what BasicSR reads."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from esc_arch.atomic_io import locked, write_atomically
from esc_arch.data import lmdb_writer
from esc_arch.data.lmdb_check import listed_sizes
from esc_arch.data.lmdb_writer import LmdbWriter, why_not_reusable
from esc_arch.errors import UserError

SETTINGS = {"crop size": 48, "digest": "abc", "lr": None}
SIZE = (6, 5)


def png(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


def content(path: Path) -> dict[str, bytes]:
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
        return {key.decode(): bytes(value) for key, value in transaction.cursor()}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each image is written at once."""
    monkeypatch.setattr(lmdb_writer, "WRITE_BYTES", 0)
    return tmp_path / "set.lmdb"


def write(path: Path, count: int = 3, settings: dict = SETTINGS) -> dict[str, bytes]:
    images = {f"image_{index}": png(index) for index in range(count)}
    with LmdbWriter(path, settings) as writer:
        for key, data in images.items():
            writer.write({key: data})
        writer.finish()
    return images


def test_contents_and_meta_info(path: Path) -> None:
    images = write(path)
    assert content(path) == images
    assert (path / "meta_info.txt").read_text() == "".join(f"image_{i}.png (6,5,3) 1\n" for i in range(3))
    assert listed_sizes(path) == dict.fromkeys(images, SIZE)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["set.lmdb"]


def test_meta_info_is_sorted_by_key(path: Path) -> None:
    with LmdbWriter(path, SETTINGS) as writer:
        writer.write({key: png(0) for key in ("b", "c", "a")})
        writer.finish()
    assert list(listed_sizes(path)) == ["a", "b", "c"]


def test_map_grows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_writer, "FREE_MAP_SIZE", 2**16)
    images = {f"k{seed}": png(seed, (100, 100)) for seed in range(8)}
    with LmdbWriter(path, SETTINGS) as writer:
        writer.write({key: images[key] for key in list(images)[:6]})  # several times the map
        writer.write({key: images[key] for key in list(images)[6:]})
        writer.finish()
    assert content(path) == images


def test_continues_with_what_was_written(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), LmdbWriter(path, SETTINGS) as writer:
        writer.write({"a": png(0)})
        raise ZeroDivisionError
    assert not path.exists()
    assert not writer.partial.name.endswith(".lmdb")
    with LmdbWriter(path, SETTINGS) as writer:
        assert writer.sizes == {"a": SIZE}
        writer.write({"a": png(0), "b": png(1, (7, 9))})
        writer.finish()
    assert content(path) == {"a": png(0), "b": png(1, (7, 9))}
    assert listed_sizes(path) == {"a": SIZE, "b": (7, 9)}


@pytest.mark.parametrize("damage", ["other settings", "no settings", "data"])
def test_begins_again(path: Path, damage: str) -> None:
    with LmdbWriter(path, SETTINGS) as writer:
        writer.write({"old": png(0)})
    if damage == "no settings":
        (writer.partial / "prepare.json").write_text('{"crop')
    if damage == "data":
        (writer.partial / "data.mdb").write_bytes(b"x" * 9000)
    with LmdbWriter(path, SETTINGS | {"crop size": 96} if damage == "other settings" else SETTINGS) as writer:
        assert writer.sizes == {}
        writer.write({"new": png(1)})
        writer.finish()
    assert content(path) == {"new": png(1)}


def test_former_lmdb_stays_until_the_new_one_is_complete(path: Path) -> None:
    old = write(path)
    with LmdbWriter(path, {"other": 1}) as writer:
        writer.write({"new": png(9)})
        assert content(path) == old
        writer.finish()
    assert content(path) == {"new": png(9)}
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["set.lmdb"]


@pytest.mark.parametrize(
    "error", [lmdb.DiskError("No space left"), lmdb.MapFullError("limit"), OSError(errno.ENOSPC, "No space left")]
)
def test_full_disk_is_the_users_error(path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class FullDisk:
        def __init__(self, environment: lmdb.Environment) -> None:
            self.info, self.stat, self.set_mapsize = environment.info, environment.stat, environment.set_mapsize
            self.close = environment.close

        def begin(self, **_: bool) -> None:
            raise error

    with LmdbWriter(path, SETTINGS) as writer:
        writer.write({"a": png(0)})
    with LmdbWriter(path, SETTINGS) as writer:
        monkeypatch.setattr(writer, "_env", FullDisk(writer._env))
        message = rf"Cannot write to {path.parent}: .*Free space there: [\d,]+ MiB.*continues"
        with pytest.raises(UserError, match=message):
            writer.write({"b": png(1)})
    assert not path.exists()
    with LmdbWriter(path, SETTINGS) as writer:
        assert writer.sizes.keys() == {"a"}


def test_a_real_limit_of_the_system(path: Path) -> None:
    """LMDB itself meets the error, here that of a file size limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    images = {str(number): png(number, (380, 350)) for number in range(4)}  # 400 kB each
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
        with LmdbWriter(path, SETTINGS) as writer, pytest.raises(UserError, match=f"Cannot write to {path.parent}: "):
            for key, data in images.items():
                writer.write({key: data})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()
    with LmdbWriter(path, SETTINGS) as writer:
        assert writer.sizes.keys() == {"0", "1"}
        writer.write({key: images[key] for key in ("2", "3")})
        writer.finish()
    assert content(path) == images


def test_why_not_reusable(path: Path) -> None:
    write(path)
    assert why_not_reusable(path, SETTINGS) is None
    assert (
        why_not_reusable(path, SETTINGS | {"crop size": 96})
        == "it was made with other settings: crop size was 48, is now 96"
    )
    (path / "meta_info.txt").unlink()
    assert why_not_reusable(path, SETTINGS) == "it has no meta_info.txt"
    (path / "data.mdb").unlink()
    assert why_not_reusable(path, SETTINGS) == "it has no data.mdb and no meta_info.txt"
    (path / "prepare.json").write_text("[]")
    assert why_not_reusable(path, SETTINGS) == "it was not made by this command"


def test_only_one_process_writes(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match=f"Another 'basicsr prepare' is writing to {tmp_path}"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        pass


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write to .*file/out: .*Free space there"):
        locked(tmp_path / "file" / "out").__enter__()


def test_write_atomically_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
