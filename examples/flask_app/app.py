"""A site on which people sign up and get a welcome mail."""

import os
import smtplib
from email.message import EmailMessage
from pathlib import Path

from flask import Blueprint, Flask, current_app, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import ForeignKey, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from apoq import RunningTask, database_url
from apoq.flask import Apoq
from apoq.migrations import include_object

MIGRATIONS = str(Path(__file__).parent / "migrations")


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
migrate = Migrate(db=db, directory=MIGRATIONS, include_object=include_object)
apoq = Apoq()
site = Blueprint("site", __name__)


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


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = database_url(os.environ["DATABASE_URL"])
    app.config["SMTP_HOST"] = os.environ.get("SMTP_HOST", "localhost")
    app.config["SMTP_PORT"] = int(os.environ.get("SMTP_PORT", "25"))
    app.config.from_prefixed_env()  # FLASK_APOQ_CONCURRENCY=8, and so on
    db.init_app(app)
    migrate.init_app(app)
    apoq.init_app(app)
    app.register_blueprint(site)
    return app


@site.get("/")
def index() -> str:
    return render_template("index.html", mails=db.session.scalars(select(Mail).order_by(Mail.id)))


@site.post("/sign-up")
def sign_up() -> ResponseReturnValue:
    user = User(name=request.form["name"], email=request.form["email"])
    db.session.add(user)
    db.session.flush()  # for its id
    send_welcome.add(user_id=user.id)
    if "fail" in request.form:
        raise RuntimeError("the user and the task are rolled back")
    db.session.commit()  # commits both
    return redirect(url_for("site.index"), 303)


@apoq.task
def send_welcome(task: RunningTask, user_id: int) -> None:
    user = task.session.get_one(User, user_id)
    message = EmailMessage()
    message["From"], message["To"] = "hello@example.org", user.email
    message["Subject"] = f"Welcome, {user.name}"
    message.set_content("It's good to have you here.")
    with smtplib.SMTP(current_app.config["SMTP_HOST"], current_app.config["SMTP_PORT"]) as smtp:
        smtp.send_message(message)
    task.session.add(Mail(user=user))  # commits together with the task's completion
