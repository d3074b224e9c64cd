"""Let checkov look for insecure settings: python checkov.py CHECKOV, with helm on the path.

Looked at are the Dockerfile and what the chart makes of each of its ci values. What may be found stands in
checkov.toml, with the reason.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
CHART = ROOT / "helm" / "sd-progress-gateway"

Finding = tuple[str, str]  # the kind of resource, and the check


def findings(checkov: str, file: Path, framework: str) -> dict[Finding, str]:
    """Return what checkov has to say of a file, and in what words."""
    command = [checkov, "--framework", framework, "--file", file.name, "--skip-download", "--soft-fail"]
    ran = subprocess.run(  # noqa: S603  # our own arguments
        [*command, "--compact", "--quiet", "--output", "json"],
        cwd=file.parent,
        stdout=subprocess.PIPE,
        check=True,
    )
    told = json.loads(ran.stdout)
    if not told.get("summary", told)["resource_count"]:
        sys.exit(f"checkov found nothing to look at in {file}")
    return {
        (check["resource"].partition(".")[0], check["check_id"]): f"{check['check_name']} ({file.name})"
        for check in told.get("results", {}).get("failed_checks", [])
    }


def rendered(values: Path, folder: Path) -> Path:
    """Return the file of what the chart makes of these values."""
    made = folder / values.name
    with made.open("w") as out:
        subprocess.run(["helm", "template", "release", CHART, "-f", values], stdout=out, check=True)  # noqa: S603, S607
    return made


def main(checkov: str) -> int:
    """Compare what is found with what may be; return the exit status."""
    accepted: dict[str, dict[str, str]] = tomllib.loads((HERE / "checkov.toml").read_text())
    found = findings(checkov, ROOT / "Dockerfile", "dockerfile")
    with tempfile.TemporaryDirectory() as folder:
        for values in sorted((CHART / "ci").glob("*.yaml")):
            found |= findings(checkov, rendered(values, Path(folder)), "kubernetes")

    excused = {(kind, check) for kind, checks in accepted.items() for check in checks}
    news = {(kind, check) for kind, check in found if not {(kind, check), ("any", check)} & excused}
    stale = excused - set(found) - {("any", check) for _, check in found}
    for kind, check in sorted(news):
        sys.stderr.write(f"{kind}: {check}: {found[kind, check]}\n")
    for kind, check in sorted(stale):
        sys.stderr.write(f"{kind}: {check} is not found any more: take it out of checkov.toml\n")
    return 1 if news or stale else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
