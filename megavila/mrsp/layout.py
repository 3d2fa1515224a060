"""Where every token of a step stands, which positions it has, whom it sees and who predicts it.

The shared-prefix layout holds each prompt once: `[prompt | response 1 | … | response G]`, several groups one
after another. A prompt token sees the prompt up to itself; a response token sees the whole prompt and its own
response up to itself; response positions continue after the prompt. The result, log-probs and every gradient,
equals G independent sequences, which is what the repeated layout holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from megavila_kernels import IntervalMask
from torch import Tensor

from megavila.mrsp.attention import LocalAttention
from megavila.runtime.errors import MegavilaError

if TYPE_CHECKING:
    from megavila.data.prompt import Prompt
    from megavila.models.attention import AttentionContext

LayoutKind = Literal["shared_prefix", "repeated"]
LAYOUT_KINDS: tuple[LayoutKind, ...] = ("shared_prefix", "repeated")


@dataclass(frozen=True)
class Group:
    """A prompt and its G responses, each int64 (R_g,); responses may be empty."""

    prompt: "Prompt"
    responses: tuple[Tensor, ...]

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def response_tokens(self) -> int:
        return sum(len(response) for response in self.responses)

    def tokens(self, kind: LayoutKind) -> int:
        """Tokens that the model reads for this group."""
        copies = 1 if kind == "shared_prefix" else len(self.responses)
        return self.prompt_tokens * copies + self.response_tokens


@dataclass(frozen=True)
class Segment:
    """A prompt (response is None) or one response of a group, at the tokens [start, stop) of the layout."""

    group: int
    response: int | None
    start: int
    stop: int
    first_position: int
    prompt: tuple[int, int]  # tokens of the prompt that it sees whole; empty for a prompt

    def __str__(self) -> str:
        what = "prompt" if self.response is None else f"response {self.response}"
        sees = "itself up to each token"
        if self.response is not None:
            sees = f"tokens {self.prompt[0]}-{self.prompt[1] - 1} and {sees}"
        tokens = self.stop - self.start
        held = f"{self.start}-{self.stop - 1}" if tokens else "none"
        return f"{self.group:>5}  {what:<12} {tokens:>7}  {held:<15} {self.first_position:>14}  {sees}"


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything a forward pass needs to know about its t tokens, of which n are predicted.

    Attributes:
        kind: "shared_prefix" or "repeated".
        token_ids: (t,); media positions hold the prompt's media token id.
        position_ids: (t,), or (3, t) if any prompt has three axes.
        media_index: (t,), the row of all groups' media rows concatenated in order, or -1 for text.
        predictor_rows: (n,); the hidden state of this row predicts the target.
        targets: (n,) response tokens, by group, response and place.
        group_of_target: (n,).
        response_of_target: (n,), counted over all groups in order.
        mask: who sees whom.
        segments: the parts in the order of their tokens.
        num_groups, num_responses, num_media_rows: totals.
    """

    kind: LayoutKind
    token_ids: Tensor
    position_ids: Tensor
    media_index: Tensor
    predictor_rows: Tensor
    targets: Tensor
    group_of_target: Tensor
    response_of_target: Tensor
    mask: IntervalMask
    segments: tuple[Segment, ...]
    num_groups: int
    num_responses: int
    num_media_rows: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    @property
    def response_lengths(self) -> Tensor:
        """(num_responses,) tokens of each response, empty ones included."""
        return torch.bincount(self.response_of_target, minlength=self.num_responses)

    def context(self, backend: str = "auto") -> "AttentionContext":
        """Positions and attention for a forward pass that holds all tokens on one context rank.

        backend: of the interval kernel, as `model.attention_backend`.
        """
        # Imported late: layouts are planned and printed where Megatron is not loaded.
        from megavila.models.attention import AttentionContext

        return AttentionContext(position_ids=self.position_ids, attend=LocalAttention(self.mask, backend))

    def to(self, device: torch.device) -> "Layout":
        """The layout with its tensors on `device`; the mask is planned on the host and moves by itself."""
        names = ("token_ids", "position_ids", "media_index", "predictor_rows", "targets")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(
            self,
            **moved,
            group_of_target=self.group_of_target.to(device),
            response_of_target=self.response_of_target.to(device),
        )

    def __str__(self) -> str:
        prompt = sum(s.stop - s.start for s in self.segments if s.response is None)
        lines = [
            f"{self.kind} layout: {self.num_groups} groups, {self.num_responses} responses, "
            f"{self.num_tokens} tokens ({prompt} prompt, {self.num_tokens - prompt} response), "
            f"{self.num_targets} targets, {self.num_media_rows} media rows",
            f"{'group':>5}  {'part':<12} {'tokens':>7}  {'held at':<15} {'first position':>14}  sees",
        ]
        return "\n".join([*lines, *map(str, self.segments)])


