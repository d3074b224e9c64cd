"""Let bandit look for insecure code, and compare what it finds with bandit.toml, which has the reasons."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
LOOKED_AT = ("gateway", ".ci", "helm")

Finding = tuple[str, str]  # the check, and the file


def findings() -> dict[Finding, str]:
    """Return what bandit has to say, and in what words."""
    bandit = Path(sys.executable).with_name("bandit")
    ran = subprocess.run(  # noqa: S603  # our own arguments
        [bandit, "--quiet", "--recursive", *LOOKED_AT, "--ignore-nosec", "--format", "json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=False,
    )
    told = json.loads(ran.stdout)
    if told["errors"] or not told["metrics"]["_totals"]["loc"]:
        sys.exit(f"bandit could not look at everything: {told['errors']}")
    return {
        (one["test_id"], str(Path(one["filename"]))): f"line {one['line_number']}: {one['issue_text']}"
        for one in told["results"]
    }


def main() -> int:
    """Compare; return the exit status."""
    accepted: dict[str, dict[str, str]] = tomllib.loads((HERE / "bandit.toml").read_text())
    excused = {(check, file) for check, files in accepted.items() for file in files}
    found = findings()
    for check, file in sorted(found.keys() - excused):
        sys.stderr.write(f"{file}: {check}: {found[check, file]}\n")
    for check, file in sorted(excused - found.keys()):
        sys.stderr.write(f"{file}: {check} is not found any more: take it out of .ci/bandit.toml\n")
    return int(found.keys() != excused)


if __name__ == "__main__":
    sys.exit(main())
