"""Rows and gradients between ranks against indexing one tensor that holds all rows."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megavila.mrsp.exchange import exchange_rows
from megavila.runtime.errors import MegavilaError
from tests.distributed import run_ranks

WIDTH = 5
RANKS = 3
# Ranges of each rank, wanted rows of each rank: all odd sizes.
CASES: dict[str, tuple[list[list[tuple[int, int]]], list[list[int]]]] = {
    "one range each": ([[(0, 4)], [(4, 9)], [(9, 13)]], [[12, 0, 5], [4, 5, 6, 7, 8], [0, 1, 2, 3]]),
    "several videos": (
        [[(0, 3), (11, 12)], [(3, 4), (12, 17)], [(4, 11)]],
        [list(range(17)), [11, 3, 16], [10, 9, 0, 4]],
    ),
    "repeated prompts": ([[(0, 5)], [(5, 7)], [(7, 8)]], [[7, 0, 7, 0, 7], [1, 1], [2, 3, 6, 2, 2, 2, 7]]),
    "out of order": ([[(6, 8), (0, 2)], [(4, 6)], [(2, 4)]], [[7, 1, 6, 0], [0, 6], [5]]),
    "ranks without rows": ([[], [(0, 6), (6, 6)], [(6, 7)]], [[0, 6], [], [3]]),
    "nobody wants any": ([[(0, 1)], [], [(1, 2)]], [[], [], []]),
}


def everything(case: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All rows, and an upstream gradient for each rank."""
    ranges, wanted = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    total = sum(stop - start for owned in ranges for start, stop in owned)
    rows = torch.randn(total, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    upstream = [
        torch.randn(len(w), WIDTH, generator=generator, dtype=torch.float64).to(dtype) for w in wanted
    ]
    return rows, upstream


def held(rows: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    return torch.cat([rows[:0], *(rows[start:stop] for start, stop in ranges)])


def on_ranks(rank: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, Any] = {}
    for case, (ranges, wanted) in CASES.items():
        lists = [torch.tensor(w, dtype=torch.int64) for w in wanted]
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for speaks in (None, [True, False, True]):
                rows, upstream = everything(case, dtype)
                local = held(rows, ranges[rank]).requires_grad_()
                out = exchange_rows(local, ranges, lists, group, gradient_from=speaks)
                out.backward(upstream[rank])
                found[f"{case} {dtype} {speaks}"] = out.detach(), local.grad
    # 600 gradients of 1 from each rank for one row: in bf16 a running sum would stop at 256.
    local = torch.zeros(1 if rank == 0 else 0, 2, dtype=torch.bfloat16, requires_grad=True)
    many = [torch.zeros(600, dtype=torch.int64)] * RANKS
    exchange_rows(local, [[(0, 1)], [], []], many, group).sum().backward()
    found["sum"] = local.grad
    with torch.no_grad():
        assert not exchange_rows(local, [[(0, 1)], [], []], many, group).requires_grad
    found["errors"] = errors(rank, group)
    return found


def errors(rank: int, group: Any) -> list[str]:
    rows, messages = torch.zeros(2, 3), []
    ranges = [[(0, 2)], [(2, 4)], [(4, 6)]]
    nothing = torch.zeros(0, dtype=torch.int64)
    lost = [nothing, nothing, torch.tensor([5, 6])]
    overlapping = [[(0, 2)], [(1, 3)], [(4, 6)]]
    for arguments in (
        (rows, ranges, lost),
        (rows, ranges, [torch.tensor([-1])] * 3),
        (rows, overlapping, [nothing] * 3),
        (rows, ranges[:2], [nothing] * 3),
        (rows[:1], ranges, [nothing] * 3),
    ):
        with pytest.raises(MegavilaError) as caught:
            exchange_rows(*arguments, group)
        messages.append(str(caught.value))
    return messages


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_ranks, RANKS)


@pytest.mark.parametrize("speaks", [None, [True, False, True]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_rows_arrive_and_gradients_add_up(
    ranks: list[dict[str, Any]], case: str, dtype: torch.dtype, speaks: list[bool] | None
) -> None:
    ranges, wanted = CASES[case]
    rows, upstream = everything(case, dtype)
    exact = rows.double().requires_grad_()
    for rank, gradient in enumerate(upstream):
        if speaks is None or speaks[rank]:
            exact[wanted[rank]].backward(gradient.double())
    total = torch.zeros_like(exact) if exact.grad is None else exact.grad
    for rank in range(RANKS):
        out, gradient = ranks[rank][f"{case} {dtype} {speaks}"]
        assert out.dtype == gradient.dtype == dtype
        assert torch.equal(out, rows[wanted[rank]])
        expected = held(total, ranges[rank])
        # Sums of terms of about 1 in fp32 (fp64), then one rounding to the rows' type.
        wide = 1e-14 if dtype == torch.float64 else 1e-6
        narrow = 2.0**-8 if dtype == torch.bfloat16 else wide
        torch.testing.assert_close(gradient.double(), expected, rtol=narrow, atol=wide)


def test_sums_do_not_stall_in_bf16(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["sum"], torch.full((1, 2), 1800.0, dtype=torch.bfloat16))
    assert ranks[1]["sum"].shape == (0, 2)


def test_mistakes_are_named_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        lost, negative, overlap, lists, count = ranks[rank]["errors"]
        assert "row 6 is wanted but no rank holds it; the ranks hold 6 rows" in lost
        assert "row -1 is wanted" in negative
        assert "rows 0-1 of rank 0 and 1-2 of rank 1 overlap" in overlap
        assert "2 lists of row ranges" in lists and "group of 3 ranks" in lists
        assert f"rank {rank} holds 2 rows by its ranges but passes (1, 3)" in count
