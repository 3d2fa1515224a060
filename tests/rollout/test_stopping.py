"""Stop strings against decoding every prefix, with tokenizers that split characters and drop spaces."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megavila.data.tokenizer import Tokenizer, load_tokenizer
from megavila.rollout.stopping import StopChecker

TEXT = [
    "<think> so the ball – é€ – is left. </think> <answer> B</answer>",
    "答案是 B。 über uns </answer>\n\n",
    "a b  c .\n",
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT * 20, trainer)
    return backend


def metaspace() -> Backend:
    """As sentencepiece: a token's leading space is dropped at the start of a text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(TEXT * 20, trainers.BpeTrainer(vocab_size=120, special_tokens=["<end>"]))
    return backend


@pytest.fixture(scope="module", params=[byte_level, metaspace], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=request.param(), eos_token="<end>").save_pretrained(directory)
    return load_tokenizer(directory)


@pytest.mark.parametrize("stop", [("</answer>",), ("。", "é€"), (" ", "\n\n"), ("s the", "is"), ("> ",)])
def test_stops_where_decoding_every_prefix_would(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    generator = random.Random(0)
    checker = StopChecker(tokenizer, stop)
    words = [tokenizer.encode(text) for text in TEXT]
    stopped = 0
    for _ in range(60):
        ids: list[int] = []
        for _ in range(6):
            start = generator.randrange(40)
            ids += generator.choice(words)[start : start + generator.randrange(12)]
            ids.append(generator.randrange(1, tokenizer.vocab_size))
        first = next(
            (n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stop)), None
        )
        found = next((n for n in range(1, len(ids) + 1) if checker.completes(ids[:n])), None)
        assert found == first
        text = checker.text(ids if first is None else ids[:first])
        assert sum(s in text for s in stop) == (first is not None) or len(stop) > 1
        assert first is None or text.endswith(stop)
        stopped += first is not None
    assert stopped > 5


def test_end_of_sequence_is_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b")
    assert StopChecker(tokenizer, ()).text([*ids, tokenizer.eos_id]) == tokenizer.decode(ids)
    assert StopChecker(tokenizer, ("b",)).text([tokenizer.eos_id]) == ""
