"""${message}"""

from alembic import op

from apoq.migrations import v${up_revision}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}

# Move the operations into apoq/migrations/v${up_revision}.py, where an installed apoq has them too:
# ${upgrades if upgrades else "pass"}


def upgrade() -> None:
    v${up_revision}.upgrade(op)


def downgrade() -> None:
    v${up_revision}.downgrade(op)
