"""A program in an instance's environment, on its Ray and Serve: how long a replica takes to answer, and how long while
another of its callers, to whom it owes an answer, stands still. Prints the seconds of each answer, a line for either.

    python -m tests.app.stuck_caller ADDRESS-OF-RAY
"""

# No postponed annotations here: Ray reads those of deployments.
import asyncio
import os
import sys
import time

import psutil
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

#: A caller asks for an answer that takes so long, and stands still after half of it.
OWED_AFTER_S = 2.0
#: So many answers are timed, and one that takes so long is held up for good.
ANSWERS, FOR_GOOD_S = 20, 60.0


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Model:
    """Answers when it is told to."""

    async def work(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Caller:
    """In the ingress's place."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    async def process_id(self) -> int:
        return os.getpid()

    async def ask(self, seconds: float) -> float:
        return await self._model.work.remote(seconds)


async def timed(caller: DeploymentHandle) -> list[float]:
    """Seconds of each answer that a caller gets."""
    seconds = []
    for _ in range(ANSWERS):
        began = time.monotonic()
        await asyncio.wait_for(caller.ask.remote(0.0), FOR_GOOD_S)
        seconds.append(round(time.monotonic() - began, 4))
    return seconds


async def main() -> None:
    callers = [serve.get_app_handle(name) for name in ("first", "second")]
    stuck = psutil.Process(await callers[0].process_id.remote())
    for caller in callers:
        await caller.ask.remote(0.0)
    print(*await timed(callers[1]))
    owed = callers[0].ask.remote(OWED_AFTER_S)
    await asyncio.sleep(OWED_AFTER_S / 2)
    stuck.suspend()
    try:
        await asyncio.sleep(OWED_AFTER_S)
        print(*await timed(callers[1]))
    finally:
        stuck.resume()
    await owed


if __name__ == "__main__":
    ray.init(address=sys.argv[1], log_to_driver=False)
    try:
        serve.run(Caller.bind(Model.bind()), name="first", route_prefix=None)
        model = serve.get_deployment_handle("Model", "first")
        serve.run(Caller.bind(model), name="second", route_prefix=None)
        asyncio.run(main())
    finally:
        for name in ("second", "first"):
            serve.delete(name)
