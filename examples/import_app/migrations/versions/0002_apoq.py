"""background tasks"""

from alembic import op

import apoq.migrations

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    apoq.migrations.upgrade(op, version=1)


def downgrade() -> None:
    apoq.migrations.downgrade(op, version=0)
