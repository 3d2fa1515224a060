"""Encoded frames on disk: found by any split, never trusted when damaged."""

from pathlib import Path

import pytest
import torch

from megavila.mrsp import disk as disk_module
from megavila.mrsp.disk import DiskStore
from megavila.mrsp.store import StoreCounters, StoreKey
from megavila.runtime.errors import MegavilaError

KEY = StoreKey("content", tuple(range(11)), "pyav 16", "weights")


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(disk_module._log, "warning", found.append)
    return found


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "store", StoreCounters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", [1, 2])
def test_any_slice_of_what_was_written(store: DiskStore, pooling: int, dtype: torch.dtype) -> None:
    """11 frames in windows of `pooling`, two files with a hole between them."""
    windows = torch.arange(-(-11 // pooling) * 3).view(-1, 3).to(dtype)
    for start, stop in ((0, 4), (6, 11)):
        store.write(KEY, start, stop, windows[start // pooling : -(-stop // pooling)])
    for start in range(0, 12, pooling):
        for stop in [*range(start, 11, pooling), 11]:
            held = set()
            for first, last, rows in store.read(KEY, start, stop, pooling):
                assert start <= first < last <= stop and not held & set(range(first, last))
                held |= set(range(first, last))
                assert torch.equal(rows, windows[first // pooling : -(-last // pooling)])
            assert held == set(range(start, stop)) & ({*range(4)} | {*range(6, 11)})
    assert store.counters.corrupt == 0


def test_damaged_file_is_removed_and_counted(store: DiskStore, warnings: list[str]) -> None:
    rows = torch.randn(11, 40)
    for damage in ("flip", "cut", "other"):
        store.write(KEY, 0, 11, rows)
        (path,) = store.directory.rglob("*.safetensors")
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[-7] ^= 16
            path.write_bytes(content)
        elif damage == "cut":
            path.write_bytes(content[:-100])
        else:  # a file that belongs to another video
            other = StoreKey("other", KEY.frame_ids, "pyav 16", "weights")
            store.write(other, 0, 11, rows)
            (wrong,) = (store.directory / other.video).rglob("*.safetensors")
            wrong.replace(path)
        assert store.read(KEY, 0, 11, 1) == [] and not path.exists()
    assert store.counters.corrupt == 3 and len(warnings) == 3
    assert "checksum" in warnings[0] and "other frames or weights" in warnings[2]


def test_other_weights_are_stale(store: DiskStore, warnings: list[str]) -> None:
    store.write(KEY, 0, 11, torch.randn(11, 2))
    changed = StoreKey(KEY.content, KEY.frame_ids, KEY.pixels, "new weights")
    for _ in range(2):
        assert store.read(changed, 0, 11, 1) == []
    assert store.read(StoreKey("new", (0,), "pyav 16", "weights"), 0, 1, 1) == []
    assert store.counters.stale == 2 and len(warnings) == 1
    assert len(store.read(KEY, 0, 11, 1)) == 1


def test_full_disk_is_a_warning_and_leaves_nothing(
    store: DiskStore, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_module, "save_file", full)
    for _ in range(2):
        store.write(KEY, 0, 11, torch.randn(11, 2))
    assert len(warnings) == 1 and "No space left" in warnings[0]
    assert [path for path in store.directory.rglob("*") if path.is_file()] == []


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MegavilaError, match="mrsp.store_dir"):
        DiskStore(tmp_path / "file" / "store", StoreCounters())
