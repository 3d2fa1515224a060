"""What vLLM needs on a CPU when torchrun started several ranks."""

from typing import Any


def name_shared_memory(job: str) -> None:
    """Makes the shared memory of tensor-parallel ranks this job's own.

    With external_launcher vLLM gives it the same name in every job on the machine. What a killed job leaves behind
    then keeps the next one from starting ("create shm in SHMManager failed. errno: 17"), as two at a time would.

    Args:
        job: the same on all ranks of the job, and on no other's.
    """
    from vllm.distributed.device_communicators import cpu_communicator  # pyright: ignore[reportMissingImports]

    def make_group_name(communicator: Any) -> str:
        ranks = "-".join(str(rank) for rank in communicator.ranks)
        return f"{job}-{communicator.unique_name}-[{ranks}]"

    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(make_group_name)
