"""Which prompt each row of a decoding step continues."""

from functools import cached_property

import torch
from torch import Tensor


class DecodeGroups:
    """Rows in groups, one for each prompt; made once and used by every layer until a row or prompt is dropped.

    Args:
        prompt_of_row: (n,) index into the prompts, ascending: the rows of a group are neighbours.
        prompt_lengths: (groups,) tokens of each prompt, at least 1.
        device: where attention is computed.

    Raises:
        ValueError: no rows, rows out of order, an empty prompt or one that does not exist.
    """

    def __init__(self, prompt_of_row: Tensor, prompt_lengths: Tensor, device: torch.device) -> None:
        prompt_of_row, prompt_lengths = prompt_of_row.cpu().long(), prompt_lengths.cpu().long()
        count = len(prompt_lengths)
        if not len(prompt_of_row) or not count or int(prompt_lengths.min()) < 1:
            raise ValueError(
                f"decoding needs rows and prompts of at least one token; got {len(prompt_of_row)} rows and "
                f"prompts of {prompt_lengths.tolist()} tokens"
            )
        if not 0 <= int(prompt_of_row.min()) <= int(prompt_of_row.max()) < count:
            raise ValueError(f"rows name prompts {prompt_of_row.unique().tolist()}; there are {count}")
        if bool((prompt_of_row.diff() < 0).any()):
            raise ValueError(f"prompt_of_row must be ascending; got {prompt_of_row.tolist()}")
        self._prompt_of_row, self._lengths, self._device = prompt_of_row, prompt_lengths, device
        self._rows_of_group = torch.bincount(prompt_of_row, minlength=count)
        self.num_rows, self.num_groups = len(prompt_of_row), count
        self.widest = int(self._rows_of_group.max())
        """Most rows of a group."""
        self.longest = int(prompt_lengths.max())
        """Tokens of the longest prompt."""

    @cached_property
    def first_row(self) -> Tensor:
        """int32 (groups + 1,) on the device: the rows of group g are [first_row[g], first_row[g + 1])."""
        return torch.cat([torch.zeros(1).long(), self._rows_of_group.cumsum(0)]).to(self._device, torch.int32)

    @cached_property
    def prompt_of_row(self) -> Tensor:
        """int32 (n,) on the device."""
        return self._prompt_of_row.to(self._device, torch.int32)

    @cached_property
    def lengths(self) -> Tensor:
        """int32 (groups,) on the device."""
        return self._lengths.to(self._device, torch.int32)

    @cached_property
    def slots(self) -> Tensor | None:
        """int64 (n,): each row's place in the rectangle (groups, widest); None where the rows fill it."""
        if self.num_rows == self.num_groups * self.widest:
            return None
        first = self._rows_of_group.cumsum(0) - self._rows_of_group
        place = torch.arange(self.num_rows) - first[self._prompt_of_row]
        return (self._prompt_of_row * self.widest + place).to(self._device)

    @cached_property
    def padding(self) -> Tensor | None:
        """(groups, 1, 1, longest): 0 in a prompt and -inf behind it; None where all are equally long."""
        if int(self._lengths.min()) == self.longest:
            return None
        beyond = torch.arange(self.longest) >= self._lengths[:, None]
        bias = torch.zeros(beyond.shape).masked_fill_(beyond, float("-inf"))
        return bias.to(self._device)[:, None, None]
