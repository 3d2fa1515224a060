"""What other implementations of attention got wrong.

Each mistake has one check. Our backends pass it; the wrong variants of wrong_attention.py must not, which
proves that the check sees the mistake.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from megavila_kernels.interval_attention import (
    Backend,
    Gradients,
    IntervalMask,
    get_backend,
    zero_gradients,
)
from torch import Tensor

from tests.kernels import wrong_attention as wrong
from tests.kernels.test_interval_attention import (
    error,
    make_inputs,
    make_mask,
    packed,
    run,
    same_precision,
    with_padding,
)

Check = Callable[[Backend], None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, D = 4, 2, 32
# Rounding of fp32. The mistakes are orders of magnitude above it.
TOLERANCE = 1e-6


def device_inputs(mask: IntervalMask, heads: int = HEADS, kv_heads: int = KV_HEADS) -> list[Tensor]:
    return [x.to(DEVICE) for x in make_inputs(mask, heads, kv_heads, D)]


def device_mask(case: tuple[list[list[int]], list[list[int]], int]) -> IntervalMask:
    mask = make_mask(case)
    return IntervalMask(mask.lo.to(DEVICE), mask.hi.to(DEVICE), mask.tokens_k)


def attention(
    backend: Backend, inputs: list[Tensor], mask: IntervalMask, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v, dout = (x.to(dtype) for x in inputs[:4])
    scale = q.shape[-1] ** -0.5
    out, lse = backend.forward(q, k, v, mask, scale)
    rows = backend.row_gradients(dout, None, out, lse)
    grads = backend.backward(rows, q, k, v, mask, scale)
    return [out, lse, grads.dq, grads.dk, grads.dv]


def ring_attention(
    backend: Backend,
    inputs: list[Tensor],
    parts: list[tuple[Tensor, IntervalMask]],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The same of keys that arrive in parts, each (indices of its keys, what the rows see of them).

    The gradients are the fp32 sums.
    """
    q, k, v, dout = (x.to(dtype) for x in inputs[:4])
    scale = q.shape[-1] ** -0.5
    state = None
    for keys, mask in parts[:-1]:
        state = backend.accumulate(q, k[keys], v[keys], mask, scale, state)
    keys, mask = parts[-1]
    out, lse = backend.forward(q, k[keys], v[keys], mask, scale, state)
    rows = backend.row_gradients(dout, None, out, lse)
    total = zero_gradients(q, k, v)
    for keys, mask in parts:
        own = Gradients(total.dq, total.dk[keys], total.dv[keys])
        own = backend.backward(rows, q, k[keys], v[keys], mask, scale, own)
        total = Gradients(own.dq, total.dk, total.dv)
        total.dk[keys], total.dv[keys] = own.dk, own.dv
    return [out, lse, total.dq, total.dk, total.dv]


def cut_keys(mask: IntervalMask, count: int) -> list[tuple[Tensor, IntervalMask]]:
    """The parts of a ring of `count` ranks with neighbouring keys each."""
    visible = mask.visible()
    pieces = torch.arange(mask.tokens_k, device=visible.device).tensor_split(count)
    return [(keys, from_visible(visible[:, keys])) for keys in pieces]


def from_visible(visible: Tensor) -> IntervalMask:
    """The mask of one interval a row that shows what `visible` (tokens_q, tokens_k) does."""
    count = visible.sum(dim=1)
    lo = visible.int().argmax(dim=1)
    mask = IntervalMask(lo[None].int(), (lo + count)[None].int(), visible.shape[1])
    if not torch.equal(mask.visible(), visible):
        raise ValueError("a row sees more than one interval")
    return mask


def exact(inputs: list[Tensor], mask: IntervalMask) -> list[Tensor]:
    # Copies: `run` lets tensors that need no conversion require gradients.
    return run([x.clone() for x in inputs], mask, torch.float64, "reference", lse_grad=False)


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """out, lse, dq, dk, dv up to a relative error; with one visible key the gradients of q and k vanish, and
    what is left is measured against 1."""
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        if name == "lse":
            seen = torch.isfinite(e)
            assert torch.equal(a == float("-inf"), ~seen)
            a, e = a[seen], e[seen]
        assert (a.double() - e).norm() <= tolerance * e.norm().clamp_min(1.0), name


