"""The Triton backend against the dense fp64 specification: on a GPU as compiled, elsewhere in Triton's
interpreter.

The interpreter multiplies bf16 wrongly, so bf16 is tested on a GPU only. What other implementations got wrong is in
test_regressions.py.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from megavila_kernels import IntervalMask, attend, choice
from megavila_kernels.interval_attention import get_backend, zero_gradients
from megavila_kernels.interval_attention.tile_runs import build_tile_runs
from torch import Tensor

from tests.kernels.test_interval_attention import (
    CASES,
    Case,
    error,
    make_inputs,
    make_mask,
    packed,
    ragged,
    run,
    same_precision,
    shared_prefix,
)

pytest.importorskip("triton")
from megavila_kernels.interval_attention import triton_backend  # noqa: E402
from megavila_kernels.interval_attention.triton_config import unsupported  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT16, FLOAT32, BFLOAT16 = torch.float16, torch.float32, torch.bfloat16
TRITON = get_backend("triton", torch.zeros(1, 1, 32))

TE_PADDED: Case = (  # cu_seqlens [0, 9, 17, 25, 37, 45, 57] padded to [0, 12, 20, 28, 40, 48, 60]
    [[0] * 12 + [12] * 8 + [20] * 8 + [28] * 12 + [40] * 8 + [48] * 12],
    [[]],
    60,
)
for _start, _end, _length in zip(
    [0, 12, 20, 28, 40, 48], [12, 20, 28, 40, 48, 60], [9, 8, 8, 12, 8, 12], strict=True
):
    TE_PADDED[1][0] += [i + 1 if i < _start + _length else _start for i in range(_start, _end)]

ALL_CASES = CASES | {
    "causal97": packed([97], causal=True),
    "causal111": packed([111], causal=True),
    "full63": packed([63], causal=False),
    "te_padded": TE_PADDED,
    "three_intervals": ([[0] * 70, [30] * 70, [50] * 70], [[7] * 70, [41] * 70, [50, 90] * 35], 90),
}

# A covering subset of (mask, query heads per K/V head, head dimension, dtype): every value of each occurs with
# both dtypes or several of the others.
COVERING = [
    ("one", 1, 32, FLOAT16),
    ("one", 8, 60, FLOAT32),
    ("causal63", 4, 64, FLOAT16),
    ("causal97", 7, 80, FLOAT16),
    ("causal111", 1, 128, FLOAT32),
    ("full63", 8, 128, FLOAT16),
    ("full97", 4, 60, FLOAT16),
    ("packed_causal", 1, 60, FLOAT16),
    ("packed_full", 4, 32, FLOAT32),
    ("packed_full", 1, 256, FLOAT16),
    ("shared_prefix", 4, 128, FLOAT16),
    ("shared_prefix_padded", 4, 64, FLOAT32),
    ("shared_prefix_padded", 8, 80, FLOAT16),
    ("shared_prefix_padded", 1, 256, FLOAT32),
    ("ragged", 7, 64, FLOAT16),
    ("ragged", 1, 80, FLOAT32),
    ("te_padded", 1, 64, FLOAT16),
    ("te_padded", 7, 32, FLOAT32),
    ("three_intervals", 1, 32, FLOAT16),
    ("three_intervals", 4, 80, FLOAT32),
    ("decode", 8, 128, FLOAT16),
    ("empty", 4, 60, FLOAT16),
]


def on_device(mask: IntervalMask, inputs: list[Tensor]) -> tuple[IntervalMask, list[Tensor]]:
    moved = IntervalMask(mask.lo.to(DEVICE), mask.hi.to(DEVICE), mask.tokens_k)
    return moved, [x.to(DEVICE) for x in inputs]


def assert_within_yardstick(
    actual: list[Tensor], inputs: list[Tensor], mask: IntervalMask, dtype: torch.dtype
):
    """flash-attention's rule: at most 2x (outputs) or 3x (gradients) the error of the same sums in torch."""
    expected = run(inputs, mask, torch.float64, "reference", lse_grad=False)
    yardstick = same_precision(inputs, mask, dtype)
    for factor, a, y, e in zip(
        (2, 3, 3, 3), [actual[0], *actual[2:]], yardstick, [expected[0], *expected[2:]], strict=True
    ):
        assert a.dtype == dtype
        if e.norm() < 1e-9:
            # Nothing seen: exactly zero. One key seen: dp - delta cancels up to the rounding of its terms.
            seen = bool(mask.visible().any())
            assert a.double().norm() <= (1e-6 * inputs[2].norm() * inputs[3].norm() if seen else 0.0)
            continue
        # What torch computes exactly (one key: out = v) leaves us one rounding.
        floor = torch.finfo(dtype).eps / 4
        assert error(a, e) <= factor * max(error(y, e), floor), (factor, error(a, e), error(y, e))
    seen = torch.isfinite(expected[1])
    assert actual[1].dtype == FLOAT32
    assert torch.equal(torch.isfinite(actual[1]), seen)
    # Never rounded to the input's dtype: bf16 would leave an error of 1e-3.
    assert error(actual[1][seen], expected[1][seen]) < 1e-6


