"""Tokenizers: Hugging Face fast tokenizers, sentencepiece models, and a word-level one made from given texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megavila.runtime.errors import MegavilaError


class Tokenizer(Protocol):
    """What the rest of Megavila asks of a tokenizer.

    Attributes:
        vocab_size: rows an embedding table needs: the highest token id + 1.
        eos_id: ends a response. pad_id: fills what nobody reads.
        prefix_ids: tokens every prompt starts with (a beginning-of-sequence token, or none).
        directory: where its files lie, to be copied beside an exported model.
    """

    vocab_size: int
    eos_id: int
    pad_id: int
    prefix_ids: tuple[int, ...]
    directory: Path | None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that we wrote: special tokens in it are tokens. Adds none at either end."""
        ...

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of a text that somebody else wrote: special tokens in it are text."""
        ...

    def has_special(self, text: str) -> bool:
        """Whether `encode` would find a special token in the text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        ...

    def token_id(self, token: str) -> int | None:
        """Id of exactly this token, None when there is none."""
        ...


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a directory in Hugging Face's layout, a `tokenizer.json`, or a sentencepiece `.model`.

    Raises MegavilaError when there is no such tokenizer or it has no end-of-sequence token.
    """
    path = Path(path)
    if not path.exists():
        raise MegavilaError(
            f"{path}: no such tokenizer; give a directory, a tokenizer.json or a sentencepiece .model"
        )
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.is_dir() and not any(
        (path / n).exists() for n in ("tokenizer.json", "vocab.json", "tokenizer.model")
    ):
        raise MegavilaError(f"{path}: holds no tokenizer.json, vocab.json or tokenizer.model")
    if path.is_dir() and not (path / "tokenizer_config.json").exists():
        bare = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).exists()]
        if bare:
            return load_tokenizer(bare[0])
    return HuggingFaceTokenizer(path)


class HuggingFaceTokenizer:
    """A fast tokenizer of the transformers library, from a directory or a `tokenizer.json` alone."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        loaded = _load_transformers(path)
        self._encoder: Any = loaded.backend_tokenizer
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._literal: Any = Backend.from_str(self._encoder.to_str())
        self._literal.encode_special_tokens = True
        vocabulary = self._encoder.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eos_id: int = _end_id(path, loaded.eos_token_id, vocabulary)
        self.pad_id: int = self.eos_id if loaded.pad_token_id is None else loaded.pad_token_id
        starts = self._encoder.encode("", add_special_tokens=True).ids
        self.prefix_ids = tuple(token for token in starts if token != self.eos_id)
        self.directory: Path | None = path if path.is_dir() else path.parent
        added = self._encoder.get_added_tokens_decoder().values()
        self._special = tuple(token.content for token in added if token.special)

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_literal(self, text: str) -> list[int]:
        return self._literal.encode(text, add_special_tokens=False).ids

    def has_special(self, text: str) -> bool:
        return any(token in text for token in self._special)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoder.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._encoder.token_to_id(token)


def _load_transformers(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        if (path / "tokenizer.json").exists():
            # Not AutoTokenizer: beside a config.json of type qwen2 it puts Qwen2's own splitting in place of the file's.
            return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for unreadable files
        raise MegavilaError(f"{path}: not a tokenizer that transformers can read: {error}") from error
    if not loaded.is_fast:
        raise MegavilaError(
            f"{path}: transformers has no fast tokenizer for it; convert it to a tokenizer.json"
        )
    return loaded


_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>", "<eos>")


def _end_id(path: Path, configured: int | None, vocabulary: dict[str, int]) -> int:
    """A tokenizer.json alone does not say which token ends a text: then one of the usual names must be in it."""
    if configured is not None:
        return configured
    for token in _END_TOKENS:
        if token in vocabulary:
            return vocabulary[token]
    raise MegavilaError(f"{path}: no end-of-sequence token; set eos_token in its tokenizer_config.json")


class SentencePieceTokenizer:
    """A sentencepiece `.model` file."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise MegavilaError(f"{path}: not a sentencepiece model: {error}") from error
        model = self._model
        if model.eos_id() < 0:
            raise MegavilaError(f"{path}: its model has no end-of-sequence piece; train it with an eos_id")
        self.vocab_size: int = model.vocab_size()
        self.eos_id: int = model.eos_id()
        self.pad_id: int = model.pad_id() if model.pad_id() >= 0 else self.eos_id
        self.prefix_ids: tuple[int, ...] = (model.bos_id(),) if model.bos_id() >= 0 else ()
        self.directory: Path | None = path.parent

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_literal(self, text: str) -> list[int]:
        return self._model.encode(text)

    def has_special(self, text: str) -> bool:
        return False  # control pieces cannot come out of text; user-defined ones are ordinary pieces

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([i for i in ids if not self._model.is_control(i)])

    def token_id(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None


THINKING_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
MEDIA_TOKEN = "<media>"


def build_word_tokenizer(
    texts: Iterable[str],
    directory: str | os.PathLike[str],
    special_tokens: Sequence[str] = THINKING_TOKENS,
) -> Path:
    """Write a word-level tokenizer of the words in `texts`, in Hugging Face's layout, and return its directory.

    Words are split at blanks and around punctuation. `special_tokens` are tokens of their own that `decode` keeps,
    so that `<think> … </think> <answer>B</answer>` comes back as such. Beside them: `<pad>`, `<unk>`, `<|im_end|>`
    (ends a response) and `<media>`, which only the prompt builder can write.
    """
    from tokenizers import AddedToken, Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    # A decimal number, a time label (t8) and an arrow are one word each. No decoder: words come back with blanks.
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"->|\d+\.\d+|\w+|[^\w\s]"), "isolated"),
        ]
    )
    words: set[str] = set()
    for text in texts:
        for token in special_tokens:
            text = text.replace(token, " ")
        words.update(word for word, _ in splitter.pre_tokenize_str(text))
    control = ("<pad>", "<unk>", "<|im_end|>", MEDIA_TOKEN)
    vocabulary = {
        word: i for i, word in enumerate([*control, *special_tokens, *sorted(words - {*special_tokens})])
    }
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = splitter
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in special_tokens])
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return folder
