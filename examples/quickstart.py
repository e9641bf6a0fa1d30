"""A hundred messages: add tasks, run them, and print each completion.

Runs on DATABASE_URL, or else on a private PostgreSQL of its own:

    python examples/quickstart.py
"""

import random
import threading
import time

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from apoq import Queue, RunningTask, Task, Worker, prepare
from apoq.embedded import database

MESSAGES = ["💖", "🧡", "💛", "💚", "💙"]
COUNT = 100


def send(task: RunningTask) -> None:
    # With the line end in the text, because four threads print at once.
    print(f"📧 sending a {task.data['color']}\n", end="")


def main(url: str) -> None:
    engine = create_engine(url)

    # Create or migrate the tables. Safe at every start.
    prepare(engine)

    # A task is a row in your own transaction: it exists if that commits.
    queue = Queue()
    with Session(engine) as session, session.begin():
        for _ in range(COUNT):
            queue.add(session, "send_message", {"color": random.choice(MESSAGES)})

    # The function for tasks of this type, and a listener.
    worker = Worker(engine, queue)
    worker.use("send_message", send)
    left = threading.Semaphore(0)

    def completed(task: Task) -> None:
        print(f"✨ task {task.id} complete\n", end="")
        left.release()

    worker.events.on("task.completed", completed)

    began = time.perf_counter()
    worker.start()
    for _ in range(COUNT):
        left.acquire()
    took = time.perf_counter() - began
    worker.stop()
    engine.dispose()

    print(f"\n{COUNT} tasks completed in {took:.2f} s: {COUNT / took:,.0f} a second")


if __name__ == "__main__":
    with database() as url:
        main(url)
