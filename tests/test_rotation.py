"""Claims look into the queues in turns, so that none waits behind a full one."""

from __future__ import annotations

import pytest

from apoq.worker.claiming.rotation import MIN_PORTION, QueueRotation


def ready(_queue: str) -> bool:
    return True


@pytest.fixture
def rotation() -> QueueRotation[str]:
    return QueueRotation()


def claim(rotation: QueueRotation[str], wanted: int, due: dict[str, int]) -> dict[str, int]:
    """Take due tasks as a claim does; return how many it has taken from each queue into which it looked."""
    portions = rotation.take(wanted, ready)
    taken = {}
    for queue, portion in list(portions.items()):
        if wanted == 0:
            break
        del portions[queue]
        taken[queue] = min(portion, wanted, due[queue])
        wanted -= taken[queue]
        due[queue] -= taken[queue]
        rotation.looked_into(queue, has_more=due[queue] > 0)
    rotation.put_back(portions)
    return taken


def test_a_claim_looks_only_into_the_queues_that_may_have_tasks(rotation):
    rotation.expect(["a", "b"])

    assert claim(rotation, 10, {"a": 1, "b": 0, "c": 5}) == {"a": 1, "b": 0}
    assert not rotation


def test_a_single_queue_gets_all(rotation):
    rotation.expect(["a"])

    assert rotation.take(1_000, ready) == {"a": 1_000}


def test_a_queue_with_more_tasks_is_looked_into_again(rotation):
    due = {"a": 1_500}
    rotation.expect(["a"])

    assert [claim(rotation, 1_000, due) for _ in range(2)] == [{"a": 1_000}, {"a": 500}]
    assert not rotation


def test_a_full_queue_delays_the_first_task_of_another_by_one_claim_at_most(rotation):
    due = {"full": 100_000, "other": 0}
    rotation.expect(["full"])
    claim(rotation, 1_000, due)

    due["other"] = 1
    rotation.expect(["other"])

    assert claim(rotation, 1_000, due) == {"other": 1, "full": 999}


@pytest.mark.parametrize("wanted", [1, 3])
def test_even_a_claim_of_few_tasks_serves_each_of_many_queues_in_turn(rotation, wanted):
    names = list("abcdefghi")
    due = dict.fromkeys(names, 100)
    rotation.expect(names)

    served = [queue for _ in names for queue, count in claim(rotation, wanted, due).items() if count]

    assert served[: len(names)] == names


def test_a_queue_that_is_expected_again_and_again_does_not_overtake_the_others(rotation):
    due = {"busy": 1_000, "other": 1_000}
    rotation.expect(due)
    served = []
    for _ in range(6):
        rotation.expect(["busy"])
        served += claim(rotation, 1, due)

    assert served == ["busy", "other"] * 3


def test_many_full_queues_get_portions_that_are_worth_a_scan(rotation):
    due = {f"queue{n}": 10_000 for n in range(200)}
    rotation.expect(due)
    for _ in range(10):  # at first, it isn't known that they are full
        claim(rotation, 1_000, due)

    taken = claim(rotation, 1_000, due)

    assert set(taken.values()) == {MIN_PORTION}
    assert sum(taken.values()) == 1_000


def test_a_full_queue_gets_the_rest_if_the_others_have_few_tasks(rotation):
    due = {"full": 100_000, **{f"queue{n}": 1 for n in range(20)}}
    rotation.expect(["full"])
    claim(rotation, 1_000, due)
    rotation.expect(due)

    assert sum(claim(rotation, 1_000, due).values()) == 1_000


def test_a_queue_is_kept_until_it_is_ready(rotation):
    rotation.expect(["a", "b"])

    assert rotation.take(1, lambda queue: queue == "b") == {"b": 1}
    assert rotation.has(lambda queue: queue == "a")
    assert not rotation.has(lambda queue: queue == "b")


def test_a_queue_that_is_expected_during_a_claim_is_looked_into_again(rotation):
    """A task was committed after the claim had begun."""
    rotation.expect(["a"])
    rotation.take(10, ready)

    rotation.expect(["a"])
    rotation.looked_into("a", has_more=False)

    assert rotation.has(ready)
