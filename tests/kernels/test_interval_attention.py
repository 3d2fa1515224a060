"""Interval attention against a dense fp64 specification and against torch's own SDPA, sequence by
sequence."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from megavila_kernels import IntervalMask, attend, interval_attention
from megavila_kernels.interval_attention.mask import find_blocks
from torch import Tensor

Case = tuple[list[list[int]], list[list[int]], int]


def shared_prefix(groups: list[tuple[int, list[int]]]) -> Case:
    """lo, hi and token count of `[prompt | responses]` groups laid out one after another."""
    lo: list[list[int]] = [[], []]
    hi: list[list[int]] = [[], []]
    token = 0
    for prompt, responses in groups:
        start = token
        for i in range(prompt):
            for interval, (a, b) in enumerate([(start, start + i + 1), (0, 0)]):
                lo[interval].append(a)
                hi[interval].append(b)
        token += prompt
        for response in responses:
            for i in range(response):
                for interval, (a, b) in enumerate([(start, start + prompt), (token, token + i + 1)]):
                    lo[interval].append(a)
                    hi[interval].append(b)
            token += response
    return lo, hi, token


def packed(lengths: list[int], causal: bool) -> Case:
    lo: list[int] = []
    hi: list[int] = []
    for length in lengths:
        start = len(lo)
        lo += [start] * length
        hi += [start + i + 1 if causal else start + length for i in range(length)]
    return [lo], [hi], len(lo)


def ragged(rows: int, keys: int, seed: int) -> Case:
    """Arbitrary intervals, a fifth of them empty."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, keys + 1, (2, rows), generator=generator).sort(dim=0).values
    ends[:, torch.rand(rows, generator=generator) < 0.2] = 3
    return [ends[0].tolist()], [ends[1].tolist()], keys


def with_padding(case: Case, padding: int) -> Case:
    """Rows at the end that see nothing, keys at the end that nobody sees."""
    lo, hi, keys = case
    return [x + [0] * padding for x in lo], [x + [0] * padding for x in hi], keys + padding


CASES: dict[str, Case] = {
    "one": packed([1], causal=True),
    "causal63": packed([63], causal=True),
    "full97": packed([97], causal=False),
    "packed_causal": packed([1, 63, 97, 111], causal=True),
    "packed_full": packed([111, 1, 63], causal=False),
    "shared_prefix": shared_prefix([(63, [1, 7, 30]), (1, [5]), (97, [11, 0, 40, 3])]),
    "shared_prefix_padded": with_padding(shared_prefix([(31, [9, 9, 2]), (17, [])]), 5),
    "ragged": ragged(77, 111, seed=1),
    "empty": ([[0] * 9], [[0] * 9], 4),
    "decode": ([[3]], [[200]], 211),
}


def make_mask(case: Case) -> IntervalMask:
    lo, hi, keys = case
    return IntervalMask(torch.tensor(lo, dtype=torch.int32), torch.tensor(hi, dtype=torch.int32), keys)


def make_inputs(mask: IntervalMask, heads: int, kv_heads: int, d: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, and upstream gradients of out and lse, in fp64 but exactly representable in bf16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (mask.tokens_q, heads, d),
        (mask.tokens_k, kv_heads, d),
        (mask.tokens_k, kv_heads, d),
        (mask.tokens_q, heads, d),
        (mask.tokens_q, heads),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(torch.bfloat16).double() for x in tensors]


def run(
    inputs: list[Tensor], mask: IntervalMask, dtype: torch.dtype, backend: str, lse_grad: bool = True
) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
    out, lse = attend(q, k, v, mask, backend=backend)  # type: ignore[arg-type]
    outputs, upstream = [out], [inputs[3].to(dtype)]
    if lse_grad:
        # The loss reads the LSE only where it is finite, as a merge of two attentions does.
        seen = torch.isfinite(lse.detach())
        outputs.append(torch.where(seen, lse, 0.0))
        upstream.append(inputs[4].to(lse.dtype))
    return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, (q, k, v), upstream)]


