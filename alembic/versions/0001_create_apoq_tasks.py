"""Create apoq_tasks and apoq_workers."""

from alembic import op

from apoq.migrations import v0001

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    v0001.upgrade(op)


def downgrade() -> None:
    v0001.downgrade(op)
