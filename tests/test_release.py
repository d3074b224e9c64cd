"""`make release`: what it builds is equal twice, whole, and can be used. It is run as it stands, once."""

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
from tests.documents.markdown import ROOT

pytestmark = pytest.mark.timeout(600)  # it builds, starts or plays more than other tests


SCRIPT = ROOT / ".ci" / "release.py"
WHEEL = f"sd_progress_gateway-{__version__}-py3-none-any.whl"
SDIST = f"sd_progress_gateway-{__version__}.tar.gz"
CHART = f"sd-progress-gateway-{__version__}.tgz"
BILL = f"sd-progress-gateway-{__version__}.cdx.json"


def git(*arguments: str) -> str:
    """Return what git says."""
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the script, as a module."""
    spec = importlib.util.spec_from_file_location("release", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a release of the commit that is checked out; return its folder."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git clone here, but an sdist: a release is made of a commit")
    if shutil.which("helm") is None:
        pytest.skip("helm is not here: .ci/run fetches it")
    folder = tmp_path_factory.mktemp("release") / "dist"
    ran = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "built twice, the same" in ran.stdout
    return folder


def test_release_is_whole_and_its_sums_are_right(released: Path) -> None:
    """Wheel, sdist, chart and bill of materials are there, and the sums are theirs."""
    lines = (released / "SHA256SUMS").read_text().splitlines()
    told = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert set(told) == {WHEEL, SDIST, CHART, BILL}
    assert {path.name for path in released.iterdir()} == {*told, "SHA256SUMS"}
    for name, digest in told.items():
        assert hashlib.sha256((released / name).read_bytes()).hexdigest() == digest


def test_release_sdist_holds_the_repository(released: Path) -> None:
    """Every file of the commit is in the sdist, so its tests can be run; and nothing else is."""
    with tarfile.open(released / SDIST) as packed:
        names = {member.name.partition("/")[2] for member in packed if member.isfile()}
    assert names - {"PKG-INFO"} == set(git("ls-tree", "-r", "--name-only", "HEAD").split())


def test_release_wheel_holds_the_package(released: Path) -> None:
    """Every file of the package is in the wheel, the pages and the OpenAPI document among them."""
    with zipfile.ZipFile(released / WHEEL) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert names == set(git("ls-tree", "-r", "--name-only", "HEAD", "gateway").split())


def test_release_bears_the_commits_time(released: Path) -> None:
    """Whatever tells a time tells the commit's."""
    epoch = int(git("log", "-1", "--format=%ct"))
    for name in (SDIST, CHART):
        with tarfile.open(released / name) as packed:
            assert {member.mtime for member in packed if member.isfile()} == {epoch}
        with gzip.open(released / name) as zipped:
            zipped.read(1)
            assert zipped.mtime == epoch


def test_release_bill_lists_what_the_image_holds(released: Path, script: ModuleType) -> None:
    """Every package that the lock file installs is listed, with version and licence, and nothing of here."""
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
    [needs] = [entry["dependsOn"] for entry in bill["dependencies"] if entry["ref"] == root["bom-ref"]]
    assert any(need.startswith("starlette==") for need in needs)
    assert "file:" not in text
    assert str(Path.home()) not in text


def test_release_chart_is_helms(released: Path) -> None:
    """What was packed anew is a chart as before: helm renders it."""
    ran = subprocess.run(
        ["helm", "template", "release", released / CHART, "--set", "credentials.existingSecret=pair"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "kind: Deployment" in ran.stdout


# --- what would go wrong ----------------------------------------------------------------------------------


def test_release_tells_builds_apart(script: ModuleType) -> None:
    """Another content, and a file that only one build has, are differences; they end a release."""
    one, another = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "3"}
    assert script.differences(one, another) == ["b", "c", "d"]
    assert script.differences(one, dict(one)) == []


def test_release_chart_forgets_who_packed_it(script: ModuleType) -> None:
    """Charts that were packed at other times, in another order, by other people are the same."""

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
    assert script.settled(one, 1_000_000_000) == script.settled(another, 1_000_000_000)
    with tarfile.open(fileobj=io.BytesIO(script.settled(one, 5))) as package:
        assert [member.name for member in package] == [
            "chart/Chart.yaml",
            "chart/README.md",
            "chart/values.yaml",
        ]


def test_release_says_what_is_missing(tmp_path: Path) -> None:
    """Without helm nothing is built, and it is said why."""
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
    assert ran.stderr.startswith("make release needs helm, which is not here: ")
    assert not (tmp_path / "dist").exists()