def same_precision(inputs: list[Tensor], mask: IntervalMask, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk, dv of ordinary torch operations in `dtype`, the yardstick for our rounding errors."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
    visible = mask.visible()
    empty = ~visible.any(dim=-1)
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ keys.mT) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(empty[:, None], 0.0)
    p = scores.softmax(dim=-1).masked_fill(empty[:, None], 0.0)
    out = (p @ values).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.fixture(params=["batched", "flash"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute a block; the second sends all but the tiniest ones through the flash kernel."""
    if request.param == "flash":
        plan = importlib.import_module("megavila_kernels.interval_attention.plan")
        monkeypatch.setattr(plan, "FLASH_AREA", 64)
    return request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lse_grad", [False, True])
def test_equals_dense_specification_in_fp64(name: str, lse_grad: bool, path: str) -> None:
    mask = make_mask(CASES[name])
    inputs = make_inputs(mask, heads=4, kv_heads=2, d=32)
    actual = run(inputs, mask, torch.float64, "torch", lse_grad)
    expected = run(inputs, mask, torch.float64, "reference", lse_grad)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kv_heads,repeat", [(2, 1), (1, 4), (2, 7), (1, 8)])
@pytest.mark.parametrize("d", [32, 60, 64, 80, 128])
def test_grouped_heads_and_head_dims(kv_heads: int, repeat: int, d: int, path: str) -> None:
    mask = make_mask(CASES["shared_prefix"])
    inputs = make_inputs(mask, kv_heads * repeat, kv_heads, d)
    actual = run(inputs, mask, torch.float64, "torch")
    expected = run(inputs, mask, torch.float64, "reference")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["causal63", "packed_full", "shared_prefix", "shared_prefix_padded", "ragged"]
)
def test_rounding_error_is_bounded_by_a_same_precision_run(name: str, dtype: torch.dtype, path: str) -> None:
    mask = make_mask(CASES[name])
    inputs = make_inputs(mask, heads=4, kv_heads=2, d=64)
    actual = run(inputs, mask, dtype, "torch", lse_grad=False)
    expected = run(inputs, mask, torch.float64, "reference", lse_grad=False)
    yardstick = same_precision(inputs, mask, dtype)
    assert error(actual[0], expected[0]) <= 2 * error(yardstick[0], expected[0])
    for a, y, e in zip(actual[2:], yardstick[1:], expected[2:], strict=True):
        assert e.norm() > 0
        assert error(a, e) <= 3 * error(y, e)
    seen = torch.isfinite(expected[1])
    assert actual[1].dtype == torch.float32
    assert error(actual[1][seen], expected[1][seen]) < 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_equal_sdpa_one_by_one(causal: bool, path: str) -> None:
    lengths = [1, 63, 97, 111]
    mask = make_mask(packed(lengths, causal))
    inputs = make_inputs(mask, heads=6, kv_heads=2, d=60)
    actual = run(inputs, mask, torch.float64, "torch", lse_grad=False)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        q, k, v = (x[rows].transpose(0, 1)[None].clone().requires_grad_() for x in inputs[:3])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        grads = torch.autograd.grad(out, (q, k, v), inputs[3][rows].transpose(0, 1)[None])
        for a, e in zip([actual[0], *actual[2:]], [out, *grads], strict=True):
            torch.testing.assert_close(a[rows], e[0].transpose(0, 1), rtol=1e-10, atol=1e-12)
        start += length


def test_shared_prefix_equals_sdpa_on_whole_sequences(path: str) -> None:
    prompt, responses = 63, [1, 7, 30, 12]
    mask = make_mask(shared_prefix([(prompt, responses)]))
    inputs = make_inputs(mask, heads=4, kv_heads=2, d=32)
    actual = run(inputs, mask, torch.float64, "torch", lse_grad=False)
    expected = [torch.zeros_like(x) for x in (inputs[0], *inputs[:3])]
    # The prompt's own outputs carry upstream gradient once, not once per response.
    start = prompt
    for number, response in enumerate(responses):
        rows = torch.cat([torch.arange(prompt), torch.arange(start, start + response)])
        q, k, v = (x[rows].transpose(0, 1)[None].clone().requires_grad_() for x in inputs[:3])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        upstream = inputs[3][rows].clone()
        if number:
            upstream[:prompt] = 0
        grads = torch.autograd.grad(out, (q, k, v), upstream.transpose(0, 1)[None])
        expected[0][rows] = out.detach()[0].transpose(0, 1)
        for total, grad in zip(expected[1:], grads, strict=True):
            total.index_add_(0, rows, grad[0].transpose(0, 1))
        start += response
    for a, e in zip([actual[0], *actual[2:]], expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_empty_rows_are_zero_and_pass_no_gradient(path: str) -> None:
    mask = make_mask(with_padding(packed([20], causal=True), 6))
    inputs = make_inputs(mask, heads=4, kv_heads=2, d=32)
    out, lse, dq, dk, dv = run(inputs, mask, torch.float32, "torch")
    assert torch.all(lse[20:] == float("-inf")) and torch.all(torch.isfinite(lse[:20]))
    for x in (out, dq, dk, dv):
        assert torch.all(x[20:] == 0) and torch.all(x[:20].flatten(1).norm(dim=1) > 0)


def test_first_row_empty_beside_padding() -> None:
    """Padding inside a chunk borrows row 0's values; an empty row 0 must not leak nan through it."""
    lo = [[0, 0, 0, 0, 0, 5, 5]]
    hi = [[0, 3, 3, 3, 0, 6, 7]]
    mask = make_mask((lo, hi, 8))
    inputs = make_inputs(mask, heads=2, kv_heads=1, d=32)
    for a, e in zip(
        run(inputs, mask, torch.float64, "torch"), run(inputs, mask, torch.float64, "reference"), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    mask = make_mask(shared_prefix([(3, [2, 1])]))
    q, k, v = (x.requires_grad_() for x in make_inputs(mask, heads=2, kv_heads=1, d=3)[:3])
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask, backend="torch"), (q, k, v))


def test_merging_two_attentions_by_their_lse_is_attention_over_both() -> None:
    """What a ring does, gradients included: they reach q, k and v through out and lse alike."""
    whole = make_mask(packed([40], causal=True))
    inputs = make_inputs(whole, heads=4, kv_heads=2, d=32)
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    lo, hi = whole.lo[0], whole.hi[0]
    border = 17
    parts = []
    for a, b in ((0, border), (border, 40)):
        part_lo, part_hi = (lo.clamp(a, b) - a).int(), (hi.clamp(a, b) - a).int()
        parts.append(interval_attention(q, k[a:b], v[a:b], part_lo, part_hi))
    lses = torch.stack([lse for _, lse in parts])
    weights = torch.softmax(lses, dim=0)
    merged = sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    assert isinstance(merged, Tensor)
    grads = torch.autograd.grad(merged, (q, k, v), inputs[3])
    expected = run(inputs, whole, torch.float64, "reference", lse_grad=False)
    for a, e in zip([merged, *grads], [expected[0], *expected[2:]], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keep_area", [16, 1 << 18])
def test_blocks_cover_every_visible_pair_once(name: str, keep_area: int) -> None:
    mask = make_mask(CASES[name])
    covered = torch.zeros(mask.tokens_q, mask.tokens_k, dtype=torch.int32)
    for block in find_blocks(mask, keep_area):
        seen = torch.ones(block.rows, block.keys, dtype=torch.int32)
        if block.shape == "causal":
            seen = seen.tril(block.keys - block.rows)
        elif block.shape == "general":
            lo, hi = (x[block.interval, block.q0 : block.q1, None] for x in (mask.lo, mask.hi))
            key = torch.arange(block.k0, block.k1)
            seen = ((key >= lo) & (key < hi)).int()
        covered[block.q0 : block.q1, block.k0 : block.k1] += seen
    assert torch.equal(covered, mask.visible().int())


def test_plan_is_shared_by_layers_and_separate_by_head_count() -> None:
    mask = make_mask(CASES["shared_prefix"])
    cpu = torch.device("cpu")
    assert mask.plan(4, 2, cpu) is mask.plan(4, 2, cpu)
    assert mask.plan(4, 2, cpu) is not mask.plan(4, 4, cpu)


def test_mistakes_are_named() -> None:
    lo, hi = torch.zeros(4, dtype=torch.int32), torch.full((4,), 9, dtype=torch.int32)
    q, k = torch.randn(4, 3, 8), torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match="row 0 has an interval outside the 6 keys"):
        interval_attention(q, k, k, lo, hi)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 K/V heads"):
        interval_attention(q, k, k, lo, hi.clamp_max(6))
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        interval_attention(q[:, :2], k, k, lo, hi.clamp_max(6), backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="intervals of row 1 overlap"):
        make_mask(([[0, 0], [3, 3]], [[2, 4], [5, 5]], 6))
