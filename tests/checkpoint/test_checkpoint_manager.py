"""Checkpoints: bitwise round trips, kills in the middle of saving, damage, and disks that fail."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megavila.checkpoint.files import Manifest
from megavila.checkpoint.manager import CheckpointManager
from megavila.checkpoint.manager import logger as manager_logger
from megavila.checkpoint.tree import CheckpointError
from megavila.runtime.topology import Topology
from tests.distributed import run_ranks


@dataclass(frozen=True)
class Ranks:
    """The part of a topology that checkpoints look at."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    world_size: int = 1
    rank: int = 0
    tensor_rank: int = 0
    context_rank: int = 0
    data_rank: int = 0
    pipeline_rank: int = 0
    is_main: bool = True
    world_group: Any = field(default_factory=lambda: SimpleNamespace(size=lambda: 1))


def manager(directory: Path, keep_last: int = 3, ranks: Ranks | None = None) -> CheckpointManager:
    return CheckpointManager(directory, keep_last, cast(Topology, ranks or Ranks()))


def save(checkpoints: CheckpointManager, step: int, value: float | None = None) -> Path:
    weight = torch.full((4, 3), float(step) if value is None else value)
    return checkpoints.save(
        step,
        model={"weight": weight},
        optimizer={"step": step},
        rng=torch.get_rng_state(),
        data={"row": step},
    )


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    advance(model, optimizer, 3)
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(11, 5)).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_continues_bitwise(tmp_path: Path) -> None:
    model, optimizer = trained()
    manager(tmp_path).save(
        3,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        rng={"torch": torch.get_rng_state()},
        data={"epoch": 1, "row": 17},
        extra={"best": 0.1 + 0.2},
    )
    expected = advance(model, optimizer, 4)

    torch.manual_seed(99)
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    checkpoint = manager(tmp_path).load("auto")
    assert checkpoint is not None and checkpoint.step == 3
    assert checkpoint.data == {"epoch": 1, "row": 17} and checkpoint.extra == {"best": 0.1 + 0.2}
    other.load_state_dict(checkpoint.model)
    other_optimizer.load_state_dict(checkpoint.optimizer)
    assert checkpoint.rng is not None
    torch.set_rng_state(checkpoint.rng["torch"])
    assert advance(other, other_optimizer, 4) == expected
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_weights_round_trip_bitwise_in_every_type(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (64, 8))
    weight = bits.bool() if dtype is torch.bool else bits.to(torch.int32).view(torch.uint8).clone()
    weight = weight if dtype is torch.bool else weight.view(dtype)
    tied = weight[:16]
    manager(tmp_path).save(
        1, model={"w": weight, "tied": tied, "turned": weight.t()}, optimizer={}, rng=None, data=None
    )
    checkpoint = manager(tmp_path).load("auto")
    assert checkpoint is not None
    for name, expected in {"w": weight, "tied": tied, "turned": weight.t().contiguous()}.items():
        loaded = checkpoint.model[name]
        assert loaded.dtype == dtype and loaded.shape == expected.shape
        assert torch.equal(loaded.view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert manager(tmp_path / "absent").latest() is None
    assert manager(tmp_path / "absent").load("auto") is None


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path, keep_last=2)
    for step in (1, 2, 3, 12):
        save(checkpoints, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000012"]
    assert checkpoints.latest() == tmp_path / "step_00000012"


def test_after_going_back_the_newer_save_is_latest(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path, keep_last=3)
    for step in (10, 20, 30):
        save(checkpoints, step)
    # A run resumed from step 10 saves step 20 again: the abandoned step 30 must not be resumed from.
    save(checkpoints, 20, value=-1.0)
    checkpoint = checkpoints.load("auto")
    assert checkpoint is not None and checkpoint.step == 20
    assert checkpoint.model["weight"][0, 0] == -1


def killed(action: Callable[[], object]) -> bool:
    """Runs ``action`` in a forked process; True if that process was killed, False if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die_after(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, count: int) -> None:
    """The call of ``owner.name`` after ``count`` calls kills the process instead."""
    original, calls = getattr(owner, name), iter(range(count))

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    ("owner", "name", "count", "expected"),
    [
        *((os, "fsync", count, 10) for count in range(9)),  # each file, the manifest, the directory
        (Manifest, "write", 0, 10),
        (Path, "rename", 0, 10),  # complete, but not yet in place
        (os, "fsync", 9, 20),  # in place, but perhaps not on the disk
        (Path, "rename", 1, 20),  # in place; the older one is about to be removed
        (shutil, "rmtree", 0, 20),
    ],
)
def test_killed_while_saving(tmp_path: Path, owner: object, name: str, count: int, expected: int) -> None:
    checkpoints = manager(tmp_path, keep_last=1)
    save(checkpoints, 10)
    with pytest.MonkeyPatch.context() as monkeypatch:
        die_after(monkeypatch, owner, name, count)
        assert killed(lambda: save(checkpoints, 20))
    assert checkpoints.latest() == tmp_path / f"step_{expected:08d}"
    checkpoint = checkpoints.load("auto")
    assert checkpoint is not None and checkpoint.step == expected
    assert torch.equal(checkpoint.model["weight"], torch.full((4, 3), float(expected)))
    # The next save clears what the killed one left.
    save(checkpoints, 30)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000030"]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """The killed process saves without pause; the moments of the kills fall wherever they fall."""
    checkpoints = manager(tmp_path, keep_last=2)
    save(checkpoints, 0)
    last = 0
    for round_number in range(8):
        child = os.fork()
        if child == 0:
            for step in range(last + 1, 10_000):
                save(checkpoints, step)
            os._exit(0)
        time.sleep(0.06 + 0.023 * round_number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        checkpoint = checkpoints.load("auto")
        assert checkpoint is not None and checkpoint.step >= last
        assert checkpoint.data == {"row": checkpoint.step}
        assert torch.equal(checkpoint.model["weight"], torch.full((4, 3), float(checkpoint.step)))
        last = checkpoint.step
    assert last > 0


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "shortened":
        path.write_bytes(content[:-1])
    else:  # same size, one bit
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


FILES = ["model-tp0-pp0.safetensors", "optimizer-tp0-pp0.json", "rng-rank00000.safetensors", "manifest.json"]


@pytest.mark.parametrize("how", ["removed", "shortened", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_passed_over(tmp_path: Path, name: str, how: str) -> None:
    checkpoints = manager(tmp_path)
    save(checkpoints, 10)
    newest = save(checkpoints, 20)
    damage(newest / name, how)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    manager_logger.addHandler(handler)
    try:
        checkpoint = checkpoints.load("auto")
    finally:
        manager_logger.removeHandler(handler)
    assert checkpoint is not None and checkpoint.step == 10
    assert any(str(newest) in message and name in message for message in messages)
    with pytest.raises(CheckpointError, match=f"step_00000020.*{name}"):
        checkpoints.load(newest)


def test_an_explicit_path_must_be_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere.*no manifest.json"):
        manager(tmp_path).load(tmp_path / "nowhere")


@pytest.mark.parametrize("degree", ["tensor", "pipeline"])
def test_another_degree_is_refused_with_the_way_out(tmp_path: Path, degree: str) -> None:
    save(manager(tmp_path), 10)
    other = manager(tmp_path, ranks=Ranks(**{degree: 2}, world_size=2))
    with pytest.raises(CheckpointError, match=f"{degree} parallel degree 1, this run has 2.*export .* HF"):
        other._read(tmp_path / "step_00000010")


def test_a_full_disk_is_explained_and_leaves_no_ruins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = manager(tmp_path)
    save(checkpoints, 10)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="step_00000020.*No space left.*GiB are free.*keep_last"):
            save(checkpoints, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]


def test_a_tensor_file_beyond_the_limit_is_explained(tmp_path: Path) -> None:
    """A real failure of the operating system inside safetensors, not a patched one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(CheckpointError, match="cannot write into .*step_00000001"):
            manager(tmp_path).save(1, model={"w": torch.zeros(10_000)}, optimizer={}, rng=None, data=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    # A file in the way fails for every user; permission bits would not stop root.
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot create .*file"):
        save(manager(tmp_path / "file" / "checkpoints"), 1)


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep_last is 0"):
        manager(tmp_path, keep_last=0)


def ranks_of(rank: int, tensor: int) -> Ranks:
    """Two ranks as TP=2, or as DP=2."""
    shards, copies = (rank, 0) if tensor == 2 else (0, rank)
    return Ranks(
        tensor=tensor,
        data=2 // tensor,
        world_size=2,
        rank=rank,
        tensor_rank=shards,
        data_rank=copies,
        is_main=rank == 0,
        world_group=dist.group.WORLD,
    )


def two_ranks(rank: int, directory: str) -> dict[int, dict[str, Any]]:
    return {tensor: saved_and_loaded(rank, f"{directory}/tp{tensor}", tensor) for tensor in (1, 2)}


def saved_and_loaded(rank: int, directory: str, tensor: int) -> dict[str, Any]:
    ranks = ranks_of(rank, tensor)
    checkpoints = manager(Path(directory), ranks=ranks)
    shard = torch.full((3,), float(ranks.tensor_rank))
    for step in (1, 2):
        checkpoints.save(
            step, model={"w": shard}, optimizer={"m": shard + 10}, rng={"rank": rank}, data={"row": step}
        )
    if rank == 1:
        damage(Path(directory) / "step_00000002" / "rng-rank00000.json", "flipped")
    dist.barrier()
    loaded = checkpoints.load("auto")
    assert loaded is not None

    errors = []
    try:  # a failure of one rank reaches both instead of leaving one waiting
        checkpoints.save(3, model={"w": shard}, optimizer={}, rng=print if rank == 1 else None, data=0)
    except CheckpointError as error:
        errors.append(str(error))
    dist.barrier()  # the main rank clears the unfinished files before it raises
    return {
        "step": loaded.step,
        "w": loaded.model["w"].tolist(),
        "m": loaded.optimizer["m"].tolist(),
        "rng": loaded.rng,
        "data": loaded.data,
        "errors": errors,
        "left": sorted(path.name for path in Path(directory).iterdir()),
    }


def test_two_ranks(tmp_path: Path) -> None:
    for rank, results in enumerate(run_ranks(two_ranks, 2, str(tmp_path))):
        for tensor, result in results.items():
            shard = float(rank if tensor == 2 else 0)
            assert result["step"] == 1 and result["data"] == {"row": 1}
            assert result["w"] == [shard] * 3 and result["m"] == [shard + 10] * 3
            assert result["rng"] == {"rank": rank}
            assert len(result["errors"]) == 1 and "rng-rank00001 is a builtin" in result["errors"][0]
            assert result["left"] == ["step_00000001", "step_00000002"]
    names = {
        tensor: {path.name for path in (tmp_path / f"tp{tensor}" / "step_00000001").glob("model-*")}
        for tensor in (1, 2)
    }
    assert names == {
        1: {"model-tp0-pp0.safetensors"},
        2: {"model-tp0-pp0.safetensors", "model-tp1-pp0.safetensors"},
    }
    # One rank may resume what two data-parallel ranks saved; the random states are then not restored.
    resumed = manager(tmp_path / "tp1").load(tmp_path / "tp1" / "step_00000001")
    assert resumed is not None and resumed.rng is None and resumed.optimizer["m"].tolist() == [10.0] * 3
    with pytest.raises(CheckpointError, match="saved with tensor parallel degree 2, this run has 1"):
        manager(tmp_path / "tp2").load("auto")
