"""For your tests: what has been added in a transaction that is rolled back, and running it there.

.. code-block:: python

    def test_a_new_user_is_welcomed(session):
        sign_up(session, "ann@example.com")

        assert_enqueued(session, "send_welcome", user_id=7)
        drain(session, worker)

Nothing here commits, needs a worker that has started, or touches another transaction.
"""

from apoq.testing.clock import freeze, travel
from apoq.testing.databases import rolled_back
from apoq.testing.drain import drain
from apoq.testing.enqueued import assert_enqueued, enqueued

__all__ = ["assert_enqueued", "drain", "enqueued", "freeze", "rolled_back", "travel"]
