"""What `helm test` runs: asks whether the gateway is ready, and upstream accepts its signature."""

import json
import sys
import urllib.error
import urllib.request


def ask(url: str, host: str) -> tuple[int, dict[str, object]]:
    """Return an answer's status and JSON."""
    request = urllib.request.Request(url, headers={"Host": host})  # noqa: S310  # the chart gives the URL
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


def main(gateway: str, host: str) -> int:
    """Ask both, by this name; return the exit status."""
    status, ready = ask(f"{gateway}/readyz", host)
    sys.stdout.write(f"ready: {status} {json.dumps(ready)}\n")
    if not ready.get("ready"):
        return 1
    # There is no such task. That upstream says so in an envelope proves that it read the question.
    status, answer = ask(f"{gateway}/v1/progress/helm-test", host)
    sys.stdout.write(f"query: {status} {json.dumps(answer)}\n")
    return 0 if "taskId" in answer or answer.get("code") == "upstream-rejected" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
