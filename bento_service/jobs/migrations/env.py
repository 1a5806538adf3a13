"""Alembic's entry point. ``database`` hands over an open transaction; there is no other way in."""

from alembic import context

from bento_service.jobs.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
context.run_migrations()
