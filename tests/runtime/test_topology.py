"""Degrees become ranks and groups, on one process and on several; what does not fit is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megavila.config import ParallelConfig
from megavila.runtime.collectives import (
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast_object,
    gather_objects,
)
from megavila.runtime.errors import MegavilaError
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import data_degree, initialize, shutdown
from tests.distributed import RankFailed, run_ranks


def test_world_of_one_without_torchrun() -> None:
    for _ in range(2):  # a second start in the same process works too
        topology = initialize(ParallelConfig(), get_platform("cpu"))
        assert (topology.world_size, topology.rank, topology.data, topology.is_main) == (1, 0, 1, True)
        assert topology.sequence_parallel is False
        assert all_reduce_sum(torch.tensor([3.0]), topology.world_group).item() == 3.0
        assert broadcast_object("x", topology.mrsp_group) == "x"
        assert gather_objects("x", topology.data_group) == ["x"]
        shutdown()
        assert not dist.is_initialized()


def _groups(rank: int, tensor: int, context: int) -> dict[str, object]:
    topology = initialize(
        ParallelConfig(tensor_parallel=tensor, context_parallel=context), get_platform("cpu")
    )
    names = ("tensor_group", "context_group", "data_group", "mrsp_group", "data_context_group", "world_group")
    groups = {name: dist.get_process_group_ranks(getattr(topology, name)) for name in names}
    for name in names:  # each group really communicates
        assert gather_objects(rank, getattr(topology, name)) == groups[name]
    coordinates = (topology.tensor_rank, topology.context_rank, topology.data_rank)
    assert dist.get_rank(topology.mrsp_group) == topology.mrsp_rank
    assert topology.mrsp_size == topology.mrsp_group.size()
    assert topology.is_main == (rank == 0) and topology.sequence_parallel == (tensor > 1)
    return {"coordinates": coordinates, **groups}


def test_coordinates_and_groups_of_four_ranks() -> None:
    ranks = run_ranks(_groups, 4, 2, 1)
    assert [r["coordinates"] for r in ranks] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert [r["mrsp_group"] for r in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["data_group"] for r in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["context_group"] for r in ranks] == [[0], [1], [2], [3]]


def test_context_parallel_replica_is_one_mrsp_group() -> None:
    ranks = run_ranks(_groups, 4, 2, 2)
    assert [r["coordinates"] for r in ranks] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert all(r["mrsp_group"] == [0, 1, 2, 3] for r in ranks)
    assert [r["context_group"] for r in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["data_context_group"] for r in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("tensor", "context", "world", "words"),
    [
        (3, 1, 4, ["3 x parallel.context_parallel 1 = 3", "4 ranks", "[1, 2, 4]", "start 6 processes"]),
        (2, 2, 2, ["= 4 ranks", "start 4 processes"]),
    ],
)
def test_degrees_that_do_not_fit(tensor: int, context: int, world: int, words: list[str]) -> None:
    with pytest.raises(MegavilaError) as caught:
        data_degree(ParallelConfig(tensor_parallel=tensor, context_parallel=context), world)
    for word in words:
        assert word in str(caught.value)
    assert data_degree(ParallelConfig(tensor_parallel=2, context_parallel=2), 12) == 3


def test_nothing_is_started_where_degrees_do_not_fit() -> None:
    with pytest.raises(MegavilaError, match="does not divide the 1 ranks"):
        initialize(ParallelConfig(tensor_parallel=2), get_platform("cpu"))
    assert not dist.is_initialized()


def test_pipeline_stages_are_refused_with_alternatives() -> None:
    with pytest.raises(MegavilaError, match=r"pipeline_parallel is 2.*parallel.tensor_parallel"):
        data_degree(ParallelConfig(pipeline_parallel=2), 2)


def _collectives(rank: int) -> dict[str, object]:
    group = initialize(ParallelConfig(), get_platform("cpu")).world_group
    # 256 + 1 needs nine bits: bfloat16 has eight, so only a float32 sum rounds once, to 260 rather than 256.
    half = torch.tensor([256.0 if rank == 0 else 1.0], dtype=torch.bfloat16)
    untouched = half.clone()
    result = {
        "half": all_reduce_sum(half, group),
        "transposed": all_reduce_sum(torch.arange(6.0).view(2, 3).T, group),
        "max": all_reduce_max(torch.tensor([rank, -rank]), group).tolist(),
        "broadcast": broadcast_object({"from": rank}, group, src=1),
        "objects": gather_objects("abc"[rank], group),
    }
    assert torch.equal(half, untouched)
    barrier(group)
    return result


def test_collectives() -> None:
    for result in run_ranks(_collectives, 3):
        assert result["half"].dtype == torch.bfloat16 and result["half"].item() == 258.0
        assert torch.equal(result["transposed"], 3 * torch.arange(6.0).view(2, 3).T)
        assert result["max"] == [2, 0]
        assert result["broadcast"] == {"from": 1}
        assert result["objects"] == ["a", "b", "c"]


def _fails_on_rank_one(rank: int) -> int:
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()
    return rank


def _dies(rank: int) -> int:
    if rank == 1:
        os._exit(0)
    dist.barrier()
    return rank


def test_run_ranks_reports_the_failing_rank() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2.*ValueError: only here"):
        run_ranks(_fails_on_rank_one, 2)
    with pytest.raises(RankFailed, match="rank 1 ended with exit code 0|rank 0 of 2"):
        run_ranks(_dies, 2)


def test_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "from megavila.config import ParallelConfig\n"
        "from megavila.runtime.platform import get_platform\n"
        "from megavila.runtime.topology import initialize, shutdown\n"
        "from megavila.runtime.collectives import gather_objects\n"
        "t = initialize(ParallelConfig(tensor_parallel=2), get_platform('cpu'))\n"
        "ranks = gather_objects((t.rank, t.tensor_rank, t.data), t.world_group)\n"
        "if t.is_main: print(ranks)\n"
        "shutdown()\n"
    )
    repository = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[(0, 0, 1), (1, 1, 1)]"
