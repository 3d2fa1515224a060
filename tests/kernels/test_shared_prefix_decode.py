"""Shared-prefix decoding against the specification in fp64; the kernels in Triton's interpreter without a GPU."""

import importlib
from importlib.util import find_spec

import pytest
import torch
from megavila_kernels.shared_prefix_decode import DecodeGroups, shared_prefix_decode
from megavila_kernels.shared_prefix_decode.reference import reference_shared_prefix_decode
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT16, FLOAT32, BFLOAT16 = torch.float16, torch.float32, torch.bfloat16
TRITON = pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"))

# Prompt lengths, rows of each group, own tokens, query heads, K/V heads, head dimension.
Case = tuple[list[int], list[int], int, int, int, int]
CASES: dict[str, Case] = {
    "one_key": ([1], [1], 1, 1, 1, 32),
    "one_row": ([63], [1], 1, 4, 4, 64),
    "gqa7": ([1025, 97], [8, 5], 111, 14, 2, 60),
    "gqa8": ([111, 300, 1], [3, 3, 3], 63, 8, 1, 80),
    "gqa4": ([63, 2, 257], [1, 7, 2], 97, 8, 2, 32),
    "no_group_sharing": ([31, 64, 500], [1, 1, 1], 2, 3, 3, 128),
    "empty_group": ([40, 600, 20], [2, 0, 1], 5, 4, 2, 48),
    "wide_heads": ([111, 70], [2, 3], 9, 4, 1, 256),
    "several_tiles_of_rows": ([70], [40], 3, 8, 2, 33),
    "two_groups": ([300, 17], [3, 2], 40, 4, 2, 40),
    "long_responses": ([5, 9], [1, 2], 700, 2, 1, 40),
}


def make_inputs(case: Case, room: int = 0) -> tuple[list[Tensor], DecodeGroups, Tensor, Tensor]:
    """q, prompt K/V, own K/V in fp64, representable in fp16 and bf16; with `room` more tokens of garbage."""
    lengths, rows, own, heads, kv_heads, d = case
    generator = torch.Generator().manual_seed(d)
    n, tokens = sum(rows), max(lengths) + room
    shapes = [(n, heads, d), *[(len(lengths), kv_heads, tokens, d)] * 2, *[(n, kv_heads, own, d)] * 2]
    tensors = [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]
    for prompt, length in enumerate(lengths):
        for x in tensors[1:3]:
            x[prompt, :, length:] = 50.0  # garbage, but finite
    prompt_of_row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(rows))
    groups = DecodeGroups(prompt_of_row, torch.tensor(lengths), torch.device(DEVICE))
    return [x.to(DEVICE) for x in tensors], groups, prompt_of_row, torch.tensor(lengths)


def run(inputs: list[Tensor], groups: DecodeGroups, dtype: torch.dtype, backend: str) -> Tensor:
    return shared_prefix_decode(*(x.to(dtype) for x in inputs), groups, backend=backend)


def expected_of(inputs: list[Tensor], prompt_of_row: Tensor, lengths: Tensor) -> Tensor:
    scale = inputs[0].shape[-1] ** -0.5
    return reference_shared_prefix_decode(*inputs, prompt_of_row, lengths, scale)