def build_layout(groups: Sequence[Group], kind: LayoutKind = "shared_prefix") -> Layout:
    """Lay out groups one after another.

    Raises MegavilaError for an unknown kind, no groups, an empty prompt (nothing would predict a response's
    first token) and prompts whose parts disagree in length.
    """
    if kind not in LAYOUT_KINDS:
        raise MegavilaError(f"unknown layout {kind!r}; mrsp.layout must be one of {', '.join(LAYOUT_KINDS)}")
    if not groups:
        raise MegavilaError("a layout needs at least one group; got none")
    axes = 3 if any(group.prompt.position_ids.dim() == 2 for group in groups) else 1
    builder = _Builder(kind, axes)
    for group in groups:
        _check(group.prompt)
        builder.add(group)
    return builder.finish()


def pack_groups(
    groups: Sequence[Group], max_tokens: int, kind: LayoutKind = "shared_prefix"
) -> list[list[Group]]:
    """Split groups, in order, into micro-batches of at most `max_tokens` tokens each.

    No group is dropped, cut or split. Raises MegavilaError for a group that does not fit even alone.
    """
    batches: list[list[Group]] = []
    room = 0
    for number, group in enumerate(groups):
        tokens = group.tokens(kind)
        if tokens > max_tokens:
            raise MegavilaError(
                f"group {number} (problem {group.prompt.row.problem_id}) has {tokens} tokens in the {kind} "
                f"layout (prompt {group.prompt_tokens}, {len(group.responses)} responses of together "
                f"{group.response_tokens}), but a micro-batch may hold {max_tokens}; raise the token budget to "
                f"at least {tokens}, use fewer frames or shorter responses"
            )
        if not batches or tokens > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(group)
        room -= tokens
    return batches


def _check(prompt: "Prompt") -> None:
    length = len(prompt.token_ids)
    if length == 0:
        raise MegavilaError(
            "a prompt has 0 tokens, so nothing predicts the first response token; it needs at least 1"
        )
    if prompt.position_ids.shape not in ((length,), (3, length)) or prompt.media_index.shape != (length,):
        raise MegavilaError(
            f"a prompt of {length} tokens has position_ids {tuple(prompt.position_ids.shape)} and "
            f"media_index {tuple(prompt.media_index.shape)}; expected ({length},) or (3, {length}), and "
            f"({length},)"
        )
    last = int(prompt.media_index.max())
    if last >= prompt.num_media_rows:
        raise MegavilaError(
            f"a prompt names media row {last}, but its videos have {prompt.num_media_rows} rows in all; "
            "rebuild it with the tokens_per_frame of the model's projector"
        )


