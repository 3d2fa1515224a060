"""Rotary embeddings against transformers: Qwen2, Qwen2-VL's sections and Qwen3-VL's interleaved axes."""

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megavila.models.rotary import MropeLayout, RotaryEmbedding, apply_rotary
from megavila.runtime.errors import MegavilaError

HEADS, HEAD_DIM, TOKENS = 3, 24, 29
SECTION = (3, 5, 4)


def _sizes(**rope: object) -> dict:
    return dict(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, **rope},
    )


def _check(rotary: RotaryEmbedding, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """cos, sin: (1, tokens, head_dim), transformers' angles for these positions."""
    q = torch.randn(TOKENS, HEADS, HEAD_DIM, requires_grad=True)
    expected, _ = apply_rotary_pos_emb(q[None], q[None], cos, sin, unsqueeze_dim=2)
    upstream = torch.randn(TOKENS, HEADS, HEAD_DIM)
    (expected_grad,) = torch.autograd.grad(expected[0], q, upstream)
    rotated = apply_rotary(q, rotary(positions))
    (grad,) = torch.autograd.grad(rotated, q, upstream)
    torch.testing.assert_close(rotated, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(apply_rotary(q, rotary(positions)), rotated)


def test_one_dimensional_positions_need_not_be_in_order() -> None:
    positions = torch.randint(0, 100_000, (TOKENS,))
    cos, sin = Qwen2RotaryEmbedding(Qwen2Config(**_sizes()))(torch.zeros(1), positions[None])
    _check(RotaryEmbedding(HEAD_DIM, 5e5), positions, cos, sin)


@pytest.mark.parametrize("layout", list(MropeLayout))
def test_three_dimensional_positions(layout: MropeLayout) -> None:
    positions = torch.randint(0, 5000, (3, TOKENS))
    if layout is MropeLayout.SECTIONED:
        theirs = Qwen2VLRotaryEmbedding(Qwen2VLTextConfig(**_sizes(mrope_section=list(SECTION))))
    else:
        theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**_sizes(mrope_section=list(SECTION))))
    cos, sin = theirs(torch.zeros(1), positions[:, None])
    _check(RotaryEmbedding(HEAD_DIM, 5e5, SECTION, layout), positions, cos, sin)


def test_equal_axes_are_one_dimensional() -> None:
    positions = torch.arange(TOKENS)
    plain = RotaryEmbedding(HEAD_DIM, 1e4)(positions)
    sectioned = RotaryEmbedding(HEAD_DIM, 1e4, SECTION)
    for table in (sectioned(positions), sectioned(positions.expand(3, -1))):
        assert torch.equal(table.cos, plain.cos) and torch.equal(table.sin, plain.sin)


def test_bf16_is_rounded_once() -> None:
    q = torch.randn(TOKENS, HEADS, HEAD_DIM)
    table = RotaryEmbedding(HEAD_DIM, 1e4)(torch.arange(TOKENS) * 1000)
    low = apply_rotary(q.bfloat16(), table)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, apply_rotary(q.bfloat16().float(), table).bfloat16())


def test_errors() -> None:
    with pytest.raises(MegavilaError, match="without M-RoPE"):
        RotaryEmbedding(HEAD_DIM, 1e4)(torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(MegavilaError, match="sum to head_dim / 2 = 12"):
        RotaryEmbedding(HEAD_DIM, 1e4, (3, 5, 5))
    with pytest.raises(MegavilaError, match="odd"):
        RotaryEmbedding(25, 1e4)
