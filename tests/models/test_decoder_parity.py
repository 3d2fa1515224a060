"""The decoder against transformers: hidden states, logits and every gradient, at TP 1 and 2."""

import pytest

from megavila.runtime.topology import Topology
from tests.distributed import run_ranks
from tests.models.hf_reference import LanguageCase, decoder_errors, run_cases

TOLERANCE = 1e-5

CASES = [
    LanguageCase(),
    LanguageCase(family="qwen3"),
    LanguageCase(tied=True, tokens=64),
    LanguageCase(num_kv_heads=4, tokens=1),
    LanguageCase(num_kv_heads=1, recompute="full", tokens=33),
    LanguageCase(family="qwen3", num_kv_heads=1, head_dim=32, recompute="full", tokens=5),
]


def _check(errors: dict[str, float]) -> None:
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < TOLERANCE, (worst, errors[worst])
    assert len(errors) > 20


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_transformers_on_one_rank(case: LanguageCase, topology: Topology) -> None:
    _check(decoder_errors(case, topology))


def test_equals_transformers_on_two_tensor_parallel_ranks() -> None:
    cases = [*CASES, LanguageCase(family="qwen3", sequence_parallel=False)]
    for results in run_ranks(run_cases, 2, decoder_errors, cases, 2):
        for errors in results:
            _check(errors)
