"""Where this process stands: ranks, degrees and process groups. Nothing else reads them."""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megavila.config.model import divisors
from megavila.config.parallel import ParallelConfig
from megavila.runtime import megatron_cpu
from megavila.runtime.collectives import gather_objects
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import configure_logging
from megavila.runtime.platform import Platform

_worlds = itertools.count()


@dataclass(frozen=True)
class Topology:
    """Degrees, this process's coordinates and its groups; built by `initialize`.

    A replica of the model is tensor x context ranks: the MR-SP group, which shares the videos. Context ranks are
    `ring` Ulysses groups of `ulysses` ranks: context_rank = ring_rank * ulysses + ulysses_rank.
    Groups order their ranks as the coordinate that varies within them.
    """

    tensor: int
    context: int
    ulysses: int
    ring: int
    ring_tokens: (
        int | None
    )  # a sequence of at least so many tokens a rank goes by a ring of all ranks; None: as the degrees say
    split_always: bool  # whether groups that could lie whole on the ranks are split all the same
    pipeline: int
    data: int
    world_size: int
    rank: int
    tensor_rank: int
    context_rank: int
    data_rank: int
    pipeline_rank: int
    ulysses_rank: int
    ring_rank: int
    sequence_parallel: bool  # in effect: asked for, and more than one tensor-parallel rank
    tensor_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    mrsp_group: dist.ProcessGroup  # tensor x context: the ranks of one replica
    data_context_group: dist.ProcessGroup  # data x context: the ranks that hold the same weights
    ulysses_group: dist.ProcessGroup  # runs of `ulysses` context ranks side by side
    ring_group: dist.ProcessGroup  # context ranks with the same place in their Ulysses groups
    world_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes files."""
        return self.rank == 0

    @property
    def mrsp_rank(self) -> int:
        """This rank's place in its replica: tensor rank fastest."""
        return self.context_rank * self.tensor + self.tensor_rank

    @property
    def mrsp_size(self) -> int:
        """Ranks of one replica."""
        return self.tensor * self.context


def data_degree(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model on `world_size` ranks. Raises MegavilaError where the degrees do not fit."""
    if parallel.pipeline_parallel > 1:
        raise MegavilaError(
            f"parallel.pipeline_parallel is {parallel.pipeline_parallel}, but training with pipeline stages is not "
            "supported; set it to 1 and split the model with parallel.tensor_parallel"
        )
    tensor, context = parallel.tensor_parallel, parallel.context_parallel
    if world_size % (tensor * context) != 0:
        raise MegavilaError(
            f"parallel.tensor_parallel {tensor} x parallel.context_parallel {context} = {tensor * context} ranks for one "
            f"model, which does not divide the {world_size} ranks of this run; use a product in {divisors(world_size)} "
            f"or start {_next_multiple(world_size, tensor * context)} processes (torchrun --nproc-per-node)"
        )
    return world_size // (tensor * context)


def initialize(parallel: ParallelConfig, platform: Platform) -> Topology:
    """Joins the processes that torchrun started, or makes a world of one, and builds Megatron's groups.

    Raises MegavilaError before any group is built where the degrees do not fit the number of ranks.
    """
    if platform.name == "cpu":
        megatron_cpu.apply()
    elif megatron_cpu.is_applied():
        raise MegavilaError("this process has computed on the CPU before; start a new one for CUDA")
    if not dist.is_initialized():
        data_degree(parallel, int(os.environ.get("WORLD_SIZE", "1")))
        _join(platform)
    data = data_degree(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        context_parallel_size=parallel.context_parallel,
        create_gloo_process_groups=platform.name == "cuda",  # on a CPU the groups are gloo already
    )
    context_rank = parallel_state.get_context_parallel_rank()
    context_group = _built(parallel_state.get_context_parallel_group())
    ulysses_group, ring_group = _context_subgroups(context_group, parallel.ulysses)
    topology = Topology(
        tensor=parallel.tensor_parallel,
        context=parallel.context_parallel,
        ulysses=parallel.ulysses,
        ring=parallel.ring,
        ring_tokens=parallel.cp_ring_tokens if parallel.cp_comm_type == "auto" else None,
        split_always=parallel.cp_split == "always",
        pipeline=parallel.pipeline_parallel,
        data=data,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context_rank=context_rank,
        data_rank=parallel_state.get_data_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        ulysses_rank=context_rank % parallel.ulysses,
        ring_rank=context_rank // parallel.ulysses,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_parallel > 1,
        tensor_group=_built(parallel_state.get_tensor_model_parallel_group()),
        context_group=context_group,
        data_group=_built(parallel_state.get_data_parallel_group()),
        mrsp_group=_built(parallel_state.get_tensor_and_context_parallel_group()),
        data_context_group=_built(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ulysses_group=ulysses_group,
        ring_group=ring_group,
        world_group=_built(dist.group.WORLD),
    )
    configure_logging(is_main=topology.is_main, rank=topology.rank)
    return topology


def _context_subgroups(
    context_group: dist.ProcessGroup, ulysses: int
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's Ulysses group and ring group. All ranks of the world take part."""
    own = dist.get_process_group_ranks(context_group)
    if len(own) == 1:
        return context_group, context_group
    ulysses_group = ring_group = context_group
    everywhere = sorted(set(gather_objects(tuple(own), _built(dist.group.WORLD))))
    for ranks in everywhere:  # each rank must take part in building every group
        if ulysses < len(ranks):
            for first in range(0, len(ranks), ulysses):
                ulysses_group = _joined(ranks[first : first + ulysses], ulysses_group)
        if ulysses > 1:
            for place in range(ulysses):
                ring_group = _joined(ranks[place::ulysses], ring_group)
    return ulysses_group, ring_group


def _joined(ranks: Sequence[int], otherwise: dist.ProcessGroup) -> dist.ProcessGroup:
    """The new group of these ranks if this one is among them."""
    group = dist.new_group(list(ranks))
    return _built(group) if dist.get_rank() in ranks else otherwise


def shutdown() -> None:
    """Leaves all groups. Another `initialize` may follow in the same process."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def opened(parallel: ParallelConfig, platform: Platform) -> Iterator[Topology]:
    """`initialize`, and `shutdown` at the end."""
    topology = initialize(parallel, platform)
    try:
        yield topology
    finally:
        shutdown()


def _join(platform: Platform) -> None:
    if platform.name == "cuda":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= gpus:
            raise MegavilaError(
                f"this machine has {gpus} GPUs, too few for local rank {local_rank}; start at most {gpus} processes "
                "(torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun's
        device_id = platform.device if platform.name == "cuda" else None
        store, rank, world_size = next(dist.rendezvous("env://"))  # pyright: ignore[reportPrivateImportUsage]
        # torchrun's store outlives the groups: without a name of its own, a second world would meet the first one's keys.
        store = dist.PrefixStore(f"megavila/{next(_worlds)}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(
            platform.backend, store=store, rank=rank, world_size=world_size, device_id=device_id
        )
    else:  # a world of one needs no port
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(platform.backend, store=store, rank=0, world_size=1)


def _built(group: object) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup)  # Megatron's getters also know ranks outside of a group
    return group


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
