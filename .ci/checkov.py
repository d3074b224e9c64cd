"""Look for insecure settings with checkov: python checkov.py CHECKOV, with helm on the path.

It scans the Dockerfile and the manifests that the chart renders for each of its ci values files. Accepted
findings are in checkov.toml, with their reasons.
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
    """Return checkov's findings in a file and their messages."""
    command = [checkov, "--framework", framework, "--file", file.name, "--skip-download", "--soft-fail"]
    ran = subprocess.run(  # noqa: S603  # our own arguments
        [*command, "--compact", "--quiet", "--output", "json"],
        cwd=file.parent,
        stdout=subprocess.PIPE,
        check=True,
    )
    report = json.loads(ran.stdout)
    if not report.get("summary", report)["resource_count"]:
        sys.exit(f"checkov found no resources in {file}")
    return {
        (check["resource"].partition(".")[0], check["check_id"]): f"{check['check_name']} ({file.name})"
        for check in report.get("results", {}).get("failed_checks", [])
    }


def rendered(values: Path, folder: Path) -> Path:
    """Return the file with the manifests that the chart renders for these values."""
    manifests = folder / values.name
    with manifests.open("w") as out:
        subprocess.run(["helm", "template", "release", CHART, "-f", values], stdout=out, check=True)  # noqa: S603, S607
    return manifests


def main(checkov: str) -> int:
    """Compare the findings with the accepted ones; return the exit status."""
    accepted: dict[str, dict[str, str]] = tomllib.loads((HERE / "checkov.toml").read_text())
    found = findings(checkov, ROOT / "Dockerfile", "dockerfile")
    with tempfile.TemporaryDirectory() as folder:
        for values in sorted((CHART / "ci").glob("*.yaml")):
            found |= findings(checkov, rendered(values, Path(folder)), "kubernetes")

    expected = {(kind, check) for kind, checks in accepted.items() for check in checks}
    new = {(kind, check) for kind, check in found if not {(kind, check), ("any", check)} & expected}
    stale = expected - set(found) - {("any", check) for _, check in found}
    for kind, check in sorted(new):
        sys.stderr.write(f"{kind}: {check}: {found[kind, check]}\n")
    for kind, check in sorted(stale):
        sys.stderr.write(f"{kind}: {check} is no longer found: remove it from checkov.toml\n")
    return 1 if new or stale else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
