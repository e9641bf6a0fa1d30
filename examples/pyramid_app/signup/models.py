"""The tables, and `request.dbsession`, as in Pyramid's cookiecutter."""

import zope.sqlalchemy
from pyramid_tm import explicit_manager
from sqlalchemy import ForeignKey, create_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    configure_mappers,
    mapped_column,
    relationship,
    sessionmaker,
)

from apoq import database_url


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]


class Mail(Base):
    __tablename__ = "mails"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    user: Mapped[User] = relationship()


configure_mappers()


def make_engine(settings):
    return create_engine(database_url(settings["sqlalchemy.url"]))


def includeme(config):
    settings = config.get_settings()
    settings["tm.manager_hook"] = explicit_manager
    session_factory = sessionmaker(make_engine(settings))
    config.registry["dbsession_factory"] = session_factory

    def dbsession(request):
        session = session_factory(info={"request": request})
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    config.add_request_method(dbsession, reify=True)