def check_ring_reads_current_keys(backend: Backend) -> None:
    mask = device_mask(packed([96], causal=True))
    inputs = device_inputs(mask)
    assert_equal(ring_attention(backend, inputs, cut_keys(mask, 4)), exact(inputs, mask))


def check_error_does_not_grow_with_the_ring(backend: Backend) -> None:
    mask = device_mask(packed([96], causal=True))
    inputs = device_inputs(mask)
    expected = exact(inputs, mask)

    def errors(count: int) -> Tensor:
        found = ring_attention(backend, inputs, cut_keys(mask, count), torch.float16)
        return torch.tensor([error(a, e) for a, e in zip(found, expected, strict=True)])

    alone, many = errors(1), errors(8)
    for index in (0, 2, 3, 4):
        assert many[index] <= 1.02 * alone[index], (index, many, alone)


def check_rows_that_see_nothing(backend: Backend) -> None:
    """One row among others, a tile of them at the end, and a ring in which whole steps show nothing."""
    lo, hi, tokens = with_padding(packed([70], causal=True), 70)
    hi[0][3] = 0
    mask = device_mask((lo, hi, tokens))
    inputs = device_inputs(mask)
    hidden = IntervalMask(*torch.zeros(2, 1, tokens, dtype=torch.int32, device=DEVICE), 20)
    nobody = torch.arange(120, 140, device=DEVICE)
    parts = [(nobody, hidden), *cut_keys(mask, 2), (nobody, hidden)]
    empty = ~mask.visible().any(dim=1)
    for actual in (attention(backend, inputs, mask), ring_attention(backend, inputs, parts)):
        assert_equal(actual, exact(inputs, mask))
        for x in (actual[0], actual[2]):
            assert torch.equal(x[empty], torch.zeros_like(x[empty]))


def check_tail_padding(backend: Backend) -> None:
    """Packed sequences with garbage behind them: as if it were not there."""
    lengths, padding = [7, 33, 21], 23
    real = sum(lengths)
    for causal in (True, False):
        mask = device_mask(with_padding(packed(lengths, causal), padding))
        inputs = device_inputs(mask)
        for x in inputs:
            x[real:] = 7.0
        alone = device_mask(packed(lengths, causal))
        expected = exact([x[:real] for x in inputs], alone)
        found = attention(backend, inputs, mask)
        assert_equal([x[:real] for x in found], expected)
        for x in (found[0], *found[2:]):
            assert torch.equal(x[real:], torch.zeros_like(x[real:]))


def check_padding_gradients_are_zero(backend: Backend) -> None:
    """In new tensors and in accumulators, whose real rows hold what came before and are added to."""
    mask = device_mask(with_padding(packed([40], causal=True), 30))
    inputs = device_inputs(mask)
    expected = exact(inputs, mask)[2:]
    q, k, v, dout = (x.float() for x in inputs[:4])
    out, lse = backend.forward(q, k, v, mask, D**-0.5)
    rows = backend.row_gradients(dout, None, out, lse)
    grads = backend.backward(rows, q, k, v, mask, D**-0.5)
    before = zero_gradients(q, k, v)
    for x in (before.dq, before.dk, before.dv):
        x[:40] = 1.0
    added = backend.backward(rows, q, k, v, mask, D**-0.5, before)
    for name, e in zip(("dq", "dk", "dv"), expected, strict=True):
        fresh, total = getattr(grads, name), getattr(added, name)
        for x in (fresh, total):
            assert torch.equal(x[40:], torch.zeros_like(x[40:]))
        assert error(fresh, e) < TOLERANCE
        assert error(total[:40], e[:40] + 1) < TOLERANCE


