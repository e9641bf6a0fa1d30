"""Create the tables of apoq."""

from alembic import op

from apoq.migrations.steps import STEPS

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    STEPS[1].upgrade(op)


def downgrade() -> None:
    STEPS[1].downgrade(op)
