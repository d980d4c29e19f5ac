"""Answers to those who can wait are kept once too, and an answer may be completed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

#: The full text index of SQLite keeps in step by triggers; PostgreSQL's columns are generated.
_SQLITE_TEXT = """
CREATE TRIGGER prediction_words_update AFTER UPDATE OF caption_words, tags_words, facets ON predictions BEGIN
    INSERT INTO prediction_words (prediction_words, rowid, caption_words, tags_words, facets)
    VALUES ('delete', old.id, old.caption_words, old.tags_words, old.facets);
    INSERT INTO prediction_words (rowid, caption_words, tags_words, facets)
    VALUES (new.id, new.caption_words, new.tags_words, new.facets);
END
"""


def upgrade() -> None:
    # a replica of the release before writes rows without it
    op.add_column("deferred", sa.Column("name", sa.String(64)))
    if op.get_bind().dialect.name == "sqlite":
        op.execute(_SQLITE_TEXT)


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER prediction_words_update")
    op.drop_column("deferred", "name")
