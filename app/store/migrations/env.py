"""Alembic's environment: runs the migrations on the connection that ``app.store.database`` hands in, in its
transaction.
"""

from __future__ import annotations

from alembic import context

from app.store.models import Base

#: MLflow calls its own `alembic_version`; a database that both were given by mistake is not damaged.
VERSION_TABLE = "deeptrust_store_version"

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
