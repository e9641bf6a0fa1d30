import asyncio

from alembic import context
from app import Base, engine
from sqlalchemy import Connection

from apoq.migrations import include_object


def migrate(connection: Connection | None = None) -> None:
    context.configure(
        connection=connection,
        url=engine.url,
        target_metadata=Base.metadata,
        include_object=include_object,
        literal_binds=connection is None,
    )
    with context.begin_transaction():
        context.run_migrations()


async def migrate_online() -> None:
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


if context.is_offline_mode():
    migrate()
else:
    asyncio.run(migrate_online())
