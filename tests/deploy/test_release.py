"""`make release`: both builds are identical, complete and usable. The unchanged script runs once."""

import gzip
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from gateway import __version__
from tests.docs.markdown import ROOT
from tests.support.programs import required

pytestmark = pytest.mark.timeout(600)  # builds and starts more than other tests


SCRIPT = ROOT / ".ci" / "release.py"
WHEEL = f"sd_progress_gateway-{__version__}-py3-none-any.whl"
SDIST = f"sd_progress_gateway-{__version__}.tar.gz"
CHART = f"sd-progress-gateway-{__version__}.tgz"
BILL = f"sd-progress-gateway-{__version__}.cdx.json"


def git(*arguments: str) -> str:
    """Return the output of a git command."""
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the script, as a module."""
    spec = importlib.util.spec_from_file_location("release", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look the module up here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a release of the checked-out commit; return its folder."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone: a release is made from a commit")
    required("helm")
    folder = tmp_path_factory.mktemp("release") / "dist"
    ran = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "built twice, identical" in ran.stdout
    return folder


def test_release_is_complete_and_its_checksums_match(released: Path) -> None:
    """Wheel, sdist, chart and bill of materials exist, and match their checksums."""
    lines = (released / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert set(listed) == {WHEEL, SDIST, CHART, BILL}
    assert {path.name for path in released.iterdir()} == {*listed, "SHA256SUMS"}
    for name, digest in listed.items():
        assert hashlib.sha256((released / name).read_bytes()).hexdigest() == digest


def test_release_sdist_holds_the_repository(released: Path) -> None:
    """The sdist contains every file of the commit, so its tests can run, and no other file."""
    with tarfile.open(released / SDIST) as packed:
        names = {member.name.partition("/")[2] for member in packed if member.isfile()}
    assert names - {"PKG-INFO"} == set(git("ls-tree", "-r", "--name-only", "HEAD").split())


def test_release_wheel_holds_the_package(released: Path) -> None:
    """The wheel contains every file of the package, including the pages and the OpenAPI document."""
    with zipfile.ZipFile(released / WHEEL) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert names == set(git("ls-tree", "-r", "--name-only", "HEAD", "gateway").split())


def test_release_has_the_commits_time(released: Path) -> None:
    """Every timestamp in the archives is the commit's."""
    epoch = int(git("log", "-1", "--format=%ct"))
    for name in (SDIST, CHART):
        with tarfile.open(released / name) as packed:
            assert {member.mtime for member in packed if member.isfile()} == {epoch}
        with gzip.open(released / name) as zipped:
            zipped.read(1)
            assert zipped.mtime == epoch


def test_release_bill_lists_the_packages_of_the_image(released: Path, script: ModuleType) -> None:
    """It lists every package of the lock file, with version and licence, and no path of this machine."""
    text = (released / BILL).read_text()
    bill = json.loads(text)
    pins = dict(
        re.findall(
            r"^([\w.-]+)(?:\[\w+\])?==([^\s;]+)", (ROOT / script.image_lock(ROOT)).read_text(), re.MULTILINE
        )
    )
    listed = {re.sub(r"[_.]", "-", part["name"]).lower(): part for part in bill["components"]}
    assert set(listed) <= set(pins)
    assert {"pydantic", "redis", "starlette", "uvicorn"} <= set(listed)
    assert all(part["version"] == pins[name] for name, part in listed.items())
    assert all(part["licenses"] for part in listed.values())
    root = bill["metadata"]["component"]
    assert (root["name"], root["version"]) == ("sd-progress-gateway", __version__)
    [dependencies] = [entry["dependsOn"] for entry in bill["dependencies"] if entry["ref"] == root["bom-ref"]]
    assert any(name.startswith("starlette==") for name in dependencies)
    assert "file:" not in text
    assert str(Path.home()) not in text


def test_release_chart_renders(released: Path) -> None:
    """Helm renders the chart that was packed again."""
    ran = subprocess.run(
        ["helm", "template", "release", released / CHART, "--set", "credentials.existingSecret=pair"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "kind: Deployment" in ran.stdout


# --- failures ---------------------------------------------------------------------------------------------


def test_release_detects_differences(script: ModuleType) -> None:
    """Different contents, and files that only one build has, are differences."""
    one, another = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "3"}
    assert script.differences(one, another) == ["b", "c", "d"]
    assert script.differences(one, dict(one)) == []


def test_release_chart_does_not_depend_on_its_packing(script: ModuleType) -> None:
    """Charts that differ in time, order and user of their packing become identical."""

    def packed(order: list[str], mtime: int, user: str) -> bytes:
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w:gz") as package:
            for name in order:
                member = tarfile.TarInfo(f"chart/{name}")
                member.size, member.mtime, member.uname = len(name), mtime, user
                package.addfile(member, io.BytesIO(name.encode()))
        return tar.getvalue()

    one = packed(["Chart.yaml", "values.yaml", "README.md"], 1, "one")
    another = packed(["values.yaml", "README.md", "Chart.yaml"], 2, "another")
    assert one != another
    assert script.normalized(one, 1_000_000_000) == script.normalized(another, 1_000_000_000)
    with tarfile.open(fileobj=io.BytesIO(script.normalized(one, 5))) as package:
        assert [member.name for member in package] == [
            "chart/Chart.yaml",
            "chart/README.md",
            "chart/values.yaml",
        ]


def test_release_reports_what_is_missing(tmp_path: Path) -> None:
    """Without helm nothing is built, and the error names helm."""
    for program in ("git", "env"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    ran = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "dist"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("make release needs helm, which is not installed: ")
    assert not (tmp_path / "dist").exists()
