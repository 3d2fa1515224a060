"""The specification: one row after the other; for tests."""

import torch
from torch import Tensor


def reference_shared_prefix_decode(
    q: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    prompt_of_row: Tensor,
    prompt_lengths: Tensor,
    scale: float,
) -> Tensor:
    """See `shared_prefix_decode`; computes in fp64."""
    rows = []
    repeat = q.shape[1] // own_keys.shape[1]
    for row, prompt in enumerate(prompt_of_row.tolist()):
        length = int(prompt_lengths[prompt])
        keys = torch.cat([prompt_keys[prompt, :, :length], own_keys[row]], dim=1).double()
        values = torch.cat([prompt_values[prompt, :, :length], own_values[row]], dim=1).double()
        keys, values = keys.repeat_interleave(repeat, dim=0), values.repeat_interleave(repeat, dim=0)
        scores = torch.einsum("hd,hkd->hk", q[row].double(), keys) * scale
        rows.append(torch.einsum("hk,hkd->hd", scores.softmax(dim=-1), values))
    return torch.stack(rows)
