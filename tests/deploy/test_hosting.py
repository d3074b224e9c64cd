"""The files for hosting the repository: workflows, update rules, issue form. `make lint` checks them, too."""

import json
import re
import subprocess
from typing import Any

import pytest

from gateway.cli.main import main
from tests.docs.markdown import ROOT
from tests.support import yaml_files

GITHUB = ROOT / ".github"
WORKFLOWS = {file.name: file.read_text(encoding="utf-8") for file in (GITHUB / "workflows").iterdir()}
FORM = yaml_files.load((GITHUB / "ISSUE_TEMPLATE" / "problem.yml").read_text(encoding="utf-8"))

each_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def jobs(name: str) -> dict[str, Any]:
    """Return the jobs of a workflow."""
    found: dict[str, Any] = yaml_files.load(WORKFLOWS[name])["jobs"]
    return found


def commands(name: str) -> list[str]:
    """Return the shell commands of a workflow."""
    return [step["run"] for job in jobs(name).values() for step in job["steps"] if "run" in step]


@each_workflow
def test_workflows_pin_actions_by_commit(name: str) -> None:
    """Each action is pinned by the hash of a commit, with its version in a comment."""
    uses = re.findall(r"uses: (.*)", WORKFLOWS[name])
    assert uses
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in uses)


@each_workflow
def test_workflows_have_few_permissions(name: str) -> None:
    """A workflow may read; jobs that write are listed here. Each job has a time limit, and keeps no token."""
    assert yaml_files.load(WORKFLOWS[name])["permissions"] == {"contents": "read"}
    writing = {job for job, settings in jobs(name).items() if "permissions" in settings}
    assert writing == {"release.yml": {"publish"}, "locks.yml": {"update"}}.get(name, set())
    for job in jobs(name).values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_workflows_run_the_projects_own_commands() -> None:
    """CI is .ci/run alone, on the Debian of the image; a release is `make release` after it."""
    debian = re.findall(r"^ARG BASE=python:\S+-slim-(\w+)@", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name, job in (("ci.yml", "test"), ("release.yml", "build")):
        assert jobs(name)[job]["container"]["image"] == f"debian:{debian[0]}"
        assert "bash .ci/run" in commands(name)
    assert commands("release.yml").index("bash .ci/run") < commands("release.yml").index("make release")
    assert "make lock ARGS=--upgrade" in commands("locks.yml")
    for name in WORKFLOWS:
        for command in commands(name):
            for line in re.findall(r"^make .*", command, re.MULTILINE):
                subprocess.run(
                    ["make", "--dry-run", *line.split()[1:]], cwd=ROOT, capture_output=True, check=True
                )


def test_ci_has_the_programs_of_the_tests() -> None:
    """Each program without which a test is skipped is installed by .ci/run, or by a locked package."""
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py")]
    call = re.compile(r"(?:required|needs|installed)\(\"([\w.-]+)\"\)")
    named = {name for source in sources for name in call.findall(source)}
    assert {"nginx", "helm"} < named
    debian = re.findall(r"^  ([\w-]+):", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    packages = {"caddy", "docker-compose", "envoy", "hadolint", "traefik"}
    wheels = {"helm", "helm3", "kubectl"}  # .ci/helm.py unpacks them
    # Debian always has bash and util-linux. The others are in the packages of javac and promtool.
    with_others = {"bash", "prlimit", "java", "prometheus"}
    assert named - {*debian} - packages - wheels - with_others == set()


def test_update_rules_cover_the_base_image() -> None:
    """Renovate updates the Dockerfile, the compose file and the actions; the lock files have a workflow."""
    rules = json.loads((GITHUB / "renovate.json").read_text())
    assert set(rules["enabledManagers"]) == {"dockerfile", "docker-compose", "github-actions"}
    assert "schedule" in WORKFLOWS["locks.yml"]


@pytest.mark.parametrize("command", ["config", "check", "--version"])
def test_issue_form_asks_for_the_commands_output(command: str) -> None:
    """The form requires the output of commands that exist."""
    [field] = [item for item in FORM["body"] if f"`sd-gateway {command}`" in str(item)]
    assert field["validations"]["required"] is True
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"] if not command.startswith("-") else [command])
    assert ended.value.code == 0
