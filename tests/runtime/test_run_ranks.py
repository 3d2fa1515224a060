"""The multi-rank harness itself: results in order, failures with their traceback, silent deaths noticed."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailed, run_ranks


def _sum(rank: int, factor: float) -> torch.Tensor:
    mine = torch.tensor([rank + 1.0], requires_grad=True) * factor
    total = mine.detach().clone()
    dist.all_reduce(total)
    assert torch.get_num_threads() == 1
    return torch.cat([mine, total])


def _fails_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def _dies(rank: int) -> None:
    if rank == 1:
        os._exit(0)
    dist.barrier()


def test_results_come_in_rank_order() -> None:
    assert [r.tolist() for r in run_ranks(_sum, 2, 10.0)] == [[10.0, 30.0], [20.0, 30.0]]


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2.*ValueError: only here"):
        run_ranks(_fails_on_rank_one, 2)


def test_a_rank_that_vanishes_is_noticed() -> None:
    with pytest.raises(RankFailed, match="rank 1 ended with exit code 0|rank 0 of 2"):
        run_ranks(_dies, 2)
