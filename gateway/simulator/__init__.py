"""A simulated upstream: it verifies signatures like the vendor, runs simulated tasks, and injects faults.

`sd-gateway simulate`, the demo and the tests use it. A call is authenticated (`api_gateway.py`) and answered
from its task (`tasks.py`); then the active faults are applied to the response (`faults.py`). `app.py`
connects these parts and counts calls. All state is bounded and in memory.

The control API uses JSON without signatures, so the simulator should listen on loopback only. Paths under
`/_simulator`:

    POST   /tasks       {"taskId"?, "life"?, "data"?}   -> 201 {"taskId"}; data: a scripted task
    PUT    /tasks/{id}  {"data"}   set the scripted `data` (creates the task); taskId is filled in
    DELETE /tasks/{id}             delete the task
    PUT    /faults      {"name", …parameters, "times"?, "operation"?, "taskId"?, "probability"?}
    GET    /faults                 the active faults         DELETE: clear all
    PUT    /legacy      {"enabled"}   send refusals like older deployments
    PUT    /pairs       {"pairs"}   replace the accepted key pairs: a map of access keys to secrets
    PUT    /limit       {"calls", "retryAfter"?}   maximum calls per second, others are throttled; 0: no limit
    GET    /stats                  calls, callsByTask, refused (by the gate), throttled (by the limit),
                                   inFlight, maxInFlight, times                     DELETE: reset
    GET    /requests               the last 200 vendor requests: method, target, headers, body

The images of finished tasks are at `/images/{name}.png?Expires=…`, also without signatures.

`life` has the fields of `Life`; faults have the parameters of the functions in `faults.py`; both in
camelCase. An invalid control request is answered with status 400 and the reason as plain text.

Responses have a `Date` of the simulator's own clock, so uvicorn must run with `date_header=False`. The fault
`silent` blocks a graceful shutdown, so uvicorn needs a `timeout_graceful_shutdown`.
"""

from gateway.simulator.app import create_simulator
from gateway.simulator.faults import FAULTS
from gateway.simulator.json_bodies import ControlError, parse_object
from gateway.simulator.tasks import Life, new_task_id

__all__ = ["FAULTS", "ControlError", "Life", "create_simulator", "new_task_id", "parse_object"]
