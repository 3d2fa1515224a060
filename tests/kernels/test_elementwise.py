"""Rotary embeddings and SwiGLU against their specifications in fp64; in Triton's interpreter without a GPU."""

from collections.abc import Callable

import pytest
import torch
from megavila_kernels.rotary import rotate
from megavila_kernels.rotary.reference import reference_rotate
from megavila_kernels.swiglu import swiglu
from megavila_kernels.swiglu.reference import reference_swiglu
from torch import Tensor

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT16, FLOAT32, BFLOAT16, FLOAT64 = torch.float16, torch.float32, torch.bfloat16, torch.float64
Op = Callable[[Tensor], Tensor]


def forward_and_backward(op: Op, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = op(x)
    return [out.detach(), torch.autograd.grad(out, x, upstream.to(out.dtype))[0]]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def assert_within_yardstick(
    fused: Op, reference: Op, x: Tensor, upstream: Tensor, dtype: torch.dtype
) -> None:
    """At most 2x (output) or 3x (gradient) the error of the same formula in torch in the same precision."""
    expected = forward_and_backward(reference, x, upstream)
    yardstick = forward_and_backward(reference, x.to(dtype), upstream)
    actual = forward_and_backward(fused, x.to(dtype), upstream)
    for factor, a, y, e in zip((2, 3), actual, yardstick, expected, strict=True):
        assert a.dtype == dtype and e.norm() > 0
        assert error(a, e) <= factor * max(error(y, e), torch.finfo(dtype).eps / 4)


def angles(tokens: int, d: int, axes: int) -> tuple[Tensor, Tensor]:
    """cos and sin in fp64 of far positions out of order; with three axes each turns its own frequencies."""
    generator = torch.Generator().manual_seed(tokens)
    positions = torch.randint(0, 100_000, (axes, tokens), generator=generator)
    frequencies = 1e6 ** (-torch.arange(0, d, 2, dtype=FLOAT64) / d)
    angle = positions[torch.arange(d // 2) % axes].T * frequencies
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def rotary_inputs(tokens: int, heads: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads)
    x, upstream = torch.randn(2, tokens, heads, d, generator=generator).bfloat16().double().to(DEVICE)
    return x, upstream


ROTARY_SIZES = [(1, 1, 32), (63, 7, 60), (97, 4, 80), (111, 2, 128), (5, 28, 256), (31, 3, 2)]


@pytest.mark.parametrize("tokens,heads,d", ROTARY_SIZES)
@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=["fp16", "fp32"])
def test_rotary(tokens: int, heads: int, d: int, axes: int, dtype: torch.dtype) -> None:
    cos, sin = angles(tokens, d, axes)
    x, upstream = rotary_inputs(tokens, heads, d)
    assert_within_yardstick(
        # The table is fp32 as the model's is, so angles of the reference are those that it holds.
        lambda y: rotate(y, cos.float(), sin.float(), backend="triton"),
        lambda y: reference_rotate(y, cos.float(), sin.float()),
        x,
        upstream,
        dtype,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens,heads,d", [*ROTARY_SIZES, (4097, 28, 128)])
def test_rotary_compiled(tokens: int, heads: int, d: int) -> None:
    test_rotary(tokens, heads, d, axes=3, dtype=BFLOAT16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rotary_equals_transformers_and_rounds_once(backend: str) -> None:
    transformers = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    cos, sin = (x.float() for x in angles(63, 60, 1))
    x, upstream = rotary_inputs(63, 7, 60)

    def theirs(y: Tensor) -> Tensor:
        c, s = (torch.cat([table, table], dim=-1)[None].to(y.dtype) for table in (cos, sin))
        return transformers.apply_rotary_pos_emb(y[None], y[None], c, s, unsqueeze_dim=2)[0][0]

    def ours(y: Tensor) -> Tensor:
        return rotate(y, cos, sin, backend=backend)

    for a, e in zip(
        forward_and_backward(ours, x.float(), upstream),
        forward_and_backward(theirs, x, upstream),
        strict=True,
    ):
        assert error(a, e) < 1e-7 * 2
    low = ours(x.half())
    assert torch.equal(low, ours(x.float()).half())
    assert not torch.equal(low, theirs(x.half()))  # rounds its cosines: a kernel that did would be seen


def test_rotary_of_views_into_a_fused_projection() -> None:
    cos, sin = (x.float() for x in angles(33, 32, 1))
    fused = rotary_inputs(33, 9, 32)[0].float()
    queries = fused.split([6, 2, 1], dim=1)[1]
    assert torch.equal(
        rotate(queries, cos, sin, backend="triton"), rotate(queries.contiguous(), cos, sin, backend="triton")
    )
    # A gradient with other strides, as a transposed layout would send.
    x = queries.clone().requires_grad_()
    upstream = fused[:, :2].transpose(0, 1).contiguous().transpose(0, 1)
    (grad,) = torch.autograd.grad(rotate(x, cos, sin, backend="triton"), x, upstream)
    assert error(grad, reference_rotate(upstream.double(), cos, -sin)) < 2e-7


SWIGLU_SHAPES = [(1, 2), (63, 2 * 97), (7, 2 * 1025), (3, 5, 2 * 64), (0, 8)]


@pytest.mark.parametrize("shape", SWIGLU_SHAPES[:-1])
@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=["fp16", "fp32"])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    x = (3 * torch.randn(shape, generator=generator)).bfloat16().double().to(DEVICE)
    upstream = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator).bfloat16().double().to(DEVICE)
    assert_within_yardstick(lambda y: swiglu(y, backend="triton"), reference_swiglu, x, upstream, dtype)
    # The two halves must not be taken for each other, nor interleaved.
    swapped = torch.cat([*reversed(x.chunk(2, dim=-1))], dim=-1)
    assert error(swiglu(swapped.to(dtype), backend="triton"), reference_swiglu(x)) > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SWIGLU_SHAPES[:-1], (4097, 2 * 18944)])
