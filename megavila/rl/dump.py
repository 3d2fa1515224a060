"""Every rollout of a step, in a file one can read."""

import json
from typing import Any

from megavila.rl.groups import ScoredGroup
from megavila.runtime.collectives import gather_objects
from megavila.training.session import Session

ROLLOUTS = "rollouts"


def dump_rollouts(session: Session, step: int, groups: list[ScoredGroup]) -> None:
    """Write ``<run>/rollouts/step_000010.jsonl``: one group a line, in the order of the step's prompts.

    Called by all ranks; the main rank writes.
    """
    records: list[Any] = [
        record
        for part in gather_objects([g.record() for g in groups], session.topology.data_group)
        for record in part
    ]
    if not session.topology.is_main:
        return
    directory = session.directory / ROLLOUTS
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(record, ensure_ascii=False) + "\n" for record in sorted(records, key=lambda r: r["index"])
    ]
    (directory / f"step_{step:06d}.jsonl").write_text("".join(lines), encoding="utf-8")
