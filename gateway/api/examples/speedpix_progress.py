"""Read the status of a task with the vendor's SDK."""

import speedpix


def status(gateway: str, task_id: str) -> str:
    """Return the status of a task, in the vendor's spelling."""
    with speedpix.Client(endpoint=gateway, app_key="any", app_secret="any") as client:
        return client.predictions.get(task_id).status
