"""The program of `helm test`: checks that the gateway is ready and that upstream accepts its signature."""

import json
import sys
import urllib.error
import urllib.request


def ask(url: str, host: str) -> tuple[int, dict[str, object]]:
    """Return the status and the JSON of a response."""
    request = urllib.request.Request(url, headers={"Host": host})  # noqa: S310  # the URL is from the chart
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            return response.status, json.load(response)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


def main(gateway: str, host: str) -> int:
    """Run both checks with this Host header; return the exit status."""
    status, ready = ask(f"{gateway}/readyz", host)
    sys.stdout.write(f"ready: {status} {json.dumps(ready)}\n")
    if not ready.get("ready"):
        return 1
    # The task does not exist. An envelope that says so proves that upstream accepted the signature.
    status, progress = ask(f"{gateway}/v1/progress/helm-test", host)
    sys.stdout.write(f"progress: {status} {json.dumps(progress)}\n")
    return 0 if "taskId" in progress or progress.get("code") == "upstream-rejected" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
