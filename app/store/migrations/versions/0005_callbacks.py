"""Call-backs for those who can wait, and the request that a picture came with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # a replica of the release before writes rows without them
    op.add_column("deferred", sa.Column("request_id", sa.String(128), nullable=False, server_default=""))
    op.add_column("deferred", sa.Column("traceparent", sa.String(64), nullable=False, server_default=""))
    op.create_table(
        "callbacks",
        sa.Column("place", sa.String(64), primary_key=True),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
    )
    op.create_index(
        "ix_callbacks_due",
        "callbacks",
        ["due_at"],
        postgresql_where=sa.text("state = 'due'"),
        sqlite_where=sa.text("state = 'due'"),
    )


def downgrade() -> None:
    op.drop_table("callbacks")
    op.drop_column("deferred", "traceparent")
    op.drop_column("deferred", "request_id")
