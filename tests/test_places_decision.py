"""Which tasks may begin under limits, without a database."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from apoq.core.places import KEY, POOL, WHOLE_QUEUE, Candidate, Rule, Rules, Share, State, decide

A, B = Share(KEY, "a"), Share(KEY, "b")
TYPE, WHOLE = Share(POOL, "t"), Share(POOL, WHOLE_QUEUE)
EVERYTHING = frozenset({A, B, TYPE, WHOLE})


def task(number: int, key: str | None = "a", **more) -> Candidate:
    return Candidate(number, "t", key, 0, float(number), **more)


def of_keys(at_most: int, **more) -> Rules:
    return Rules(keyed_types={"t": Rule(at_most, **more)})


def ids(found) -> list[int]:
    return [each.task.id if hasattr(each, "task") else each.id for each in found]


def decided(tasks, rules, held=None, room=100, locked=EVERYTHING, **state):
    return decide(tasks, rules, State(held or {}, locked, **state), room)


def test_tasks_without_a_limit_begin_without_a_place():
    found = decided([task(1), task(2, key=None)], Rules())

    assert [(each.task.id, each.slot, each.pool) for each in found.placed] == [
        (1, None, None),
        (2, None, None),
    ]


def test_the_first_tasks_of_a_key_get_the_lowest_free_places_and_the_others_wait():
    found = decided([task(1), task(2), task(3), task(4, key="b")], of_keys(3), {A: [1]})

    assert [(each.task.id, each.slot) for each in found.placed] == [(1, 0), (2, 2), (4, 0)]
    assert [(each.task.id, each.share) for each in found.blocked] == [(3, A)]
    assert found.full == {A}


def test_after_a_limit_was_lowered_no_task_begins_while_one_runs_in_a_place_that_is_too_high():
    assert not decided([task(1)], of_keys(2), {A: [4]}).placed
    assert decided([task(1)], of_keys(2), {A: [1]}).placed


def test_a_limit_of_0_lets_no_task_begin():
    assert ids(decided([task(1)], of_keys(0)).blocked) == [1]


def test_a_task_that_finds_no_room_remains_as_it_is():
    found = decided([task(1), task(2, key="b"), task(3)], of_keys(1), room=1)

    assert (ids(found.placed), ids(found.left), ids(found.blocked)) == ([1], [2], [3])


def test_a_task_whose_key_another_transaction_is_looking_at_remains_as_it_is():
    found = decided([task(1), task(2, key="b")], of_keys(1), locked=frozenset({B}))

    assert (ids(found.placed), ids(found.left)) == ([2], [1])


def test_tasks_that_wait_for_the_key_come_first():
    found = decided([task(2), task(9)], of_keys(2), awaited={A: task(5).order})

    assert (ids(found.placed), ids(found.blocked)) == ([2], [9])


def test_tasks_behind_others_that_wait_are_blocked_without_a_lock():
    unlocked = frozenset({B, TYPE, WHOLE})

    found = decided([task(2), task(9)], of_keys(2), locked=unlocked, awaited={A: task(5).order})
    strict = decided([task(9)], of_keys(1, is_strict=True), locked=unlocked, awaited={A: task(5).order})

    assert (ids(found.blocked), ids(found.left)) == ([9], [2])
    assert (ids(strict.blocked), ids(strict.placed), ids(strict.left)) == ([], [], [9])


def test_of_a_strict_key_only_the_first_task_begins():
    rules = of_keys(1, is_strict=True)

    assert ids(decided([task(5)], rules, first_ids={"a": 3}).blocked) == [5]
    assert ids(decided([task(3)], rules, first_ids={"a": 3}, awaited={A: task(1).order}).placed) == [3]


def test_a_task_needs_a_place_of_its_key_and_one_of_its_type():
    rules = Rules(types={"t": Rule(2)}, keys={"a": Rule(1)})
    found = decided([task(1), task(2), task(3, key="b"), task(4, key=None)], rules)

    assert [(each.task.id, each.slot, each.pool, each.pool_slot) for each in found.placed] == [
        (1, 0, "t", 0),
        (3, None, "t", 1),
    ]
    assert [(each.task.id, each.share) for each in found.blocked] == [(2, A), (4, TYPE)]


def test_the_limit_of_a_single_key_wins_over_that_of_its_type():
    rules = Rules(keyed_types={"t": Rule(1)}, keys={"a": Rule(2)})

    assert len(decided([task(1), task(2), task(3)], rules).placed) == 2


def test_tasks_of_a_full_queue_are_not_blocked_but_remain():
    found = decided([task(1, key=None), task(2, key=None)], Rules(whole=Rule(1)))

    assert (ids(found.placed), ids(found.left), ids(found.blocked)) == ([1], [2], [])
    assert found.full == {WHOLE}


def test_a_task_of_a_full_queue_is_not_blocked_by_its_key_either_unless_it_waits_for_that():
    rules = Rules(keyed_types={"t": Rule(1)}, whole=Rule(0))

    found = decided([task(1), task(2, waits_for=KEY)], rules, {A: [0]})

    assert (ids(found.left), ids(found.blocked)) == ([1], [2])


def test_a_type_with_a_limit_does_not_count_towards_that_of_its_queue():
    found = decided([task(1, key=None)], Rules(types={"t": Rule(1)}, whole=Rule(0)))

    assert ids(found.placed) == [1]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=20),
    st.integers(0, 4),
    st.integers(0, 5),
    st.sets(st.integers(0, 9), max_size=4),
    st.integers(0, 20),
)
def test_never_more_tasks_have_places_than_there_are(tasks, of_key, of_type, held, room):
    rules = Rules(types={"t": Rule(of_type)}, keys={"a": Rule(of_key), "b": Rule(of_key)})
    candidates = [task(number, key=key) for number, (key, _) in enumerate(tasks)]
    found = decided(candidates, rules, {A: sorted(held)}, room)

    of_a = [each.slot for each in found.placed if each.task.key == "a"]
    assert len(found.placed) <= min(room, of_type)
    assert len({*of_a, *held}) == len(of_a) + len(held)
    assert not of_a or len(of_a) + len(held) <= of_key
    assert sorted(ids([*found.placed, *found.blocked, *found.left])) == [each.id for each in candidates]
