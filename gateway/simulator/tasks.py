"""The simulated vendor's tasks: the response for each task at a given time.

The state of a task is a pure function of its life, its creation time and the current time. Nothing runs in
the background, so a test that stops the clock stops every task.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from gateway.simulator.json_bodies import Seconds

Operation = Literal["sd_get_progress", "comfy_get_progress", "sd_get_result", "comfy_get_result"]
OPERATIONS: tuple[str, ...] = get_args(Operation)

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
IMAGES = "/images"  # the path above the images of finished tasks
_URL_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Life:
    """The schedule of a task, relative to its creation.

    `steps` is the resolution of its progress. With `jump_back`, progress falls at 65 % and recovers at 75
    %, as observed with the vendor. After `vanishes_after_seconds` the task is unknown.
    """

    waiting_seconds: Seconds = 2.0
    running_seconds: Seconds = 8.0
    outcome: Literal["succeeded", "failed", "canceled"] = "succeeded"
    steps: Annotated[int, Field(ge=1)] = 20
    jump_back: bool = True
    vanishes_after_seconds: Seconds | None = None


DEFAULT_LIFE = Life()


@dataclass(frozen=True, slots=True)
class _Moment:
    status: str
    step: int = 0
    queue: int = 0
    eta_seconds: float = 0.0  # 0 means "unknown" while the task runs, as in the documented example


@dataclass(frozen=True, slots=True)
class Task:
    """One task. `script`, if given, replaces the `data` that its life determines."""

    task_id: str
    born: float
    life: Life = DEFAULT_LIFE
    script: Mapping[str, Any] | None = None

    def known(self, now: float) -> bool:
        """Return whether the vendor still knows the task."""
        limit = self.life.vanishes_after_seconds
        return limit is None or now - self.born < limit

    def data(self, operation: str, now: float, *, base_url: str) -> dict[str, Any]:
        """Return the `data` of the envelope for `operation`; the URLs of images begin with `base_url`."""
        if self.script is not None:
            return {"taskId": self.task_id, **self.script}
        api, _, wanted = operation.partition("_get_")
        moment = _moment(self.life, now - self.born)
        if wanted != "result":
            return self._progress(api, moment)
        return self._result(api, moment, f"{base_url}{IMAGES}/{self.task_id}.png?Expires={_expiry(now)}")

    def _progress(self, api: str, moment: _Moment) -> dict[str, Any]:
        data: dict[str, Any] = {
            "taskId": self.task_id,
            "status": _spelled(api, moment.status),
            "progress": moment.step / self.life.steps,
            "lastQueueRemaining": moment.queue,
            "etaRelative": moment.eta_seconds,
        }
        if moment.status == "waiting":  # the documented example has no message and no state
            return data
        data["message"] = f"step {moment.step} of {self.life.steps}"
        if api == "sd":
            data["state"] = {
                "job": "task(simulated)",
                "job_no": 0,
                "job_count": 1,
                "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(self.born)),
                "sampling_step": moment.step,
                "sampling_steps": self.life.steps,
                "skipped": False,
                "interrupted": moment.status == "canceled",
            }
        return data

    def _result(self, api: str, moment: _Moment, url: str) -> dict[str, Any]:
        data: dict[str, Any] = {"status": _spelled(api, moment.status)}
        if api == "comfy":  # the vendor's Python client cannot parse a comfy result without it
            data["taskId"] = self.task_id
        if moment.status == "succeeded":
            if api == "sd":
                data |= {"images": [url], "parameters": {"steps": self.life.steps}, "info": "simulated"}
            else:
                data["result"] = {"images": {"url": url}}
        return data


def new_task_id(clock: Callable[[], float], random: Random) -> str:
    """Return an ID like the vendor's: a ULID (48 bits of milliseconds, 80 random bits) in lower case."""
    number = int(clock() * 1000) << 80 | random.getrandbits(80)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def _expiry(now: float) -> int:
    return int(now) + _URL_SECONDS


def _moment(life: Life, age: float) -> _Moment:
    if age < life.waiting_seconds:
        return _Moment("waiting", queue=math.ceil(life.waiting_seconds - age))
    ran = age - life.waiting_seconds
    if ran >= life.running_seconds:
        return _Moment(life.outcome, step=life.steps - (life.outcome != "succeeded"))
    part = ran / life.running_seconds
    if life.jump_back and 0.65 <= part < 0.75:  # noqa: PLR2004 - see Life
        part -= 0.3
    return _Moment("running", step=int(part * life.steps), eta_seconds=round(life.running_seconds - ran, 3))


def _spelled(api: str, status: str) -> str:
    # The vendor's sd reference spells it "successed", its comfy reference "succeeded".
    return "successed" if (api, status) == ("sd", "succeeded") else status
