"""${message}."""

from alembic import op

from apoq.migrations.steps import STEPS

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    STEPS[${int(up_revision)}].upgrade(op)


def downgrade() -> None:
    STEPS[${int(up_revision)}].downgrade(op)

% if upgrades and upgrades != "pass":

# Move this to apoq/migrations/v${up_revision}.py, so that it is installed with apoq, and delete it here:
#
# def upgrade(op: Operations, schema: str | None = None) -> None:
% for line in upgrades.splitlines()[1:-1]:
#     ${line.strip()}
% endfor
#
# def downgrade(op: Operations, schema: str | None = None) -> None:
% for line in downgrades.splitlines()[1:-1]:
#     ${line.strip()}
% endfor
% endif
