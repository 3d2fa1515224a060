"""Runs a function on several gloo ranks, each its own process."""

import multiprocessing as mp
import os
import pickle
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 600.0


class RankFailed(AssertionError):
    """One rank raised; the message is its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Results of the module-level `fn(rank, *args)` on `world_size` spawned processes, in rank order.

    torch.distributed is initialised on gloo from the environment and torch uses one thread in each.
    Results are pickled by value: return plain Python objects or tensors. Raises RankFailed with the
    first failing rank's traceback.
    """
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_main, args=(fn, rank, world_size, port, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    collected: dict[int, Any] = {}
    try:
        while len(collected) < world_size:
            rank, error, payload = _next_result(results, processes, collected)
            if error is not None:
                raise RankFailed(f"rank {rank} of {world_size}:\n{error}")
            collected[rank] = pickle.loads(payload)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [collected[rank] for rank in range(world_size)]


def _next_result(
    results: Any, processes: list[Any], collected: dict[int, Any]
) -> tuple[int, str | None, bytes]:
    waited = 0.0
    while waited < TIMEOUT_SECONDS:
        # Asked before reading: what a dead rank has put is in the queue already.
        dead = [r for r, p in enumerate(processes) if r not in collected and p.exitcode is not None]
        try:
            return results.get(timeout=1.0)
        except queue.Empty:
            waited += 1.0
        if dead:
            raise RankFailed(
                f"rank {dead[0]} ended with exit code {processes[dead[0]].exitcode} and no traceback"
            )
    raise RankFailed(
        f"ranks {sorted(set(range(len(processes))) - set(collected))} gave no result in {waited:.0f} s"
    )


def _main(
    fn: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], results: Any
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method="env://")
        # Pickled here: the queue would send tensors as shared memory, which dies with this process.
        results.put((rank, None, pickle.dumps(fn(rank, *args))))
    except BaseException:
        results.put((rank, traceback.format_exc(), b""))
    finally:
        results.close()
        results.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
