"""Which of the other workers are dead, decided from what was seen of them."""

from __future__ import annotations

import math
from uuid import UUID

import pytest

from apoq.worker.liveness.peers import GONE_SHARE_OF_GRACE, Peer, Peers

OWN_GRACE = 3.0
GRACE = 10.0


def peer(
    number: int = 1, *, heartbeat: float | None = 100.0, left: float | None = -1.0, is_gone: bool = False
) -> Peer:
    grace = None if heartbeat is None else GRACE
    return Peer(UUID(int=number), heartbeat, grace, left, is_gone, False)


@pytest.fixture
def peers() -> Peers:
    return Peers(OWN_GRACE)


def test_a_worker_is_not_dead_at_first_sight(peers):
    assert peers.look([peer()], now=0) == ([], GRACE)


def test_one_that_shows_no_sign_of_life_for_its_own_grace_is_dead(peers):
    peers.look([peer()], now=0)

    assert peers.look([peer()], now=GRACE - 0.5) == ([], 0.5)
    assert peers.look([peer()], now=GRACE) == ([UUID(int=1)], math.inf)


def test_one_whose_connection_is_gone_as_well_is_dead_sooner(peers):
    peers.look([peer(is_gone=True)], now=0)

    assert peers.look([peer(is_gone=True)], now=GRACE * GONE_SHARE_OF_GRACE) == ([UUID(int=1)], math.inf)


def test_a_heartbeat_in_between_begins_the_wait_again(peers):
    """As after a step of the database's clock, by which all leases have ended."""
    peers.look([peer(heartbeat=100)], now=0)

    assert peers.look([peer(heartbeat=103)], now=GRACE) == ([], GRACE)
    assert peers.look([peer(heartbeat=103)], now=2 * GRACE - 1) == ([], 1)


def test_one_whose_lease_has_not_ended_is_alive_however_long_it_is_silent(peers):
    peers.look([peer(left=60)], now=0)

    assert peers.look([peer(left=20)], now=40) == ([], 20)


def test_one_with_claims_and_no_row_is_waited_for_by_the_own_grace(peers):
    gone = peer(heartbeat=None, left=None)

    assert peers.look([gone], now=0) == ([], OWN_GRACE)
    assert peers.look([gone], now=OWN_GRACE) == ([gone.id], math.inf)


def test_after_an_absence_of_its_own_it_begins_to_look_from_the_start(peers):
    peers.look([peer()], now=0)
    peers.forget()

    assert peers.look([peer()], now=GRACE) == ([], GRACE)


def test_one_that_is_seen_again_after_it_had_left_begins_from_the_start(peers):
    peers.look([peer()], now=0)
    peers.look([], now=GRACE / 2)

    assert peers.look([peer()], now=GRACE) == ([], GRACE)


def test_each_is_looked_at_by_itself(peers):
    peers.look([peer(1), peer(2)], now=0)

    dead, _ = peers.look([peer(1), peer(2, heartbeat=105), peer(3)], now=GRACE)

    assert dead == [UUID(int=1)]
