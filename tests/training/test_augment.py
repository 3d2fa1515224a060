from dataclasses import replace

from megavila.data.row import Row
from megavila.training.augment import TransformedSampler


def mark(row, seed):
    return replace(row, extra={"seed": seed})


def sampler():
    rows = [Row(problem_id=f"r{i}", problem="?", answer="a") for i in range(5)]
    return TransformedSampler(rows, 3, mark)


def test_seed_is_of_run_epoch_and_row():
    drawn = [(row.problem_id, row.extra["seed"]) for row in sampler().next(15)]
    assert len(set(drawn)) == 15  # another seed in each epoch
    by_fours, again = sampler(), []
    for _ in range(4):
        again += [(row.problem_id, row.extra["seed"]) for row in by_fours.next(4)]
    assert again[:15] == drawn  # whatever the batches


def test_goes_on_from_its_state():
    first, second = sampler(), sampler()
    first.next(7)
    second.load_state_dict(first.state_dict())
    assert [r.extra for r in second.next(6)] == [r.extra for r in first.next(6)]
    assert first.num_rows == 5 and first.epoch == 13 / 5
