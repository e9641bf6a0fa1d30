from alembic import context
from pyramid.paster import get_appsettings, setup_logging
from signup import with_environment
from signup.models import Base, make_engine

from apoq.migrations import include_object

ini = context.config.config_file_name
engine = make_engine(with_environment(get_appsettings(ini)))


def configure(**where) -> None:
    # include_object keeps `alembic revision --autogenerate` from touching apoq's tables.
    context.configure(target_metadata=Base.metadata, include_object=include_object, **where)
    with context.begin_transaction():
        context.run_migrations()


setup_logging(ini)
if context.is_offline_mode():
    configure(url=engine.url, literal_binds=True)
else:
    with engine.connect() as connection:
        configure(connection=connection)
