"""Answers of the two models of a trial."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "trial_answers",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
        sa.Column("model", sa.String(16), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("returned", sa.Boolean(), nullable=False),
        sa.Column("revision", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("code", sa.String(32), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("said", sa.Text()),
        sa.Column("agreement", sa.Float()),
    )
    op.create_index("ix_trial_answers_model", "trial_answers", ["model", "id"])
    op.create_index("ix_trial_answers_sha256", "trial_answers", ["sha256"])


def downgrade() -> None:
    op.drop_table("trial_answers")
