"""Rollouts on the training model itself: each prompt is prefilled once, its G responses decode together over
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavila.data.prompt import Prompt
from megavila.data.tokenizer import Tokenizer
from megavila.models.attention import AttentionContext
from megavila.models.vlm import VisionLanguageModel
from megavila.rollout.attention import PrefillAttention
from megavila.rollout.decoding import Decoding
from megavila.rollout.kv_cache import PromptCache
from megavila.rollout.protocol import Response, RolloutCounts, SamplingParams, check_request
from megavila.rollout.sampling import sample
from megavila.rollout.sharing import gather_shares, own_share
from megavila.rollout.stopping import StopChecker
from megavila.runtime.topology import Topology


class MegatronEngine:
    """A `RolloutEngine` on the trainer's own weights; there is nothing to transfer.

    Every rank of a replica calls `generate` with the same arguments and gets the same responses: its
    tensor-parallel ranks generate together, and its context-parallel ranks share the prompts out among them.
    Data-parallel replicas each generate for their own prompts.

    Args: model: the trainer's; put into eval mode while generating, and back. tokenizer: decodes responses;
    its ``eos_id`` ends them. topology: supplies the tensor- and context-parallel groups. max_batch_tokens: most tokens
    whose keys and values are held at once, counting prompts and G · max_tokens for their responses; prompts
    beyond it wait for the next batch. One prompt always runs, however long. max_prefill_tokens: most prompt
    tokens in one forward pass; a longer prompt has a pass of its own.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        topology: Topology,
        *,
        max_batch_tokens: int = 262_144,
        max_prefill_tokens: int = 8192,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.topology = topology
        self.max_batch_tokens = max_batch_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self._counts = RolloutCounts()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        media_rows: Sequence[Tensor | None],
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[tuple[Response, ...]]:
        """``params.group_size`` responses for each prompt; see `RolloutEngine.generate`."""
        check_request(prompts, media_rows, seeds)
        stop = StopChecker(self.tokenizer, params.stop)
        done: dict[int, tuple[Response, ...]] = {}
        with _evaluating(self.model):
            for batch in self._batches(own_share(prompts, self.topology), prompts, params):
                groups = self._generate_batch(
                    [prompts[i] for i in batch],
                    [media_rows[i] for i in batch],
                    params,
                    [seeds[i] for i in batch],
                    stop,
                )
                done.update(zip(batch, groups, strict=True))
        return gather_shares(done, self.topology)

    def update_weights(self) -> None:
        """Nothing to do: the engine generates with the model that is trained."""

    def sleep(self) -> None:
        """Nothing to do: keys and values are freed after each batch."""

    def take_counts(self) -> RolloutCounts:
        """The work since the last call, for the step's metrics."""
        counts, self._counts = self._counts, RolloutCounts()
        return counts

    def close(self) -> None:
        """Nothing to free: keys and values live as long as a call of `generate`."""

    def _batches(
        self, by_length: Sequence[int], prompts: Sequence[Prompt], params: SamplingParams
    ) -> Iterator[list[int]]:
        """Indices of the prompts that are decoded together: the given ones, longest first so that little of a
        batch is padding.
        """
        batch: list[int] = []
        for index in by_length:
            longest = len(prompts[batch[0] if batch else index].token_ids)
            per_group = longest + params.group_size * params.max_tokens
            if batch and (len(batch) + 1) * per_group > self.max_batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _generate_batch(
        self,
        prompts: list[Prompt],
        media_rows: list[Tensor | None],
        params: SamplingParams,
        seeds: list[int],
        stop: StopChecker,
    ) -> list[tuple[Response, ...]]:
        language, device = self.model.language, self.model.language.output_weight().device
        cache = PromptCache([len(prompt.token_ids) for prompt in prompts])
        last_hidden = self._prefill(prompts, media_rows, cache, device)
        self._counts.reused_prompt_tokens += (params.group_size - 1) * int(cache.lengths.sum())
        decoding = Decoding(
            cache,
            [prompt.next_position for prompt in prompts],
            seeds,
            params,
            stop,
            self.tokenizer.eos_id,
            device,
        )
        logits = language.logits(last_hidden)[decoding.prompt_rows()]
        while True:
            token_ids, logprobs = sample(logits, decoding.uniforms, params)
            token_ids = decoding.record(self._agreed(token_ids), logprobs)
            if decoding.finished:
                return decoding.responses()
            context = AttentionContext(position_ids=decoding.positions, attend=decoding.attention)
            logits = language.logits(self.model(language.embed(token_ids), context))
            self._counts.decode_tokens += len(token_ids)

    def _prefill(
        self, prompts: list[Prompt], media_rows: list[Tensor | None], cache: PromptCache, device: torch.device
    ) -> Tensor:
        """Fills the cache; returns the hidden states of each prompt's last token, (B, hidden)."""
        last_hidden: list[Tensor] = []
        first = 0
        while first < len(prompts):
            stop, tokens = first + 1, len(prompts[first].token_ids)
            while stop < len(prompts) and tokens + len(prompts[stop].token_ids) <= self.max_prefill_tokens:
                tokens += len(prompts[stop].token_ids)
                stop += 1
            packed, lengths = prompts[first:stop], cache.lengths[first:stop].tolist()
            embeddings = self._embed(packed, media_rows[first:stop], device)
            attention = PrefillAttention(lengths, cache, first, device)
            hidden = self.model(embeddings, AttentionContext(_positions(packed).to(device), attention))
            last_hidden.append(hidden[(cache.lengths[first:stop].cumsum(0) - 1).to(device)])
            self._counts.prefill_tokens += tokens
            first = stop
        return torch.cat(last_hidden)

    def _embed(self, prompts: list[Prompt], media_rows: list[Tensor | None], device: torch.device) -> Tensor:
        """(t, hidden) embeddings of prompts one after the other, each with its own media rows."""
        indices: list[Tensor] = []
        given: list[Tensor] = []
        start = 0
        for prompt, rows in zip(prompts, media_rows, strict=True):
            indices.append(torch.where(prompt.media_index >= 0, prompt.media_index + start, -1))
            if rows is not None:
                given.append(rows.to(device))
                start += rows.shape[0]
        token_ids = torch.cat([prompt.token_ids for prompt in prompts]).to(device)
        return self.model.embed(token_ids, torch.cat(indices).to(device), torch.cat(given) if start else None)

    def _agreed(self, token_ids: Tensor) -> Tensor:
        """The first tensor-parallel rank's draw on all of them: they computed the same, but must not rely on
        it.
        """
        if self.topology.tensor > 1:
            group = self.topology.tensor_group
            dist.broadcast(token_ids, dist.get_global_rank(group, 0), group=group)
        return token_ids


def _positions(prompts: list[Prompt]) -> Tensor:
    """(t,) position ids, or (3, t) if any of the prompts has three-dimensional ones."""
    ids = [prompt.position_ids for prompt in prompts]
    if any(each.dim() == 2 for each in ids):
        ids = [each if each.dim() == 2 else each.expand(3, -1) for each in ids]
    return torch.cat(ids, dim=-1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, with each module's own mode restored: parts of the model may be frozen in eval already."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
