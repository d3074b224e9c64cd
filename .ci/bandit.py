"""Run bandit, and compare its findings with the accepted ones in bandit.toml."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SCANNED = ("gateway", ".ci", "helm")

Finding = tuple[str, str]  # the check, and the file


def findings() -> dict[Finding, str]:
    """Return bandit's findings and their messages."""
    bandit = Path(sys.executable).with_name("bandit")
    ran = subprocess.run(  # noqa: S603  # our own arguments
        [bandit, "--quiet", "--recursive", *SCANNED, "--ignore-nosec", "--format", "json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=False,
    )
    report = json.loads(ran.stdout)
    if report["errors"] or not report["metrics"]["_totals"]["loc"]:
        sys.exit(f"bandit could not scan every file: {report['errors']}")
    return {
        (one["test_id"], str(Path(one["filename"]))): f"line {one['line_number']}: {one['issue_text']}"
        for one in report["results"]
    }


def main() -> int:
    """Compare the findings with the accepted ones; return the exit status."""
    accepted: dict[str, dict[str, str]] = tomllib.loads((HERE / "bandit.toml").read_text())
    expected = {(check, file) for check, files in accepted.items() for file in files}
    found = findings()
    for check, file in sorted(found.keys() - expected):
        sys.stderr.write(f"{file}: {check}: {found[check, file]}\n")
    for check, file in sorted(expected - found.keys()):
        sys.stderr.write(f"{file}: {check} is no longer found: remove it from .ci/bandit.toml\n")
    return int(found.keys() != expected)


if __name__ == "__main__":
    sys.exit(main())
