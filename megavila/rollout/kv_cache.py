"""Keys and values of prompts, held once per group, and of responses, held once per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Response caches grow by doubling from here: most responses end far before the longest allowed.
FIRST_CAPACITY = 64
# Room for a prompt's tokens is a multiple of this: rows of transposed keys then start where a GPU can read 16
# bytes at once.
TOKENS_ALIGNED = 16


def cache_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which keys and values of ``tensor``'s type and device are held.

    On a CPU half-precision matrix products round their scores, so there the cache is fp32 at least; on a GPU
    they can return fp32 from half-precision inputs and the cache keeps the model's type.
    """
    return tensor.dtype if tensor.is_cuda else torch.promote_types(tensor.dtype, torch.float32)


class PromptCache:
    """Keys and values (B, kv_heads, P, d) of B prompts, padded to the longest and a little more, for each layer.

    A group's responses all read the one row of their prompt; nothing is repeated G times. In memory keys lie
    transposed, as the product with few queries reads them: on a CPU that takes half the time.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = torch.tensor(lengths)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, first_prompt: int, lengths: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Stores the packed ``k`` and ``v`` (t, kv_heads, d) of consecutive prompts with these lengths."""
        if layer not in self._layers:
            prompts, longest = len(self.lengths), self._room()
            heads, d = k.shape[1:]
            # Zeros: a padded position has weight 0, and 0 times whatever the memory held must stay 0.
            self._layers[layer] = (
                k.new_zeros(prompts, heads, d, longest, dtype=cache_dtype(k)),
                v.new_zeros(prompts, heads, longest, d, dtype=cache_dtype(v)),
            )
        keys, values = self._layers[layer]
        start = 0
        for prompt, length in enumerate(lengths, first_prompt):
            keys[prompt, :, :, :length] = k[start : start + length].permute(1, 2, 0)
            values[prompt, :, :length] = v[start : start + length].transpose(0, 1)
            start += length

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, kv_heads, P, d); from a prompt's length on they are zeros."""
        keys, values = self._layers[layer]
        return keys.mT, values

    def keep(self, prompts: Tensor) -> None:
        """Drops all prompts but these (m,), and the padding that only the dropped ones needed."""
        self.lengths = self.lengths[prompts]
        longest = self._room()
        for layer, (keys, values) in self._layers.items():
            index = prompts.to(keys.device)
            self._layers[layer] = (keys[index, :, :, :longest], values[index, :, :longest])

    def _room(self) -> int:
        return -(-int(self.lengths.max()) // TOKENS_ALIGNED) * TOKENS_ALIGNED


class ResponseCache:
    """Keys and values of n responses that grow together: (n, kv_heads, capacity, d) for each layer."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        """Tokens that every layer holds of every response."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds one token per response, (n, kv_heads, d); returns all of them, (n, kv_heads, length + 1, d).

        ``length`` itself advances with ``advance``, once all layers have theirs.
        """
        keys, values = self._room(layer, k, v)
        keys[:, :, self.length] = k
        values[:, :, self.length] = v
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def advance(self) -> None:
        """Counts the token that every layer has appended."""
        self.length += 1

    def keep(self, rows: Tensor) -> None:
        """Drops all responses but these (m,)."""
        for layer, (keys, values) in self._layers.items():
            index = rows.to(keys.device)
            self._layers[layer] = (keys[index], values[index])

    def _room(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = self._layers.get(layer)
        if held is not None and held[0].shape[2] > self.length:
            return held
        capacity = min(self.max_tokens, max(FIRST_CAPACITY, 2 * self.length))
        rows, heads, d = k.shape
        keys = k.new_empty(rows, heads, capacity, d, dtype=cache_dtype(k))
        values = v.new_empty(rows, heads, capacity, d, dtype=cache_dtype(v))
        if held is not None:
            keys[:, :, : self.length] = held[0][:, :, : self.length]
            values[:, :, : self.length] = held[1][:, :, : self.length]
        self._layers[layer] = (keys, values)
        return keys, values
