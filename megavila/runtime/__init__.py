"""Devices, processes, randomness and bookkeeping: what every other package stands on."""

import warnings

# Megatron-core says on every import that TransformerEngine and Apex, which are optional here, are not there,
# and on every sequence-parallel layer that CUDA streams should be serialised for NCCL.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "The following imports from `dynamic_context.py` will be removed",
    "When using sequence parallelism it is recommended to set the environment variable",
    "`torch.jit.script",
):
    warnings.filterwarnings("ignore", message=_message)
