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


def findings(checkov: str, folder: Path, files: list[Path], framework: str) -> dict[Finding, str]:
    """Return checkov's findings in the files of a folder and their messages."""
    names = [file.name for file in files]
    command = [checkov, "--framework", framework, "--skip-download", "--soft-fail", "--output", "json"]
    ran = subprocess.run(  # noqa: S603  # our own arguments
        [*command, "--file", *names],
        cwd=folder,
        stdout=subprocess.PIPE,
        check=True,
    )
    results = json.loads(ran.stdout)["results"]
    failed = results["failed_checks"]
    scanned = {check["file_path"].strip("/") for check in [*failed, *results["passed_checks"]]}
    if missing := set(names) - scanned:
        sys.exit(f"checkov found no resources in {', '.join(sorted(missing))}")
    return {
        (check["resource"].partition(".")[0], check["check_id"]): (
            f"{check['check_name']} ({check['file_path'].strip('/')})"
        )
        for check in failed
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
    found = findings(checkov, ROOT, [ROOT / "Dockerfile"], "dockerfile")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifests = [rendered(values, folder) for values in sorted((CHART / "ci").glob("*.yaml"))]
        found |= findings(checkov, folder, manifests, "kubernetes")

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