def test_swiglu_compiled(shape: tuple[int, ...]) -> None:
    test_swiglu(shape, BFLOAT16)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_swiglu_of_extreme_gates_is_finite() -> None:
    gate = torch.tensor([-1e4, -200.0, -0.0, 200.0, 1e4])
    x = torch.cat([gate, torch.ones(5)])[None].to(DEVICE)
    upstream = torch.ones(1, 5, dtype=FLOAT64, device=DEVICE)
    for a, e in zip(
        forward_and_backward(lambda y: swiglu(y, backend="triton"), x, upstream),
        forward_and_backward(reference_swiglu, x.double(), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_swiglu_of_strided_and_empty_inputs(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 4, 14, generator=generator).to(DEVICE)
    for x in (wide[:, ::2, :10], wide.transpose(0, 1)[..., 2:14], wide[:0], wide.mT[..., :4]):
        upstream = torch.randn((*x.shape[:-1], x.shape[-1] // 2), generator=generator).to(DEVICE)
        actual = forward_and_backward(lambda y: swiglu(y, backend=backend), x, upstream)
        expected = forward_and_backward(reference_swiglu, x.double(), upstream)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)
        # As a view, whose strides a copy would hide.
        with torch.no_grad():
            torch.testing.assert_close(swiglu(x, backend=backend).double(), expected[0], rtol=1e-5, atol=1e-6)


def test_mistakes_are_named() -> None:
    cos, sin = angles(4, 8, 1)
    with pytest.raises(ValueError, match=r"got \(4, 2, 6\), \(4, 4\)"):
        rotate(torch.zeros(4, 2, 6), cos, sin)
    with pytest.raises(ValueError, match="unknown rotary backend 'fast'"):
        rotate(torch.zeros(4, 2, 8), cos, sin, backend="fast")
    with pytest.raises(ValueError, match=r"side by side; got \(3, 5\)"):
        swiglu(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="SwiGLU kernels cannot run: dtype torch.float64"):
        swiglu(torch.zeros(3, 4, dtype=FLOAT64), backend="triton")
