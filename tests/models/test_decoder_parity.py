"""The decoder against transformers: hidden states, logits and every gradient, on one rank."""

import pytest

from megavila.runtime.topology import Topology
from tests.models.hf_reference import CASES, LanguageCase, check_errors, decoder_errors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_transformers_on_one_rank(case: LanguageCase, topology: Topology) -> None:
    check_errors(decoder_errors(case, topology))
