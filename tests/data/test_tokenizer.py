"""Tokenizers against the libraries they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megavila.data import Row, build_word_tokenizer, load_tokenizer
from megavila.rewards import accuracy, extract_answer, has_form
from megavila.runtime.errors import MegavilaError

CORPUS = [
    "the ball is under the left cup, at 8.5 s",
    "naïve café 数える",
    "<think> a </think> <answer>B</answer>",
] * 20


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE tokenizer with chat and media tokens, saved as transformers does."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"]
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<image>")]
    )
    folder = tmp_path_factory.mktemp("bpe")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sp")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


TEXTS = (
    "",
    "the ball",
    "<|im_start|>user\nthe ball<|im_end|>\n",
    "naïve 数 <image> \n\n x",
    "<answer>B</answer>",
)


def test_hugging_face_directory(byte_level: Path) -> None:
    reference = AutoTokenizer.from_pretrained(str(byte_level))
    tokenizer = load_tokenizer(byte_level)
    assert tokenizer.directory == byte_level
    assert (tokenizer.eos_id, tokenizer.pad_id) == (reference.eos_token_id, reference.pad_token_id)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.token_id("<image>") == reference.convert_tokens_to_ids("<image>")
    assert tokenizer.token_id("<absent>") is None
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_special_tokens_in_others_text_are_text(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    text = "is <image> left?<|im_end|>"
    assert tokenizer.has_special(text) and not tokenizer.has_special("<video>")
    special = {tokenizer.token_id("<image>"), tokenizer.eos_id}
    assert special <= set(tokenizer.encode(text))
    literal = tokenizer.encode_literal(text)
    assert not special & set(literal)
    assert tokenizer.decode(literal) == text
    assert tokenizer.encode_literal("the ball") == tokenizer.encode("the ball")


def test_tokenizer_json_alone(byte_level: Path, tmp_path: Path) -> None:
    whole = load_tokenizer(byte_level)
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    for path in (tmp_path / "tokenizer.json", tmp_path):
        alone = load_tokenizer(path)
        assert alone.eos_id == whole.eos_id and alone.vocab_size == whole.vocab_size
        for text in TEXTS:
            assert alone.encode(text) == whole.encode(text)


def test_sentencepiece_model(pieces: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    for path in (pieces, pieces / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (reference.vocab_size(), reference.eos_id())
        assert tokenizer.pad_id == reference.eos_id()  # trained without padding
        assert tokenizer.prefix_ids == (reference.bos_id(),)
        for text in ("the ball is left", "at 8.5 s", "naïve café"):
            ids = tokenizer.encode(text)
            assert ids == tokenizer.encode_literal(text) == reference.encode(text)
            assert tokenizer.decode([reference.bos_id(), *ids, tokenizer.eos_id]) == text
        assert tokenizer.token_id("</s>") == reference.eos_id()
        assert tokenizer.token_id("<no such piece>") is None


def test_begin_of_sequence_token_of_a_hugging_face_tokenizer(byte_level: Path, tmp_path: Path) -> None:
    from tokenizers import processors

    backend = Backend.from_file(str(byte_level / "tokenizer.json"))
    start = backend.token_to_id("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prefix_ids == (start,) and start not in tokenizer.encode("the ball")


def test_word_level(tmp_path: Path) -> None:
    trace = "t0 ball left ; t8 swap left middle -> middle ; so middle"
    texts = [trace, "Where is the ball?\nA: left\nB: at 8.5", "it's 3rd"]
    folder = build_word_tokenizer(texts, tmp_path / "words")
    tokenizer = load_tokenizer(folder)
    assert folder == tmp_path / "words" == tokenizer.directory
    response = f"<think> {trace} </think> <answer>B</answer>"
    ids = tokenizer.encode_literal(response)
    assert len(ids) == len(trace.split()) + 5 and ids == tokenizer.encode(response)
    text = tokenizer.decode([*ids, tokenizer.eos_id])
    assert text == f"<think> {trace} </think> <answer> B </answer>"
    assert has_form(text) and extract_answer(text) == "B"
    row = Row("1", "Where?\nA: left\nB: middle", problem_type="multiple choice", answer="B")
    assert accuracy(row, text) == 1.0
    unknown = tokenizer.token_id("<unk>")
    assert unknown is not None
    for known in texts:
        assert unknown not in tokenizer.encode(known)
    assert unknown in tokenizer.encode("elephant")
    media = tokenizer.token_id("<media>")
    assert media in tokenizer.encode("<media>") and media not in tokenizer.encode_literal("the <media> ball")
    assert len({tokenizer.eos_id, tokenizer.pad_id, media, unknown}) == 4
    assert tokenizer.encode("8.5") != tokenizer.encode("8 . 5") and len(tokenizer.encode("8.5")) == 1


def test_word_level_is_reproducible(tmp_path: Path) -> None:
    files = [
        build_word_tokenizer(texts, tmp_path / n) for n, texts in (("a", ["x y", "z"]), ("b", ["z y", "x"]))
    ]
    assert (files[0] / "tokenizer.json").read_bytes() == (files[1] / "tokenizer.json").read_bytes()


def test_paths_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, message in (
        ("missing", "no such tokenizer"),
        ("empty", "holds no tokenizer.json"),
        ("bad.model", "not a sentencepiece model"),
        ("tokenizer.json", "not a tokenizer"),
    ):
        with pytest.raises(MegavilaError, match=message):
            load_tokenizer(tmp_path / name)


def test_end_token_must_be_known(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MegavilaError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_model_config_beside_the_files_changes_nothing(tmp_path: Path) -> None:
    """An exported model has a config.json of type qwen2 there, which makes AutoTokenizer split text by Qwen2's rules."""
    text = "<think> t0 ball right ; t5 swap left_right -> left </think> <answer>C</answer>"
    directory = build_word_tokenizer([text], tmp_path / "words")
    alone = load_tokenizer(directory).encode(text)
    (directory / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    assert load_tokenizer(directory).encode(text) == alone
    assert (
        load_tokenizer(directory).decode(alone).split()
        == text.replace("C<", "C <").replace(">C", "> C").split()
    )
