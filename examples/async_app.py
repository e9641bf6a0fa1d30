"""An asyncio application: tasks are added through an AsyncSession, and run as coroutines on its event loop.

Runs on DATABASE_URL, or else on a private PostgreSQL of its own:

    python examples/async_app.py
"""

import asyncio

from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from apoq import AsyncRunningTask, Queue, Worker, prepare
from apoq.embedded import database

CITIES = ["Aachen", "Berlin", "Chemnitz", "Dresden", "Erfurt", "Fulda", "Gera", "Hamburg", "Ilmenau", "Jena"]


async def main(url: str) -> None:
    engine = create_async_engine(url)
    await prepare(engine)

    left = len(CITIES)
    done = asyncio.Event()

    async def fetch(task: AsyncRunningTask) -> None:
        nonlocal left
        await asyncio.sleep(0.1)  # a slow service
        print(f"🌦️ the weather in {task.data['city']}: changeable")
        left -= 1
        if left == 0:
            done.set()

    queue = Queue("weather")
    worker = Worker(engine, queue, concurrency=len(CITIES))
    worker.use("fetch_weather", fetch)
    worker.start(loop=asyncio.get_running_loop())

    async with AsyncSession(engine) as session, session.begin():
        for city in CITIES:
            await queue.add(session, "fetch_weather", {"city": city})

    loop = asyncio.get_running_loop()
    began = loop.time()
    await done.wait()
    print(f"✨ {len(CITIES)} tasks of 0.1 s each in {loop.time() - began:.2f} s")
    # `stop` waits for running tasks. On another thread, because they run on this thread's loop.
    await asyncio.to_thread(worker.stop)
    await engine.dispose()


if __name__ == "__main__":
    with database() as url:
        asyncio.run(main(url))