def check_dq_has_the_inputs_dtype(backend: Backend) -> None:
    mask = device_mask(packed([63], causal=True))
    inputs = device_inputs(mask)
    dq = attention(backend, inputs, mask, torch.float16)[2]
    assert dq.dtype == torch.float16
    # Rounding to bf16 on the way would still pass the error bound, but leave the last three bits empty.
    assert (dq != dq.bfloat16().half()).float().mean() > 0.5
    expected, yardstick = exact(inputs, mask)[2], same_precision(inputs, mask, torch.float16)[1]
    assert error(dq, expected) <= 3 * error(yardstick, expected)


def check_full_attention_has_full_gradients(backend: Backend) -> None:
    mask = device_mask(packed([63], causal=False))
    inputs = device_inputs(mask)
    assert_equal(attention(backend, inputs, mask), exact(inputs, mask))


def check_lse_is_a_natural_logarithm(backend: Backend) -> None:
    """In what the forward pass returns and in what the backward pass reads."""
    mask = device_mask(packed([63], causal=False))
    inputs = device_inputs(mask)
    expected = exact(inputs, mask)
    keys = inputs[1].repeat_interleave(HEADS // KV_HEADS, dim=1)
    lse = torch.logsumexp(torch.einsum("qhd,khd->qhk", inputs[0], keys) * D**-0.5, dim=-1)
    assert error(attention(backend, inputs, mask)[1], lse) < TOLERANCE
    q, k, v, dout = (x.float() for x in inputs[:4])
    rows = backend.row_gradients(dout, None, expected[0].float(), lse.float())
    grads = backend.backward(rows, q, k, v, mask, D**-0.5)
    for a, e in zip((grads.dq, grads.dk, grads.dv), expected[2:], strict=True):
        assert error(a, e) < TOLERANCE


CU_SEQLENS = [0, 9, 17, 25, 37, 45, 57]
CU_SEQLENS_PADDED = [0, 12, 20, 28, 40, 48, 60]
LENGTHS = [b - a for a, b in pairwise(CU_SEQLENS)]


def zigzag(rank: int) -> Tensor:
    """The tokens of one of two ranks: the chunks `rank` and 3 - `rank` of the four of each padded sequence."""
    tokens: list[int] = []
    for begin, end in pairwise(CU_SEQLENS_PADDED):
        size = (end - begin) // 4
        for chunk in (rank, 3 - rank):
            tokens += range(begin + chunk * size, begin + (chunk + 1) * size)
    return torch.tensor(tokens, device=DEVICE)


def block_mask(starts: list[int], lengths: list[int], causal: bool) -> Tensor:
    """bool (60, 60): what is seen if the sequences had these starts and lengths."""
    tokens = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=False)]).to(DEVICE)
    visible = torch.zeros(60, 60, dtype=torch.bool, device=DEVICE)
    visible[tokens[:, None], tokens] = device_mask(packed(lengths, causal)).visible()
    return visible


def check_sequences_padded_one_by_one(
    backend: Backend, starts: list[int] = CU_SEQLENS_PADDED, lengths: list[int] = LENGTHS
) -> None:
    """Two ranks with zigzag chunks of sequences that each have padding of their own, full of garbage.

    starts, lengths: what the ring takes the sequences for.
    """
    padding = ~block_mask(CU_SEQLENS_PADDED, LENGTHS, False).any(dim=1)
    for causal in (True, False):
        alone = device_mask(packed(LENGTHS, causal))
        inputs = device_inputs(
            IntervalMask(*torch.zeros(2, 1, 60, dtype=torch.int32), 60), heads=1, kv_heads=1
        )
        for x in inputs:
            x[padding] = 7.0
        visible = block_mask(starts, lengths, causal)
        found = [torch.zeros_like(x) for x in (inputs[0], inputs[4], *inputs[:3])]
        blocks = [zigzag(rank) for rank in (0, 1)]
        for rank, own in enumerate(blocks):
            local = [inputs[0][own], inputs[1], inputs[2], inputs[3][own]]
            parts = [(keys, from_visible(visible[own][:, keys])) for keys in (own, blocks[1 - rank])]
            out, lse, dq, dk, dv = ring_attention(backend, local, parts)
            for total, rows in zip(found[:3], (out, lse, dq), strict=True):
                total[own] = rows.double()
            found[3] += dk
            found[4] += dv
        assert_equal([x[~padding] for x in found], exact([x[~padding] for x in inputs], alone))
        for x in (found[0], *found[2:]):
            assert torch.equal(x[padding], torch.zeros_like(x[padding]))


