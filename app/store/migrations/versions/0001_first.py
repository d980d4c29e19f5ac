"""Answers, feedback, pictures, deletions, and the full text of captions and tags."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")

#: FTS5 without a copy of the texts: it reads them off `predictions` by row number, and triggers keep it in step.
_SQLITE_TEXT = [
    """
    CREATE VIRTUAL TABLE prediction_words USING fts5(
        caption_words, tags_words, facets,
        content='predictions', content_rowid='id', tokenize='porter unicode61'
    )
    """,
    """
    CREATE TRIGGER prediction_words_insert AFTER INSERT ON predictions BEGIN
        INSERT INTO prediction_words (rowid, caption_words, tags_words, facets)
        VALUES (new.id, new.caption_words, new.tags_words, new.facets);
    END
    """,
    """
    CREATE TRIGGER prediction_words_delete AFTER DELETE ON predictions BEGIN
        INSERT INTO prediction_words (prediction_words, rowid, caption_words, tags_words, facets)
        VALUES ('delete', old.id, old.caption_words, old.tags_words, old.facets);
    END
    """,
]

_POSTGRES_TEXT = [
    """
    ALTER TABLE predictions
        ADD COLUMN tags_text tsvector GENERATED ALWAYS AS (
            to_tsvector('english', tags_words) || to_tsvector('simple', facets)
        ) STORED,
        ADD COLUMN all_text tsvector GENERATED ALWAYS AS (
            to_tsvector('english', caption_words) || to_tsvector('english', tags_words) || to_tsvector('simple', facets)
        ) STORED
    """,
    # without a pending list a search never has to walk what was written last
    "CREATE INDEX ix_predictions_tags_text ON predictions USING gin (tags_text) WITH (fastupdate = off)",
    "CREATE INDEX ix_predictions_all_text ON predictions USING gin (all_text) WITH (fastupdate = off)",
]


def upgrade() -> None:
    op.create_table(
        "predictions",
        sa.Column("id", _ID, primary_key=True, autoincrement=False),
        sa.Column("answer_id", sa.String(128), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("verdict", sa.String(16)),
        sa.Column("ai_probability", sa.Float()),
        sa.Column("declared_ai", sa.Boolean()),
        sa.Column("flagged", sa.Boolean(), nullable=False),
        sa.Column("expires_id", sa.BigInteger()),
        sa.Column("record", sa.Text(), nullable=False),
        sa.Column("caption_words", sa.Text(), nullable=False),
        sa.Column("tags_words", sa.Text(), nullable=False),
        sa.Column("facets", sa.Text(), nullable=False),
    )
    op.create_index("ix_predictions_answer", "predictions", ["answer_id", "id"])
    op.create_index("ix_predictions_sha256", "predictions", ["sha256"])
    op.create_index("ix_predictions_verdict", "predictions", ["verdict", "id"])
    expiring = sa.text("expires_id IS NOT NULL")
    op.create_index(
        "ix_predictions_expires", "predictions", ["expires_id"], postgresql_where=expiring, sqlite_where=expiring
    )
    op.create_table(
        "feedback",
        sa.Column("id", _ID, primary_key=True, autoincrement=False),
        sa.Column("key", sa.String(200), nullable=False, unique=True),
        sa.Column("content", sa.String(64), nullable=False),
        sa.Column("prediction_id", _ID, sa.ForeignKey("predictions.id", ondelete="CASCADE"), nullable=False),
        sa.Column("part", sa.String(16), nullable=False),
        sa.Column("correct", sa.Boolean(), nullable=False),
        sa.Column("value", sa.Text()),
        sa.Column("said_by", sa.String(128)),
    )
    op.create_index("ix_feedback_prediction_id", "feedback", ["prediction_id"])
    op.create_table(
        "pictures",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("media_type", sa.String(32), nullable=False),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        sa.Column("stored", sa.Boolean(), nullable=False),
    )
    waiting = sa.text("NOT stored")
    op.create_index("ix_pictures_waiting", "pictures", ["id"], postgresql_where=waiting, sqlite_where=waiting)
    op.create_table(
        "deletions",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("id", sa.BigInteger(), nullable=False),
    )
    for statement in _POSTGRES_TEXT if op.get_bind().dialect.name == "postgresql" else _SQLITE_TEXT:
        op.execute(statement)


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TABLE prediction_words")  # its triggers go with `predictions`
    for table in ("deletions", "pictures", "feedback", "predictions"):
        op.drop_table(table)
