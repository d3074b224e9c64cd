"""A simulated upstream: verifies signatures as the vendor does, plays tasks, misbehaves on demand.

`sd-gateway simulate`, the demo and the tests use it. A call goes through the gate (`gate.py`), is
answered from its task (`tasks.py`), and the answer through the faults in force (`faults.py`);
`app.py` wires and counts. All that it remembers is bounded and in memory.

The control API speaks JSON, unsigned: let the simulator listen on loopback only. Under `/_simulator`:

    POST   /tasks       {"taskId"?, "life"?, "data"?}   -> 201 {"taskId"}; data: a scripted task
    PUT    /tasks/{id}  {"data"}   the scripted `data` from now on (makes the task); taskId is filled in
    DELETE /tasks/{id}             forget it
    PUT    /faults      {"name", …parameters, "times"?, "operation"?, "taskId"?, "probability"?}
    GET    /faults                 those in force            DELETE: clear all
    PUT    /legacy      {"enabled"}   refuse as older deployments do
    PUT    /pairs       {"pairs"}   from now on let in who signs with these: access keys to secrets
    PUT    /limit       {"calls", "retryAfter"?}   throttle what exceeds so many calls a second; 0: nothing
    GET    /stats                  calls, callsByTask, refused (by the gate), throttled (by the limit),
                                   inFlight, maxInFlight, times                     DELETE: reset
    GET    /requests               the last 200 vendor requests: method, target, headers, body

`life` has the fields of `Life`, faults the parameters of the functions in `faults.py`, both in
camelCase. A control request that makes no sense is a 400 which says why, in plain text.

Answers carry a `Date` of the simulator's own clock: serve with uvicorn's `date_header=False`. A
silent answer outlasts a graceful stop: give uvicorn a `timeout_graceful_shutdown`.
"""

from gateway.simulator.app import create_simulator
from gateway.simulator.faults import FAULTS
from gateway.simulator.tasks import Life, new_task_id
from gateway.simulator.wire import ControlError, parse_object

__all__ = ["FAULTS", "ControlError", "Life", "create_simulator", "new_task_id", "parse_object"]
