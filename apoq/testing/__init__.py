"""Test helpers: look for new tasks, and run them, in a transaction that the test rolls back.

.. code-block:: python

    def test_a_new_user_is_welcomed(session):
        sign_up(session, "ann@example.com")

        assert_enqueued(session, "send_welcome", user_id=7)
        drain(session, worker)

None of them commits, or needs a started worker.
"""

from apoq.testing.clock import freeze, travel
from apoq.testing.databases import rolled_back
from apoq.testing.drain import drain
from apoq.testing.enqueued import assert_enqueued, enqueued

__all__ = ["assert_enqueued", "drain", "enqueued", "freeze", "rolled_back", "travel"]
