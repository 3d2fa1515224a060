"""Rows, templates, tokenizers and multimodal prompts."""

from megavila.data.dataset import GroupSampler, PromptStream
from megavila.data.prompt import (
    MediaSpan,
    PositionRule,
    Prompt,
    PromptBuilder,
    PromptTooLong,
    sequential_positions,
)
from megavila.data.row import Row
from megavila.data.rows import RowError, RowFile, read_rows
from megavila.data.targets import ReasoningHook, target_text
from megavila.data.template import PromptTemplate
from megavila.data.tokenizer import Tokenizer, build_word_tokenizer, load_tokenizer

__all__ = [
    "GroupSampler",
    "MediaSpan",
    "PositionRule",
    "Prompt",
    "PromptBuilder",
    "PromptStream",
    "PromptTemplate",
    "PromptTooLong",
    "ReasoningHook",
    "Row",
    "RowError",
    "RowFile",
    "Tokenizer",
    "build_word_tokenizer",
    "load_tokenizer",
    "read_rows",
    "sequential_positions",
    "target_text",
]
