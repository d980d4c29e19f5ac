"""Answers to requests that may be sent again: each is kept once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("predictions", sa.Column("name", sa.String(64)))
    named = sa.text("name IS NOT NULL")
    op.create_index(
        "ix_predictions_name", "predictions", ["name"], unique=True, postgresql_where=named, sqlite_where=named
    )


def downgrade() -> None:
    op.drop_index("ix_predictions_name", "predictions")
    op.drop_column("predictions", "name")
