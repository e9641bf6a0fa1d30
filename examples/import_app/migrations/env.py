from alembic import context
from flask import current_app

migrate = current_app.extensions["migrate"]


def configure(**where) -> None:
    context.configure(target_metadata=migrate.db.metadata, **where, **migrate.configure_args)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    configure(url=migrate.db.engine.url, literal_binds=True)
else:
    with migrate.db.engine.connect() as connection:
        configure(connection=connection)
