"""What reviewers say of pictures."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "review_labels",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("reviewer", sa.String(256), primary_key=True),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("verdict", sa.String(16)),
        sa.Column("caption", sa.Text()),
        sa.Column("tags", sa.Text()),
    )


def downgrade() -> None:
    op.drop_table("review_labels")
