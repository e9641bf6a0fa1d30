"""imports, their orders, and the customers"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "imports",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("file_name", sa.String, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.Column("group_id", sa.BigInteger),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("rows", sa.Integer),
        sa.Column("amount", sa.Numeric(20, 2)),
        sa.Column("problems", sa.JSON, nullable=False),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("import_id", sa.Integer, sa.ForeignKey("imports.id"), nullable=False),
        sa.Column("line", sa.Integer, nullable=False),
        sa.Column("customer", sa.String, nullable=False),
        sa.Column("item", sa.String, nullable=False),
        sa.Column("quantity", sa.Integer, nullable=False),
        sa.Column("price", sa.Numeric(10, 2), nullable=False),
    )
    op.create_index("ix_orders_import_id", "orders", ["import_id"])
    op.create_table(
        "customers",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("orders", sa.Integer, nullable=False),
        sa.Column("amount", sa.Numeric(20, 2), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("customers")
    op.drop_table("orders")
    op.drop_table("imports")
