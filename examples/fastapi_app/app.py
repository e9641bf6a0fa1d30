"""A site on which people sign up and get a welcome mail."""

import asyncio
import os
import smtplib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from email.message import EmailMessage
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Form, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.templating import Jinja2Templates
from sqlalchemy import ForeignKey, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

import apoq.fastapi
from apoq import AsyncRunningTask, Queue, Worker, database_url

engine = create_async_engine(database_url(os.environ["DATABASE_URL"]))
queue = Queue()
worker = Worker(engine, queue)


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


@queue.task
async def send_welcome(task: AsyncRunningTask, user_id: int) -> None:
    user = await task.session.get_one(User, user_id)
    message = EmailMessage()
    message["From"], message["To"] = "hello@example.org", user.email
    message["Subject"] = f"Welcome, {user.name}"
    message.set_content("It's good to have you here.")
    await asyncio.to_thread(send, message)
    task.session.add(Mail(user=user))  # commits together with the task's completion


def send(message: EmailMessage) -> None:
    host, port = os.environ.get("SMTP_HOST", "localhost"), int(os.environ.get("SMTP_PORT", "25"))
    with smtplib.SMTP(host, port) as smtp:
        smtp.send_message(message)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    works = os.environ.get("IN_PROCESS_WORKER") == "1"  # otherwise run `apoq worker app:worker`
    async with apoq.fastapi.lifespan(worker) if works else nullcontext():
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
pages = Jinja2Templates(Path(__file__).parent / "templates")
SessionDep = Annotated[AsyncSession, apoq.fastapi.transaction(async_sessionmaker(engine))]


@app.get("/")
async def index(request: Request, session: SessionDep) -> HTMLResponse:
    mails = await session.scalars(select(Mail).options(selectinload(Mail.user)).order_by(Mail.id))
    return pages.TemplateResponse(request, "index.html", {"mails": mails.all()})


@app.post("/sign-up")
async def sign_up(
    session: SessionDep,
    name: Annotated[str, Form()],
    email: Annotated[str, Form()],
    fail: Annotated[bool, Form()] = False,
) -> RedirectResponse:
    user = User(name=name, email=email)
    session.add(user)
    await session.flush()  # for its id
    await send_welcome.add(session, user_id=user.id)
    if fail:
        raise RuntimeError("the user and the task are rolled back")
    return RedirectResponse("/", 303)  # both are committed before the response is sent


@app.get("/health")
async def health() -> JSONResponse:
    return JSONResponse({"worker": worker.is_healthy()}, 200 if worker.is_healthy() else 503)
