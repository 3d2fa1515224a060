"""Scores a model on rows: responses, extracted answers, accuracy by category and by number of frames."""

from collections.abc import Sequence

from megavila.data import Row
from megavila.data.options import choice_letter
from megavila.data.row import MULTIPLE_CHOICE
from megavila.evaluation.answering import Answered, Answerer
from megavila.evaluation.result import EvalResult, Prediction
from megavila.rewards import Scorer, extract_answer
from megavila.runtime.collectives import gather_objects
from megavila.runtime.progress import Progress


def score_rows(
    answerer: Answerer, rows: Sequence[Row], *, num_frames: int | None = None, blank: bool = False
) -> EvalResult:
    """Answer every row once and score it; see `Answerer.answer` for the arguments.

    Rows are dealt out over the data-parallel ranks; every rank returns the whole result.
    """
    scorer, topology = Scorer(answerer.config.reward), answerer.topology
    scorer.check(rows)
    places = range(topology.data_rank, len(rows), topology.data)
    own = [rows[i] for i in places]
    label = "evaluating" + (f" at {num_frames} frames" if num_frames else "") + (" (blank)" if blank else "")
    predictions: list[Prediction | None] = []
    with Progress(label, len(own), enabled=topology.is_main) as bar:
        for batch in answerer.answer(own, num_frames=num_frames, blank=blank):
            predictions += [None if answered is None else _predict(answered, scorer) for answered in batch]
            bar.advance(len(batch))
    shares = gather_objects(dict(zip(places, predictions, strict=True)), topology.data_group)
    by_place = {place: prediction for share in shares for place, prediction in share.items()}
    found = [by_place[i] for i in sorted(by_place)]
    return EvalResult(tuple(p for p in found if p is not None), skipped=found.count(None))


def _predict(answered: Answered, scorer: Scorer) -> Prediction:
    row, text = answered.prompt.row, answered.responses[0].text
    (score,) = scorer.score([row], [text])
    predicted = extract_answer(text)
    if predicted is not None and row.problem_type == MULTIPLE_CHOICE:
        predicted = choice_letter(predicted, [option.letter for option in row.options] or None)
    return Prediction(
        problem_id=row.problem_id,
        category=row.category,
        answer=row.answer,
        predicted=predicted,
        accuracy=score.accuracy,
        well_formed=score.format == 1.0,
        num_frames=sum(video.num_frames for video in answered.prompt.videos),
        response=text,
        num_options=len(row.options),
    )