def check_odd_length(backend: Backend, length: int) -> None:
    # What the interpreter takes grows with the square of the length.
    for causal in (True, False) if length < 1000 else (True,):
        mask = device_mask(packed([length], causal))
        inputs = device_inputs(mask, heads=1, kv_heads=1)
        assert_equal(attention(backend, inputs, mask), exact(inputs, mask))


ODD_LENGTHS = (1, 63, 97, 111, 1025)
ODD = {length: partial(check_odd_length, length=length) for length in ODD_LENGTHS}
CHECKS: dict[str, tuple[Check, list[type[Backend]]]] = {
    "stale_keys": (check_ring_reads_current_keys, [wrong.StaleKeys, wrong.OverwritesAccumulators]),
    "ring_degree": (check_error_does_not_grow_with_the_ring, [wrong.HalfPrecisionPartials]),
    "empty_rows": (
        check_rows_that_see_nothing,
        [
            wrong.NanForEmptyRows,
            wrong.ZeroLseForEmptyRows,
            wrong.UnguardedMerge,
            wrong.NanGradientsForEmptyRows,
        ],
    ),
    "tail_padding": (check_tail_padding, [wrong.PaddingAttends, wrong.WholeTilesSeen]),
    "padding_gradients": (
        check_padding_gradients_are_zero,
        [wrong.PaddingGradientsUnwritten, wrong.PaddingAttends, wrong.OverwritesAccumulators],
    ),
    "fp16_dq": (check_dq_has_the_inputs_dtype, [wrong.Bf16Dq, wrong.DqThroughBf16]),
    "full_gradients": (check_full_attention_has_full_gradients, [wrong.CausalBackward]),
    "lse_base": (check_lse_is_a_natural_logarithm, [wrong.Base2Lse, wrong.ReadsBase2Lse]),
    "padded_one_by_one": (check_sequences_padded_one_by_one, [wrong.WholeTilesSeen]),
} | {
    f"odd_length_{length}": (
        check,
        [wrong.TailOfKeysDropped, wrong.ZeroKeysCounted, wrong.TailOfDkUnwritten],
    )
    for length, check in ODD.items()
}


# Scores of garbage overflow before they are hidden.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize(
    "backend",
    [
        "torch",
        pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")),
    ],
)
@pytest.mark.parametrize("name", CHECKS)
def test_our_backends_pass(name: str, backend: str) -> None:
    check, _ = CHECKS[name]
    check(get_backend(backend, torch.zeros(1, 1, D, device=DEVICE)))


@pytest.mark.parametrize(
    "name,variant", [(name, variant) for name, (_, variants) in CHECKS.items() for variant in variants]
)
def test_the_wrong_variant_does_not(name: str, variant: type[Backend]) -> None:
    check, _ = CHECKS[name]
    with pytest.raises(AssertionError):
        check(variant())


@pytest.mark.parametrize(
    "starts,lengths",
    [(CU_SEQLENS, LENGTHS), (CU_SEQLENS_PADDED, [b - a for a, b in pairwise(CU_SEQLENS_PADDED)])],
    ids=["unpadded starts", "padded lengths"],
)
def test_the_wrong_cu_seqlens_do_not(starts: list[int], lengths: list[int]) -> None:
    backend = get_backend("torch", torch.zeros(1, 1, D, device=DEVICE))
    with pytest.raises(AssertionError):
        check_sequences_padded_one_by_one(backend, starts, lengths)
