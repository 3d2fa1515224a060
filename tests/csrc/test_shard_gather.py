"""The compiled padded shard gather against plain torch indexing, forward and backward."""

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megavila.mrsp import gather
from megavila.mrsp.gather import padded_shard_gather, reference_gather

SOURCE = Path(__file__).parents[2] / "csrc" / "shard_gather.cpp"


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The installed module, or one compiled here."""
    try:
        return importlib.import_module(gather.EXTENSION)
    except ImportError:
        if not shutil.which("c++"):
            pytest.skip("no C++ compiler (c++), and megavila._shard_gather is not installed")
    from torch.utils import cpp_extension

    return cpp_extension.load(
        "shard_gather_test",
        [str(SOURCE)],
        extra_cflags=["-O2", "-std=c++20"],
        build_directory=str(tmp_path_factory.mktemp("shard_gather")),
    )


@pytest.fixture(params=["compiled", "reference"])
def implementation(
    request: pytest.FixtureRequest, extension: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Both ways behind the public function."""
    chosen = extension if request.param == "compiled" else None
    monkeypatch.setattr(gather, "load_extension", lambda: chosen)
    yield request.param


def make_case(
    rows: list[int], length: int, width: int, dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Random sources and a shard that mixes runs, single rows, repeats and padding."""
    generator = torch.Generator().manual_seed(seed)
    sources = [torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype) for n in rows]
    usable = [i for i, n in enumerate(rows) if n]
    source_index, row_index = [], []
    while len(source_index) < length:
        run = int(torch.randint(1, 9, (), generator=generator))
        pick = int(torch.randint(-1, len(usable), (), generator=generator))
        source = usable[pick] if pick >= 0 else -1
        first = int(torch.randint(0, rows[source], (), generator=generator)) if source >= 0 else 7_000
        for j in range(run):
            source_index.append(source)
            row_index.append(min(first + j, rows[source] - 1) if source >= 0 else first)
    return (
        sources,
        torch.tensor(source_index[:length], dtype=torch.int32),
        torch.tensor(row_index[:length], dtype=torch.int64),
    )


def by_hand(sources: list[Tensor], source_index: Tensor, row_index: Tensor) -> Tensor:
    zero = torch.zeros(sources[0].shape[1], dtype=sources[0].dtype)
    pairs = zip(source_index.tolist(), row_index.tolist(), strict=True)
    return torch.stack([zero if s < 0 else sources[s][r] for s, r in pairs])


@pytest.mark.parametrize("width", [1, 3, 64, 97, 544])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_rows_and_padding(width: int, dtype: torch.dtype, implementation: str) -> None:
    sources, source_index, row_index = make_case([17, 0, 1, 63], 111, width, dtype, seed=width)
    out = padded_shard_gather(sources, source_index, row_index)
    assert out.dtype == dtype
    assert torch.equal(out, by_hand(sources, source_index, row_index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_adds_rows_to_the_sources_that_need_it(dtype: torch.dtype, implementation: str) -> None:
    sources, source_index, row_index = make_case([17, 5, 63], 211, 33, dtype, seed=1)
    upstream = torch.randn(211, 33, dtype=dtype)
    for i in (0, 2):
        sources[i].requires_grad_()
    padded_shard_gather(sources, source_index, row_index).backward(upstream)
    assert sources[1].grad is None
    for i in (0, 2):
        expected = torch.zeros_like(sources[i])
        mine = source_index == i
        expected.index_add_(0, row_index[mine], upstream[mine])
        torch.testing.assert_close(sources[i].grad, expected, rtol=1e-6, atol=1e-6)
        assert expected.norm() > 0


def test_backward_sums_repeated_bf16_rows_in_fp32(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "load_extension", lambda: extension)
    source = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    count = 1000  # summed in bf16, adding 1 would stop at 256
    out = padded_shard_gather([source], torch.zeros(count, dtype=torch.int32), torch.ones(count).long())
    out.sum().backward()
    assert source.grad is not None
    assert torch.equal(source.grad[1], torch.full((8,), 1000.0, dtype=torch.bfloat16))
    assert torch.equal(source.grad[0], torch.zeros(8, dtype=torch.bfloat16))


def test_threads_change_nothing(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "load_extension", lambda: extension)
    sources, source_index, row_index = make_case([40, 9], 700, 1030, torch.float32, seed=2)
    upstream = torch.randn(700, 1030)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in sources]
            out = padded_shard_gather(leaves, source_index, row_index)
            out.backward(upstream)
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_large_outputs_and_unaligned_sources(extension: Any) -> None:
    """Past 16 MiB rows are streamed around the cache; a source may start anywhere."""
    flat = torch.randn(3000 * 512 + 3)
    sources = [flat[3:].view(3000, 512), torch.randn(1, 512)]
    generator = torch.Generator().manual_seed(3)
    row_index = torch.randint(0, 3000, (9001,), generator=generator)
    row_index[100:2000] = torch.arange(1900)
    source_index = torch.zeros(9001, dtype=torch.int32)
    source_index[5000:5010] = -1
    source_index[7000], row_index[7000] = 1, 0
    out = extension.gather(sources, source_index, row_index)
    assert out.nbytes > 1 << 24
    assert torch.equal(out, by_hand(sources, source_index, row_index))


def test_out_is_written_and_nothing_allocated(implementation: str) -> None:
    sources, source_index, row_index = make_case([17, 0, 1, 63], 111, 33, torch.bfloat16, seed=5)
    out = torch.full((111, 33), 7.0, dtype=torch.bfloat16)
    assert padded_shard_gather(sources, source_index, row_index, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, by_hand(sources, source_index, row_index))
    for wrong in (out[:110], out[:, :32], out.float()):
        with pytest.raises((ValueError, RuntimeError)):
            padded_shard_gather(sources, source_index, row_index, out=wrong)
    sources[0].requires_grad_()
    with pytest.raises(ValueError, match="out cannot hold a result that carries gradient"):
        padded_shard_gather(sources, source_index, row_index, out=out)
    with torch.no_grad():
        padded_shard_gather(sources, source_index, row_index, out=out)


def test_out_apart_from_the_sources(extension: Any) -> None:
    memory = torch.randn(20, 4)
    index = torch.zeros(10, dtype=torch.int32)
    with pytest.raises(ValueError, match="shares memory"):
        extension.gather([memory[:11]], index, index.long(), memory[10:])
    with pytest.raises(ValueError, match="contiguous"):
        extension.gather([memory], index, index.long(), torch.empty(10, 8)[:, :4])
    extension.gather([memory[:10]], index, index.long(), memory[10:])


def test_empty_shard(implementation: str) -> None:
    nothing = torch.zeros(0, dtype=torch.int32)
    assert padded_shard_gather([torch.randn(3, 4)], nothing, nothing.long()).shape == (0, 4)


@pytest.mark.parametrize("source,row", [(2, 0), (-2, 0), (0, 3), (1, -1)])
def test_index_out_of_range(source: int, row: int, implementation: str) -> None:
    sources = [torch.randn(3, 4), torch.randn(5, 4)]
    with pytest.raises(IndexError, match="shard row 1 names"):
        padded_shard_gather(
            sources, torch.tensor([0, source], dtype=torch.int32), torch.tensor([2, row], dtype=torch.int64)
        )


def test_mistakes_are_named(extension: Any) -> None:
    index = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="source_index must be int32 and row_index int64"):
        extension.gather([torch.randn(3, 4)], index.long(), index.long())
    with pytest.raises(ValueError, match="sources must be"):
        extension.gather([torch.randn(3, 4), torch.randn(3, 5)], index, index.long())


def test_fallback_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(gather, "EXTENSION", "megavila._no_such_extension")
    monkeypatch.setattr(gather.get_logger(gather.__name__), "warning", warnings.append)
    gather.load_extension.cache_clear()
    case = make_case([5], 9, 4, torch.float32, seed=4)
    try:
        for _ in range(2):
            assert torch.equal(padded_shard_gather(*case), reference_gather(*case))
        assert len(warnings) == 1 and "plain torch" in warnings[0]
    finally:
        gather.load_extension.cache_clear()
