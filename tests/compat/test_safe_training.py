"""What keeps a training from losing its work: faults 8, 9, 10, 31, 40 and 41 of basicsr 1.4.2."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import basicsr.data
import numpy as np
import pytest
import torch
from basicsr.data.prefetch_dataloader import PrefetchDataLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset

from esc_arch import UserError, atomic_io


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_8_an_interrupted_save_leaves_the_checkpoint_before(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.save(0, 2)
    network, state = tmp_path / "models" / "net_g_2.pth", tmp_path / "states" / "2.state"
    before = network.read_bytes(), state.read_bytes()

    class Killed(BaseException):
        pass

    def cut_short(content: object, file: Any) -> None:
        file.write(b"PK half a file")
        raise Killed

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(Killed):
        model.save_network(model.net_g, "net_g", 2)
    with pytest.raises(Killed):
        model.save_training_state(0, 2)
    assert (network.read_bytes(), state.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.rglob("*2.*")) == ["2.state", "net_g_2.pth"]


def test_8_what_is_saved(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    model.save(3, 8)
    saved = torch.load(tmp_path / "models" / "net_g_8.pth", weights_only=True)
    assert set(saved) == {"params", "params_ema"}
    for key, net in (("params", model.net_g), ("params_ema", model.net_g_ema)):
        assert saved[key].keys() == net.state_dict().keys()
        assert all(torch.equal(saved[key][name], value) for name, value in net.state_dict().items())
    state = torch.load(tmp_path / "states" / "8.state", weights_only=True)
    assert (state["epoch"], state["iter"]) == (3, 8)
    assert len(state["optimizers"]) == len(state["schedulers"]) == 1
    model.save(epoch=-1, current_iter=-1)
    assert (tmp_path / "models" / "net_g_latest.pth").is_file()
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["8.state"]


def test_9_a_full_disk_is_reported_and_ends_the_run_only_at_its_end(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, basicsr_log: Any
) -> None:
    model = make_model()
    monkeypatch.setattr(atomic_io.os, "fsync", full_disk)
    model.save(0, 2)
    assert "net_g_2.pth was not saved, and the one before is untouched" in basicsr_log.text
    assert "2.state was not saved" in basicsr_log.text
    assert "No space left on device" in basicsr_log.text
    with pytest.raises(UserError, match=r"net_g_latest\.pth was not saved.*Free space there: [\d,]+ MiB"):
        model.save(-1, -1)
    assert [path for folder in ("models", "states") for path in (tmp_path / folder).iterdir()] == []


def test_9_torch_s_own_words_for_a_full_disk(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, basicsr_log: Any
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0\nmore")

    model = make_model()
    monkeypatch.setattr(torch, "save", fail)
    model.save_network(model.net_g, "net_g", 2)
    assert "net_g_2.pth was not saved" in basicsr_log.text
    assert "unexpected pos 64" in basicsr_log.text


def test_8_auto_resume_skips_a_state_without_its_network(run_basicsr: Any, train_options: Any) -> None:
    assert run_basicsr("train", train_options).status == 0
    models = run_basicsr.folder / "experiments" / "trial" / "models"
    (models / "net_g_4.pth").unlink()
    run = run_basicsr("train", train_options, "--auto_resume")
    assert run.status == 0, run.err
    assert "--auto_resume skips a state" in run.err and "net_g_4.pth, which is not there" in run.err
    assert "Resuming training from epoch: 0, iter: 2" in run.log()
    assert (models / "net_g_4.pth").is_file()


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise UserError("2.png is not an image")
        return index


def test_10_a_failure_while_prefetching_is_raised() -> None:
    loader = iter(PrefetchDataLoader(num_prefetch_queue=1, dataset=Broken(), batch_size=1))
    assert [int(next(loader)), int(next(loader))] == [0, 1]
    with pytest.raises(UserError, match=r"2\.png is not an image"):
        next(loader)


class Draws(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[float, float]:
        return random.random(), float(np.random.rand())


def epochs(seed: int, rank_seed: int = 0) -> list[list[float]]:
    """Two epochs' random numbers of a loader that is made as BasicSR makes it."""
    torch.manual_seed(seed + rank_seed)
    options = {"phase": "train", "batch_size_per_gpu": 1, "num_worker_per_gpu": 2}
    loader: DataLoader[Any] = basicsr.data.build_dataloader(Draws(), options, num_gpu=0, sampler=None, seed=seed)
    return [[float(value) for pair in loader for value in pair] for _ in range(2)]


def test_31_workers_draw_anew_in_every_epoch_and_the_same_with_the_same_seed() -> None:
    first, second = epochs(seed=5)
    assert len(set(first) | set(second)) == 16
    assert epochs(seed=5) == [first, second]
    assert epochs(seed=5, rank_seed=1) != [first, second]


def test_40_the_average_has_the_buffers_too() -> None:
    from basicsr.models.base_model import BaseModel

    class Holder(BaseModel):
        def __init__(self) -> None:
            self.net_g, self.net_g_ema = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    holder = Holder()
    holder.net_g(torch.randn(8, 2) + 3)
    with torch.no_grad():
        holder.net_g.weight.fill_(5)
    holder.model_ema(decay=0.5)
    assert torch.equal(holder.net_g_ema.running_mean, holder.net_g.running_mean)
    assert holder.net_g_ema.num_batches_tracked == 1
    assert holder.net_g_ema.weight.tolist() == [3, 3]


@pytest.mark.parametrize("saved", [False, True])
def test_41_training_stops_when_the_loss_is_not_a_number(
    run_basicsr: Any, train_options: Any, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from basicsr.losses.basic_loss import L1Loss

    count, forward = iter(range(100)), L1Loss.forward

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * (float("nan") if next(count) == (2 if saved else 0) else 1)

    monkeypatch.setattr(L1Loss, "forward", spoiled)
    run = run_basicsr("train", train_options)
    assert run.status == 2
    assert f"Training stopped at iteration {3 if saved else 1}: l_pix is nan" in run.err
    states = run.experiment() / "training_states"
    assert (f"The last state is {states / '2.state'}" if saved else "Nothing was saved before") in run.err
    assert not (run.experiment() / "models" / "net_g_latest.pth").exists()
