"""The specification of interval attention: dense, readable, any dtype; for tests and tiny inputs."""

import torch
from torch import Tensor

from megavila_kernels.interval_attention.mask import IntervalMask


def reference_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of each row's intervals, with the whole score matrix in memory.

    out_i = sum_j p_ij v_j with p_ij = exp(scale q_i.k_j - lse_i) and lse_i = log sum_j exp(scale q_i.k_j),
    where j runs over the keys that row i sees. A row that sees nothing has out = 0 and lse = -inf.

    q (tokens_q, heads, d); k, v (tokens_k, kv_heads, d). Computes in fp32, or in fp64 for fp64 inputs.
    Returns out (tokens_q, heads, d) in q's dtype and lse (tokens_q, heads) in the computing dtype. Plain
    autograd.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeat = q.shape[1] // k.shape[1]
    keys = k.to(compute).repeat_interleave(repeat, dim=1)
    values = v.to(compute).repeat_interleave(repeat, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(compute), keys) * scale
    visible = mask.visible().to(q.device)  # (tokens_q, tokens_k)
    scores = scores.masked_fill(~visible, float("-inf"))
    empty = ~visible.any(dim=-1)  # (tokens_q,)
    # An all -inf row would give nan in softmax's gradient: give it ordinary scores, then cut it off.
    safe = scores.masked_fill(empty[:, None], 0.0)
    lse = torch.logsumexp(safe, dim=-1)
    probabilities = torch.exp(safe - lse[..., None]).masked_fill(empty[:, None], 0.0)
    out = torch.einsum("hqk,khd->qhd", probabilities, values)
    lse = lse.masked_fill(empty, float("-inf"))
    return out.to(q.dtype), lse.transpose(0, 1).contiguous()