class _Builder:
    """Collects the parts of a layout token by token range."""

    def __init__(self, kind: LayoutKind, axes: int) -> None:
        self.kind: LayoutKind = kind
        self.axes = axes
        self.tokens = self.groups = self.responses = self.media_rows = 0
        self.token_ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.media_index: list[Tensor] = []
        self.lo: list[
            Tensor
        ] = []  # (2, tokens of a segment) each: keys seen whole, and keys seen up to the token
        self.hi: list[Tensor] = []
        self.predictors: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.target_counts: list[tuple[int, int, int]] = []  # group, response, count
        self.segments: list[Segment] = []

    def add(self, group: Group) -> None:
        prompt_start = self.tokens
        if self.kind == "shared_prefix":
            self._add_prompt(group.prompt)
        for number, response in enumerate(group.responses):
            if self.kind == "repeated":
                prompt_start = self.tokens
                self._add_prompt(group.prompt)
            self._add_response(group, number, response, prompt_start)
        self.groups += 1
        self.media_rows += group.prompt.num_media_rows

    def _add_prompt(self, prompt: "Prompt") -> None:
        start = self.tokens
        media_index = torch.where(prompt.media_index >= 0, prompt.media_index + self.media_rows, -1)
        self._append(prompt.token_ids, prompt.position_ids, media_index, seen=(0, 0), causal_from=start)
        self.segments.append(Segment(self.groups, None, start, self.tokens, 0, (start, start)))

    def _add_response(self, group: Group, number: int, response: Tensor, prompt_start: int) -> None:
        length, prompt_stop = len(response), prompt_start + group.prompt_tokens
        first, start = group.prompt.next_position, self.tokens
        # The first token is predicted by the prompt's last, each later one by the one before it.
        before = torch.arange(start - 1, start + length - 1)
        before[:1] = prompt_stop - 1
        self.predictors.append(before)
        self.targets.append(response)
        self.target_counts.append((self.groups, self.responses, length))
        positions = torch.arange(first, first + length)
        media_index = torch.full((length,), -1)
        if self.kind == "repeated":  # prompt and response lie side by side: one causal interval
            self._append(response, positions, media_index, seen=(0, 0), causal_from=prompt_start)
        else:
            seen = (prompt_start, prompt_stop)
            self._append(response, positions, media_index, seen=seen, causal_from=start)
        self.segments.append(
            Segment(self.groups, number, start, self.tokens, first, (prompt_start, prompt_stop))
        )
        self.responses += 1

    def _append(
        self,
        token_ids: Tensor,
        positions: Tensor,
        media_index: Tensor,
        *,
        seen: tuple[int, int],
        causal_from: int,
    ) -> None:
        """Tokens that all see the keys `seen`, and the keys from `causal_from` up to themselves."""
        length, start = len(token_ids), self.tokens
        self.token_ids.append(token_ids)
        self.positions.append(positions.expand(3, -1) if self.axes == 3 else positions)
        self.media_index.append(media_index)
        itself = torch.arange(start + 1, start + length + 1)
        self.lo.append(torch.stack([torch.full((length,), seen[0]), torch.full((length,), causal_from)]))
        self.hi.append(torch.stack([torch.full((length,), seen[1]), itself]))
        self.tokens += length

    def finish(self) -> Layout:
        group, response, count = torch.tensor(self.target_counts, dtype=torch.int64).view(-1, 3).unbind(1)
        empty = torch.zeros(0, dtype=torch.int64)
        return Layout(
            kind=self.kind,
            token_ids=torch.cat(self.token_ids).long(),
            position_ids=torch.cat(self.positions, dim=-1),
            media_index=torch.cat(self.media_index),
            predictor_rows=torch.cat([*self.predictors, empty]),
            targets=torch.cat([*self.targets, empty]),
            group_of_target=group.repeat_interleave(count),
            response_of_target=response.repeat_interleave(count),
            mask=IntervalMask(torch.cat(self.lo, 1).int(), torch.cat(self.hi, 1).int(), self.tokens),
            segments=tuple(self.segments),
            num_groups=self.groups,
            num_responses=self.responses,
            num_media_rows=self.media_rows,
        )
