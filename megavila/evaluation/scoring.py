"""Scores given responses: the log-probability of every token under a model, by the path that training takes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megavila.config import ScoreConfig
from megavila.data import Prompt, PromptBuilder, PromptTemplate, Row, read_rows
from megavila.evaluation.loading import LoadedModel, open_model
from megavila.media import FrameCache, MediaError, get_decoder
from megavila.models import tokens_per_frame
from megavila.mrsp.encode import VideoEncoder
from megavila.mrsp.layout import Group, build_layout
from megavila.mrsp.logprobs import response_logprobs
from megavila.mrsp.shards import ShardedRows, join_shards
from megavila.runtime.collectives import gather_objects
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger
from megavila.runtime.progress import Progress
from megavila.training.batching import micro_batches

COLUMN = "responses"
_GIB = 2**30
_log = get_logger(__name__)


def score_file(config: ScoreConfig, out: Path) -> None:
    """Write one object for each row of `data.eval` to `out`, in order: problem_id and its scored responses.

    `responses` is null for a row whose media could not be read and `data.on_bad_media` is "skip". Rows are dealt out
    over the data-parallel ranks. The file appears when it is whole.

    Raises MegavilaError for rows without responses, responses that are no text and no token ids of the model, media
    that cannot be read and a file that is there already.
    """
    if out.exists():
        raise MegavilaError(f"{out} exists already; name a new file")
    rows = [row for path in config.data.eval for row in read_rows(path, config.data).rows][: config.limit]
    for row in rows:
        _check(row)
    with open_model(config) as loaded:
        topology = loaded.topology
        scorer = _Scorer(config, loaded)
        partial = out.with_name(out.name + ".partial")
        if topology.is_main:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
        with Progress("scoring", len(rows), enabled=topology.is_main) as bar:
            for first in range(0, len(rows), config.batch_size):
                batch = rows[first : first + config.batch_size]
                places = range(topology.data_rank, len(batch), topology.data)
                own = dict(zip(places, scorer([batch[place] for place in places]), strict=True))
                shares = gather_objects(own, topology.data_group)
                found = {place: record for share in shares for place, record in share.items()}
                if topology.is_main:
                    with partial.open("a", encoding="utf-8") as lines:
                        lines.writelines(f"{json.dumps(found[place])}\n" for place in sorted(found))
                bar.advance(len(batch))
        if topology.is_main:
            partial.replace(out)


def _check(row: Row) -> None:
    responses = row.extra.get(COLUMN)
    if not isinstance(responses, list) or not responses:
        raise MegavilaError(
            f"{row.source}: field {COLUMN!r} is {responses!r}; it must be a list of at least one response to score"
        )
    for number, response in enumerate(responses):
        ids = isinstance(response, list) and all(type(token) is int for token in response)
        if not isinstance(response, str) and not ids:
            raise MegavilaError(
                f"{row.source}: response {number} is {response!r}; it must be a text or a list of token ids"
            )


class _Scorer:
    """Scores rows of this rank, a batch at a time."""

    def __init__(self, config: ScoreConfig, loaded: LoadedModel) -> None:
        self.config, self.model = config, loaded.model
        model = loaded.model.config
        assert model.language is not None
        self.vocabulary = loaded.tokenizer.vocab_size
        self.longest = model.language.max_position_embeddings
        self.builder = PromptBuilder(
            loaded.tokenizer,
            PromptTemplate(config.data.template),
            config.data,
            1 if model.vision is None else tokens_per_frame(model.vision, model.projector),
            temporal_pooling=model.projector.temporal_pooling,
            max_prompt_tokens=self.longest,
        )
        frames = FrameCache(int(config.data.cache_frames_gib * _GIB), get_decoder(config.data.decoder))
        self.encoder = VideoEncoder.from_config(
            config.mrsp, loaded.model, frames.load, loaded.topology, config.data.decoder
        )

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> list[dict[str, object]]:
        """One record for each row, in order."""
        records: list[dict[str, object]] = [{"problem_id": row.problem_id, COLUMN: None} for row in rows]
        ready = list(self._ready(rows))
        groups = [group for _, group, _ in ready]
        kind = self.config.mrsp.layout
        scored: list[list[dict[str, object]]] = [[] for _ in groups]
        for batch in micro_batches(groups, self.config.max_tokens_per_microbatch, kind):
            layout = build_layout([piece.group for piece in batch], kind)
            media = [ready[piece.owner][2] for piece in batch]
            device = self.model.language.output_weight().device
            logprobs = response_logprobs(
                self.model, layout.to(device), media, temperature=self.config.temperature
            )
            values = iter(logprobs.cpu().split(layout.response_lengths.tolist()))
            for piece in batch:
                scored[piece.owner] += [_record(tokens, next(values)) for tokens in piece.group.responses]
        for (place, _, _), responses in zip(ready, scored, strict=True):
            records[place][COLUMN] = responses
        return records

    def _ready(self, rows: Sequence[Row]) -> Iterator[tuple[int, Group, ShardedRows | None]]:
        """(place, prompt with its responses, media rows) of the rows whose media can be read."""
        for place, row in enumerate(rows):
            try:
                prompt = self.builder.build(row)
                media = join_shards(self.encoder.encode_or_raise(prompt.videos))
            except MediaError as error:
                if self.config.data.on_bad_media == "error":
                    raise
                _log.warning("skipped %s: %s", row.source or row.problem_id, error)
                continue
            yield place, Group(prompt, tuple(self._tokens(prompt, text) for text in row.extra[COLUMN])), media

    def _tokens(self, prompt: Prompt, response: str | list[int]) -> Tensor:
        """int64 (R,) token ids of a response, all of which the model knows and has positions for."""
        if isinstance(response, str):
            tokens = self.builder.encode_response(response)
        else:
            tokens = torch.tensor(response, dtype=torch.int64)
        source = prompt.row.source
        unknown = tokens[(tokens < 0) | (tokens >= self.vocabulary)]
        if len(unknown):
            raise MegavilaError(
                f"{source}: a response holds token {int(unknown[0])}, but the tokenizer's are 0 to {self.vocabulary - 1}"
            )
        if prompt.next_position + len(tokens) > self.longest:
            raise MegavilaError(
                f"{source}: prompt and response end at position {prompt.next_position + len(tokens)}, but the model has "
                f"{self.longest} (max_position_embeddings); sample fewer frames or shorten the response"
            )
        return tokens


def _record(tokens: Tensor, logprobs: Tensor) -> dict[str, object]:
    return {
        "token_ids": tokens.tolist(),
        "logprobs": logprobs.tolist(),
        "logprob_sum": float(logprobs.double().sum()),
    }