def same_precision(
    inputs: list[Tensor], prompt_of_row: Tensor, lengths: Tensor, dtype: torch.dtype
) -> Tensor:
    """Ordinary torch operations in `dtype`, row by row: the yardstick for our rounding errors."""
    q, prompt_keys, prompt_values, own_keys, own_values = (x.to(dtype) for x in inputs)
    repeat = q.shape[1] // own_keys.shape[1]
    rows = []
    for row, prompt in enumerate(prompt_of_row.tolist()):
        keys, values = (
            torch.cat([shared[prompt, :, : lengths[prompt]], own[row]], dim=1).repeat_interleave(
                repeat, dim=0
            )
            for shared, own in ((prompt_keys, own_keys), (prompt_values, own_values))
        )
        scores = (q[row, :, None] @ keys.mT) * q.shape[-1] ** -0.5
        rows.append((scores.softmax(dim=-1) @ values)[:, 0])
    return torch.stack(rows)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def assert_within_yardstick(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs, groups, *lengths = make_inputs(case)
    actual, expected = run(inputs, groups, dtype, backend), expected_of(inputs, *lengths)
    assert actual.dtype == dtype and actual.is_contiguous()
    # What torch computes exactly (one key: out = v) leaves us one rounding.
    floor = torch.finfo(dtype).eps / 4
    assert error(actual, expected) <= 2 * max(error(same_precision(inputs, *lengths, dtype), expected), floor)


@pytest.mark.parametrize("name", CASES)
def test_torch_equals_the_specification(name: str) -> None:
    inputs, groups, *lengths = make_inputs(CASES[name], room=3)
    actual = run(inputs, groups, torch.float64, "torch")
    torch.testing.assert_close(actual, expected_of(inputs, *lengths), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_within_the_error_of_a_same_precision_run(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    assert_within_yardstick(CASES[name], dtype, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("d", [32, 60, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_compiled_kernels_within_the_error_of_a_same_precision_run(d: int, dtype: torch.dtype) -> None:
    for rows in (1, 16):
        assert_within_yardstick(([4099, 1, 511], [rows, 2, rows], 301, 14, 2, d), dtype, "triton")


@pytest.mark.gpu
def test_long_prompts_on_a_gpu() -> None:
    assert_within_yardstick(([131_071, 40_000], [8, 4], 1025, 28, 4, 128), BFLOAT16, "triton")


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_garbage_behind_a_prompt_and_strides_do_not_matter(backend: str) -> None:
    """Caches hold keys transposed and more room than tokens."""
    case = CASES["two_groups"]
    inputs, groups, *_ = make_inputs(case)
    q, prompt_keys, prompt_values, own_keys, own_values = (x.float() for x in inputs)
    plain = shared_prefix_decode(q, prompt_keys, prompt_values, own_keys, own_values, groups, backend=backend)
    roomy = [x.float() for x in make_inputs(case, room=7)[0][1:3]]
    for x, y in zip(roomy, (prompt_keys, prompt_values), strict=True):
        x[:, :, : y.shape[2]] = y
    strided = shared_prefix_decode(
        torch.cat([q, q], dim=1)[:, : q.shape[1]],
        roomy[0].mT.contiguous().mT,
        roomy[1],
        torch.cat([own_keys, own_keys], dim=2)[:, :, : own_keys.shape[2]],
        own_values.transpose(0, 1).contiguous().transpose(0, 1),
        groups,
        backend=backend,
    )
    assert error(strided, plain.double()) < 1e-6


def test_a_rows_result_does_not_depend_on_the_other_groups() -> None:
    """The spans of a prompt depend on its own length only, so not a bit may change."""
    pytest.importorskip("triton")
    inputs, groups, *_ = make_inputs(CASES["two_groups"])
    together = run(inputs, groups, FLOAT16, "triton")
    for group, rows in enumerate((slice(0, 3), slice(3, 5))):
        length = torch.tensor([(300, 17)[group]])
        alone = DecodeGroups(
            torch.zeros(rows.stop - rows.start, dtype=torch.long), length, torch.device(DEVICE)
        )
        part = [
            inputs[0][rows],
            *(x[group : group + 1] for x in inputs[1:3]),
            *(x[rows] for x in inputs[3:]),
        ]
        assert torch.equal(run(part, alone, FLOAT16, "triton"), together[rows])


@pytest.mark.parametrize("kv_heads", [1, 2, 7, 32])
def test_the_grid_has_a_program_for_every_span(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("megavila_kernels.shared_prefix_decode.triton_kernels")
    for length in [*range(1, 600), 65_535, 65_536, 65_537, 131_071, 1_000_003]:
        span = kernels.keys_per_span(length, kv_heads)
        spans = -(-length // span)
        # What the interface launches for a prompt of this length, alone or beside a longer one.
        assert spans <= min(-(-kernels.SPANS // kv_heads), -(-length // kernels.SPAN_UNIT))
        assert span % kernels.SPAN_UNIT == 0 and (spans - 1) * span < length


def test_the_merge_weighs_the_parts() -> None:
    """A prompt whose scores are far above or below the row's own: dropping either part would be seen."""
    pytest.importorskip("triton")
    inputs, groups, *lengths = make_inputs(CASES["two_groups"])
    for factor in (4.0, 0.25):
        inputs[1] *= factor
        expected = expected_of(inputs, *lengths)
        assert error(run(inputs, groups, FLOAT32, "triton"), expected) < 1e-5
        own_only = inputs[:3] + [inputs[3], inputs[4] * 0]
        assert error(expected_of(own_only, *lengths), expected) > 1e-2


def test_mistakes_are_named() -> None:
    inputs, groups, prompt_of_row, lengths = make_inputs(CASES["gqa4"])
    q, prompt_keys, prompt_values, own_keys, own_values = inputs
    with pytest.raises(ValueError, match="of 10 rows and 3 prompts; got 9 and 3"):
        shared_prefix_decode(q[1:], prompt_keys, prompt_values, own_keys[1:], own_values[1:], groups)
    with pytest.raises(ValueError, match="longest prompt has 257 tokens .* got 256 prompt keys and 97"):
        shared_prefix_decode(
            q, prompt_keys[:, :, :256], prompt_values[:, :, :256], own_keys, own_values, groups
        )
    with pytest.raises(ValueError, match="7 query heads cannot share 2 K/V heads"):
        shared_prefix_decode(q[:, :7], prompt_keys, prompt_values, own_keys, own_values, groups)
    with pytest.raises(ValueError, match="heads or head dimensions differ"):
        shared_prefix_decode(q, prompt_keys, prompt_values, own_keys[:, :1], own_values[:, :1], groups)
    with pytest.raises(ValueError, match="expected q"):
        shared_prefix_decode(q[0], prompt_keys, prompt_values, own_keys, own_values, groups)
    with pytest.raises(ValueError, match="unknown decoding attention backend 'fast'"):
        shared_prefix_decode(*inputs, groups, backend="fast")
    with pytest.raises(ValueError, match="must be ascending"):
        DecodeGroups(prompt_of_row.flip(0), lengths, torch.device("cpu"))
    with pytest.raises(ValueError, match="at least one token; got 10 rows and prompts of .0, "):
        DecodeGroups(prompt_of_row, lengths * torch.tensor([0, 1, 1]), torch.device("cpu"))
    with pytest.raises(ValueError, match="there are 2"):
        DecodeGroups(prompt_of_row, lengths[:2], torch.device("cpu"))
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="torch.float64 is not one of"):
        shared_prefix_decode(*inputs, groups, backend="triton")
