"""What one prompt of a rollout batch became: responses, scores, advantages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megavila.data.prompt import Prompt
from megavila.mrsp.layout import Group
from megavila.mrsp.shards import ShardedRows
from megavila.rewards import Score
from megavila.rollout.protocol import Response


@dataclass(frozen=True, eq=False)
class ScoredGroup:
    """One group of a rollout batch.

    Attributes:
        index: place of its prompt among all prompts of the step, over all data-parallel ranks.
        media_rows: without gradient, each rank of the replica with those that it encoded; None for a prompt
            without media.
        advantages: (G,) float32.
        informative: whether the rewards differ, so that there is anything to learn.
    """

    index: int
    prompt: Prompt
    media_rows: ShardedRows | None
    responses: tuple[Response, ...]
    scores: tuple[Score, ...]
    advantages: Tensor
    informative: bool

    @property
    def group(self) -> Group:
        """The token ids, as a layout wants them."""
        return Group(self.prompt, tuple(response.token_ids for response in self.responses))

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return sum(len(response.token_ids) for response in self.responses)

    def record(self) -> Mapping[str, object]:
        """The group for a dump of rollouts, as JSON can hold it."""
        return {
            "index": self.index,
            "problem_id": self.prompt.row.problem_id,
            "source": self.prompt.row.source,
            "problem": self.prompt.row.problem,
            "answer": self.prompt.row.answer,
            "videos": [video.path for video in self.prompt.videos],
            "prompt_tokens": len(self.prompt.token_ids),
            "responses": [
                {
                    "text": response.text,
                    "tokens": len(response.token_ids),
                    "finish_reason": response.finish_reason,
                    "reward": score.total,
                    "format": score.format,
                    "accuracy": score.accuracy,
                    "advantage": advantage,
                }
                for response, score, advantage in zip(
                    self.responses, self.scores, self.advantages.tolist(), strict=True
                )
            ],
        }


def split_updates(groups: Sequence[ScoredGroup], num_prompts: int, updates: int) -> list[list[ScoredGroup]]:
    """Divide a rank's groups among the updates of one pass, by their place in the whole step's list.

    The division does not depend on the data-parallel degree: update u has the prompts of the u-th of
    ``updates`` equal stretches, whoever holds them.
    """
    parts: list[list[ScoredGroup]] = [[] for _ in range(updates)]
    for group in groups:
        parts[group.index * updates // num_prompts].append(group)
    return parts