@pytest.mark.parametrize("name,repeat,d,dtype", COVERING)
def test_within_the_error_of_a_same_precision_run(name: str, repeat: int, d: int, dtype: torch.dtype) -> None:
    mask = make_mask(ALL_CASES[name])
    kv_heads = 2 if repeat == 1 else 1
    mask, inputs = on_device(mask, make_inputs(mask, kv_heads * repeat, kv_heads, d, seed=d + repeat))
    if reason := unsupported(inputs[0].to(dtype)):
        pytest.skip(reason)
    actual = run(inputs, mask, dtype, "triton", lse_grad=False)
    assert_within_yardstick(actual, inputs, mask, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [32, 60, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("name", ALL_CASES)
def test_compiled_kernels_within_the_error_of_a_same_precision_run(
    name: str, d: int, dtype: torch.dtype
) -> None:
    mask = make_mask(ALL_CASES[name])
    mask, inputs = on_device(mask, make_inputs(mask, 8, 2, d))
    assert_within_yardstick(run(inputs, mask, dtype, "triton", lse_grad=False), inputs, mask, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
def test_long_sequences_on_a_gpu(d: int) -> None:
    mask = make_mask(shared_prefix([(2777, [301, 64, 129]), (900, [77])]))
    mask, inputs = on_device(mask, make_inputs(mask, 14, 2, d))
    assert_within_yardstick(run(inputs, mask, BFLOAT16, "triton", lse_grad=False), inputs, mask, BFLOAT16)


def test_length_1025() -> None:
    mask = make_mask(packed([1025], causal=True))
    mask, inputs = on_device(mask, make_inputs(mask, 1, 1, 64))
    assert_within_yardstick(run(inputs, mask, FLOAT16, "triton", lse_grad=False), inputs, mask, FLOAT16)


def test_gradient_that_arrives_at_the_lse() -> None:
    mask = make_mask(CASES["shared_prefix_padded"])
    mask, inputs = on_device(mask, make_inputs(mask, 4, 2, 32))
    actual = run(inputs, mask, FLOAT32, "triton", lse_grad=True)
    expected = run(inputs, mask, torch.float64, "reference", lse_grad=True)
    without = run(inputs, mask, torch.float64, "reference", lse_grad=False)
    for index in (2, 3):
        assert error(actual[index], expected[index]) < 1e-6
        assert error(without[index], expected[index]) > 0.1  # the test would notice a dropped gradient


def test_equals_sdpa_sequence_by_sequence() -> None:
    lengths = [1, 63, 111]
    mask = make_mask(packed(lengths, causal=True))
    mask, inputs = on_device(mask, make_inputs(mask, 4, 2, 80))
    actual = run(inputs, mask, FLOAT32, "triton", lse_grad=False)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        q, k, v = (x[rows].transpose(0, 1)[None].clone().requires_grad_() for x in inputs[:3])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        grads = torch.autograd.grad(out, (q, k, v), inputs[3][rows].transpose(0, 1)[None])
        for a, e in zip([actual[0], *actual[2:]], [out, *grads], strict=True):
            expected = e[0].transpose(0, 1)
            assert (a[rows] - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)
        start += length


def test_views_into_a_fused_projection_are_read_in_place() -> None:
    mask = make_mask(packed([70], causal=True))
    mask, (q, k, v, upstream, _) = on_device(mask, make_inputs(mask, 4, 2, 32))
    fused = torch.cat([q, k, v], dim=1).to(FLOAT32).requires_grad_()
    views = fused.split([4, 2, 2], dim=1)
    out, _ = attend(*views, mask, backend="triton")
    # A gradient with other strides than out's, as a transposed layout would send.
    strided = upstream.to(FLOAT32).transpose(0, 1).contiguous().transpose(0, 1)
    (grad,) = torch.autograd.grad(out, fused, strided)
    expected = run([q, k, v, upstream, upstream[..., 0]], mask, torch.float64, "reference", lse_grad=False)
    assert error(out.detach(), expected[0]) < 1e-6
    assert error(grad, torch.cat(expected[2:], dim=1)) < 1e-6


def test_backward_is_deterministic() -> None:
    mask = make_mask(CASES["ragged"])
    mask, inputs = on_device(mask, make_inputs(mask, 8, 2, 32))
    first, second = (run(inputs, mask, FLOAT16, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_visible_pair_is_visited_once() -> None:
    """The tile runs, expanded, against the dense mask; a full run must hold no hidden pair."""
    for case in (*CASES.values(), ragged(300, 190, seed=3), ALL_CASES["three_intervals"]):
        mask = make_mask(case)
        visible = mask.visible()
        for block_q, block_k, by_keys in ((16, 32, False), (32, 16, True), (64, 64, True)):
            plan = build_tile_runs(mask, block_q, block_k, by_keys, torch.device("cpu"))
            visits = torch.zeros_like(visible, dtype=torch.int32)
            for tile, full, masked, end in plan.table.tolist():
                for number in range(full, end):
                    for other in range(*plan.runs[number].tolist()):
                        q_tile, k_tile = (other, tile) if by_keys else (tile, other)
                        rows = slice(q_tile * block_q, (q_tile + 1) * block_q)
                        keys = slice(k_tile * block_k, (k_tile + 1) * block_k)
                        visits[rows, keys] += 1
                        if number < masked:
                            assert visible[rows, keys].all() and keys.stop <= mask.tokens_k
                            assert not by_keys or rows.stop <= mask.tokens_q
            assert visits.max() <= 1 and (visits[visible] == 1).all()
            work = plan.table[:, 3] - plan.table[:, 1]
            assert sorted(plan.table[:, 0].tolist()) == list(range(len(work)))


def test_hidden_tiles_are_skipped() -> None:
    causal = build_tile_runs(make_mask(packed([1024], True)), 64, 64, False, torch.device("cpu"))
    full = build_tile_runs(make_mask(packed([1024], False)), 64, 64, False, torch.device("cpu"))
    assert (causal.visits, full.visits) == (16 * 17 // 2, 16 * 16)


def test_unsupported_inputs_are_named() -> None:
    mask = make_mask(packed([4], causal=True))
    mask, (q, *_) = on_device(mask, make_inputs(mask, 1, 1, 300))
    with pytest.raises(ValueError, match="torch.float64 is not one of"):
        attend(q, q, q, mask, backend="triton")
    with pytest.raises(ValueError, match="head dimension 300 is greater than 256"):
        attend(*[q.half()] * 3, mask, backend="triton")
    with pytest.raises(ValueError, match="scale above 0; got -1"):
        attend(*[q[..., :32].half()] * 3, mask, scale=-1.0, backend="triton")
    gpu = torch.empty(1, 1, 129, device="meta")
    assert "greater than 128, the limit in fp32 on a GPU" in (unsupported(gpu) or "")
    assert unsupported(gpu.half()) is None and unsupported(gpu[..., :128]) is None


def test_auto_warns_when_a_gpu_must_do_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_triton_missing", lambda: "triton cannot be imported (no such module)")
    choice._warn_once.cache_clear()
    query = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    with pytest.warns(UserWarning, match="plain torch.*triton cannot be imported"):
        chosen = get_backend("auto", query)  # type: ignore[arg-type]
    assert type(chosen).__name__ == "TorchBackend"
    with pytest.raises(ValueError, match="triton cannot be imported"):
        get_backend("triton", query)  # type: ignore[arg-type]


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu() -> None:
    def query(device: str) -> Tensor:
        return types.SimpleNamespace(  # type: ignore[return-value]
            device=types.SimpleNamespace(type=device), dtype=BFLOAT16, shape=(5, 4, 128)
        )

    assert isinstance(get_backend("auto", query("cuda")), triton_backend.TritonBackend)
    assert type(get_backend("auto", query("cpu"))).__name__ == "TorchBackend"


def test_accumulators_must_be_contiguous() -> None:
    mask = make_mask(packed([4], causal=True))
    mask, inputs = on_device(mask, make_inputs(mask, 2, 2, 32))
    q, k, v, dout = (x.half() for x in inputs[:4])
    out, lse = TRITON.forward(q, k, v, mask, 1.0)
    into = zero_gradients(q, k, v)
    wrong = type(into)(into.dq.transpose(0, 1), into.dk, into.dv)
    with pytest.raises(ValueError, match="must be contiguous"):
        TRITON.backward(TRITON.row_gradients(dout, None, out, lse), q, k, v, mask, 1.0, wrong)
