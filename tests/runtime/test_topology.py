"""Degrees become ranks and groups, on one process and on several; what does not fit is refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

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
from tests.distributed import run_ranks


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


def _coordinates_and_groups(rank: int, tensor: int, context: int) -> dict[str, Any]:
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


def _collectives(rank: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    # 256 + 1 needs nine bits and bfloat16 has eight: summed in it, 256 + 1 + 1 + 1 would stay 256.
    half = torch.tensor([256.0 if rank == 0 else 1.0], dtype=torch.bfloat16)
    untouched = half.clone()
    result = {
        "half": all_reduce_sum(half, group),
        "transposed": all_reduce_sum(torch.arange(6.0).view(2, 3).T, group),
        "max": all_reduce_max(torch.tensor([rank, -rank]), group).tolist(),
        "broadcast": broadcast_object({"from": rank}, group, src=1),
        "objects": gather_objects("abcd"[rank], group),
    }
    assert torch.equal(half, untouched)
    barrier(group)
    return result


def _on_four_ranks(rank: int) -> dict[str, Any]:
    with_data = _coordinates_and_groups(rank, 2, 1)
    parallel_state.destroy_model_parallel()
    with_context = _coordinates_and_groups(rank, 2, 2)
    result = {"tp2 x dp2": with_data, "tp2 x cp2": with_context, "collectives": _collectives(rank)}
    for name, settings in CONTEXT.items():
        parallel_state.destroy_model_parallel()
        result[name] = _context_subgroups(rank, settings)
    return result


CONTEXT: dict[str, dict[str, Any]] = {
    "ring": {"context_parallel": 4},
    "ulysses": {"context_parallel": 4, "cp_comm_type": "a2a"},
    "hybrid": {"context_parallel": 4, "cp_comm_type": "a2a+p2p", "cp_ulysses": 2},
    "two ulysses": {"context_parallel": 2, "cp_comm_type": "a2a"},
}


def _context_subgroups(rank: int, settings: dict[str, Any]) -> tuple[Any, ...]:
    topology = initialize(ParallelConfig(**settings), get_platform("cpu"))
    groups = (topology.ulysses_group, topology.ring_group)
    ranks = [dist.get_process_group_ranks(group) for group in groups]
    assert [gather_objects(rank, group) for group in groups] == ranks  # each really communicates
    places = (topology.ulysses_rank, topology.ring_rank)
    assert places == tuple(dist.get_rank(group) for group in groups)
    assert (topology.ulysses, topology.ring) == tuple(group.size() for group in groups)
    return (*places, *ranks)


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[str, Any]]:
    """One start of four processes for all the tests that look at them."""
    return run_ranks(_on_four_ranks, 4)


def test_coordinates_and_groups_of_four_ranks(four_ranks: list[dict[str, Any]]) -> None:
    ranks = [r["tp2 x dp2"] for r in four_ranks]
    assert [r["coordinates"] for r in ranks] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert [r["tensor_group"] for r in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["mrsp_group"] for r in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["data_group"] for r in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["context_group"] for r in ranks] == [[0], [1], [2], [3]]


def test_context_parallel_replica_is_one_mrsp_group(four_ranks: list[dict[str, Any]]) -> None:
    ranks = [r["tp2 x cp2"] for r in four_ranks]
    assert [r["coordinates"] for r in ranks] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert all(r["mrsp_group"] == [0, 1, 2, 3] for r in ranks)
    assert [r["context_group"] for r in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["data_context_group"] for r in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_ulysses_groups_are_neighbours_and_rings_join_them(four_ranks: list[dict[str, Any]]) -> None:
    found = {name: [r[name] for r in four_ranks] for name in CONTEXT}
    assert found["ring"] == [(0, r, [r], [0, 1, 2, 3]) for r in range(4)]
    assert found["ulysses"] == [(r, 0, [0, 1, 2, 3], [r]) for r in range(4)]
    assert found["hybrid"] == [
        (0, 0, [0, 1], [0, 2]),
        (1, 0, [0, 1], [1, 3]),
        (0, 1, [2, 3], [0, 2]),
        (1, 1, [2, 3], [1, 3]),
    ]
    # Context ranks are next to each other with one tensor-parallel rank, and replicas follow.
    assert found["two ulysses"] == [(r % 2, 0, [r // 2 * 2, r // 2 * 2 + 1], [r]) for r in range(4)]


def test_collectives(four_ranks: list[dict[str, Any]]) -> None:
    for result in (r["collectives"] for r in four_ranks):
        assert result["half"].dtype == torch.bfloat16
        assert result["half"].item() == torch.tensor(259.0).bfloat16().item() == 260.0
        assert torch.equal(result["transposed"], 4 * torch.arange(6.0).view(2, 3).T)
        assert result["max"] == [3, 0]
        assert result["broadcast"] == {"from": 1}
        assert result["objects"] == ["a", "b", "c", "d"]


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


def test_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "from megavila.config import ParallelConfig\n"
        "from megavila.runtime.platform import get_platform\n"
        "from megavila.runtime.topology import initialize, shutdown\n"
        "from megavila.runtime.collectives import gather_objects\n"
        "for degree in (1, 2):\n"  # a second world in the same processes
        "    t = initialize(ParallelConfig(tensor_parallel=degree), get_platform('cpu'))\n"
        "    ranks = gather_objects((t.rank, t.tensor_rank, t.data), t.world_group)\n"
        "    if t.is_main: print(ranks)\n"
        "    shutdown()\n"
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
    assert done.stdout.splitlines()[-2:] == ["[(0, 0, 2), (1, 0, 2)]", "[(0, 0, 1), (1, 1, 1)]"]
