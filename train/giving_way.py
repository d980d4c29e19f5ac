"""Training takes what serving leaves of a cluster, and gives it back when serving grows.

Ray gives GPUs and CPUs to whoever asks first and takes them from nobody: a replica that Serve's autoscaler wants would
wait until a training of hours is over. So the first worker of a run asks now and then whether a replica waits for what
the run holds; if one does for longer than a start takes, the run stops with a checkpoint as at its time limit, its
driver waits until there is room again, and goes on.

In: the cluster's actors and resources, as Ray's state API and its nodes tell of them. Out: ``GiveWay`` for the worker
and ``wait_for_room`` for the driver. Knows no trainer.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal

logger = logging.getLogger(__name__)

Resource = Literal["CPU", "GPU"]
#: Actor's or placement group's id -> deployment of each replica that waits for some of a resource.
Ask = Callable[[Resource], Mapping[str, str]]

#: What Serve's names of replicas begin with; ``APPLICATION#DEPLOYMENT#ID`` follows.
_REPLICA = "SERVE_REPLICA::"
#: Between two questions.
_ASK_S = 5.0
#: Room must have been there for as long as this: a replica that has just ended may be about to start elsewhere.
_SETTLED_S = 60.0
#: A replica that has not started by then, with all that the run held, waits for something else.
_NO_HELP_S = 300.0
#: Between two lines that say why nothing happens.
_SAY_S = 60.0


def waiting_replicas(resource: Resource) -> dict[str, str]:
    """Replicas of Serve that have no place yet and want some of a resource, no more than a node has: those that are
    actors alone, and those that wait for a placement group (the tagger, whose engine has processes of its own).

    Raises:
        RayStateApiException, OSError: Ray's dashboard does not answer.
    """
    import ray
    from ray.util.state import list_actors, list_placement_groups

    options: dict[str, Any] = {"detail": True, "limit": 1000, "timeout": 10, "raise_on_missing_output": False}
    options["address"] = ray.get_runtime_context().gcs_address  # of several instances on a machine, this one
    wanted: dict[str, tuple[str, float]] = {}
    for actor in list_actors(filters=[("state", "=", "PENDING_CREATION"), ("ray_namespace", "=", "serve")], **options):
        if not actor.pid:
            needs = (actor.required_resources or {}).get(resource, 0.0)
            wanted[actor.actor_id] = (actor.class_name.rpartition(":")[2], needs)
    for group in list_placement_groups(filters=[("state", "!=", "REMOVED")], **options):
        if group.state != "CREATED" and group.name.startswith(_REPLICA):
            needs = sum(bundle["unit_resources"].get(resource, 0.0) for bundle in group.bundles or [])
            wanted[group.placement_group_id] = (group.name.removeprefix(_REPLICA).split("#")[1], needs)
    most = max((node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    return {key: deployment for key, (deployment, needs) in wanted.items() if 0 < needs <= most}


class GiveWay:
    """Asks on a thread of its own, while it is entered, whether a replica waits for what a run holds.

    Args:
        resource: what the run holds.
        after_s: how long a replica may wait.
        every_s: between two questions; five seconds unless it is given.
    """

    def __init__(
        self, resource: Resource, after_s: float, ask: Ask = waiting_replicas, every_s: float | None = None
    ) -> None:
        self._resource, self._after_s, self._ask, self._every_s = resource, after_s, ask, every_s or _ASK_S
        self._since: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="give-way", daemon=True)
        self.to = ""
        """The deployment for which the run should stop, once there is one."""

    def __enter__(self) -> GiveWay:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=self._every_s)

    def _watch(self) -> None:
        while not self.to and not self._over.wait(self._every_s):
            try:
                waiting = self._ask(self._resource)
            except Exception as error:  # of Ray's dashboard: training does not depend on it
                logger.warning("nobody can say whether serving waits for a %s: %r", self._resource, error)
                continue
            now = time.monotonic()
            self._since = {replica: self._since.get(replica, now) for replica in waiting}
            late = [waiting[replica] for replica, since in self._since.items() if now - since >= self._after_s]
            self.to = late[0] if late else ""


def wait_for_room(
    resource: Resource,
    amount: float,
    deadline: float,
    ask: Ask = waiting_replicas,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Literal["room", "time", "no help"]:
    """Wait, with nothing held, until a run can go on.

    Args:
        amount: what the run wants of the resource, all its workers together.
        deadline: ``time.time()`` at which to give up.

    Returns:
        `room`: there has been room for a minute and nobody waits; `time`: the deadline has come; `no help`: a replica
        goes on waiting though what the run held is free.
    """
    import ray

    began = time.monotonic()
    settled: float | None = None
    always: set[str] | None = None
    said = -math.inf
    while time.time() < deadline:
        now, free, unknown = time.monotonic(), ray.available_resources().get(resource, 0.0), ""
        waiting: Mapping[str, str] = {}
        try:
            waiting = ask(resource)
            always = set(waiting) if always is None else always & set(waiting)
        except Exception as error:  # of Ray's dashboard: better to wait than to take what serving may want
            unknown = f"; Ray's dashboard does not say who waits ({type(error).__name__})"
        if waiting or unknown or free < amount:
            settled = None
        elif settled is None:
            settled = now
        elif now - settled >= _SETTLED_S:
            return "room"
        if always and free >= amount and now - began >= _NO_HELP_S:
            return "no help"
        if now - said >= _SAY_S:
            said = now
            before = f"; before this run: {', '.join(sorted(set(waiting.values())))}" if waiting else unknown
            say(f"serving comes first: waiting for {amount:g} {resource}, {free:g} free{before}")
        time.sleep(_ASK_S)
    return "time"
