"""`make release`: builds the files of a release twice, and keeps them if both builds are identical.

    the commit -> a folder -> sdist -> wheel, from the sdist
                           -> the chart's package, with the commit's time in it
                           -> the image's lock file -> an environment -> bill of materials (CycloneDX)

The two builds differ in properties that must not matter: folder, umask, time zone. Then the wheel is
installed into the environment, as users install it, and its version is checked.
"""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CHART = Path("helm", "sd-progress-gateway")
SUMS = "SHA256SUMS"
NEEDS = {
    "git": "a release is made from a commit",
    "helm": "it packages the chart; bash .ci/run fetches it into .cache/bin",
}


@dataclass(frozen=True)
class Build:
    """One build of a commit: its source in a folder of its own, and its results in `out`."""

    source: Path
    out: Path
    epoch: int
    umask: int
    zone: str

    def run(self) -> None:
        """Build all files."""
        self.out.mkdir()
        self.call(BIN / "python", "-m", "build", "--no-isolation", "--outdir", self.out, self.source)
        self.call("helm", "package", self.source / CHART, "--destination", self.out)
        for package in self.out.glob("*.tgz"):
            package.write_bytes(normalized(package.read_bytes(), self.epoch))
        self._list_materials()

    @property
    def version(self) -> str:
        """The version of the wheel."""
        return self.wheel.name.split("-")[1]

    @property
    def wheel(self) -> Path:
        """The wheel."""
        [wheel] = self.out.glob("*.whl")
        return wheel

    @property
    def environment(self) -> Path:
        """The environment with the packages of the lock file and no others."""
        return self.source.with_name(f"{self.source.name}-environment")

    def _list_materials(self) -> None:
        self.call(BIN / "python", "-m", "venv", "--without-pip", self.environment)
        self.install(
            "--require-hashes", "--only-binary", ":all:", "-r", self.source / image_lock(self.source)
        )
        project = self.environment / "pyproject.toml"
        project.write_text(with_version((self.source / "pyproject.toml").read_text(), self.version))
        bill = self.out / f"sd-progress-gateway-{self.version}.cdx.json"
        python = self.environment / "bin" / "python"
        self.call(
            BIN / "cyclonedx-py", "environment", "--output-reproducible", "--gather-license-texts",
            "--pyproject", project, "--output-file", bill, python,
        )  # fmt: skip

    def install(self, *arguments: str | Path) -> None:
        """Install packages into the environment."""
        self.call(ROOT / ".ci" / "install", self.environment / "bin" / "python", *arguments)

    def call(self, *command: str | Path) -> str:
        """Run a command, which must succeed; return its output."""
        env = os.environ | {"SOURCE_DATE_EPOCH": str(self.epoch), "TZ": self.zone}
        ran = subprocess.run(  # noqa: S603  # the project's own commands
            command,
            env=env | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            umask=self.umask,
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            sys.exit(f"{' '.join(map(str, command))} failed with {ran.returncode}:\n{ran.stdout}{ran.stderr}")
        return ran.stdout


def image_lock(source: Path) -> str:
    """Return the lock file of the image's packages: the last one that the Dockerfile installs."""
    locks: list[str] = re.findall(r"-r (requirements\S*\.lock)", (source / "Dockerfile").read_text())
    return locks[-1]


def normalized(package: bytes, epoch: int) -> bytes:
    """Return a packed chart without the time, place and user of its packing."""
    content: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(package)) as packed:
        for member in packed:
            file = packed.extractfile(member)
            if file is not None:
                content[member.name] = file.read()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as packed:
        # Chart.yaml comes first, as in helm's packages: some readers stop after the first files.
        for name in sorted(content, key=lambda name: (not name.endswith("/Chart.yaml"), name)):
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(content[name]), epoch, 0o644
            packed.addfile(member, io.BytesIO(content[name]))
    zipped = io.BytesIO()
    with gzip.GzipFile(fileobj=zipped, mode="wb", filename="", mtime=epoch) as packer:
        packer.write(tar.getvalue())
    return zipped.getvalue()


def with_version(project: str, version: str) -> str:
    """Return a pyproject.toml with a static version, which is otherwise read from the package."""
    static = project.replace('dynamic = ["version"]', f"version = {json.dumps(version)}")
    if tomllib.loads(static)["project"].get("version") != version:
        sys.exit("pyproject.toml has no dynamic version to replace")
    return static


def sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file, by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def differences(one: Mapping[str, str], another: Mapping[str, str]) -> list[str]:
    """Return the names of files that differ between the builds."""
    return sorted(name for name in {*one, *another} if one.get(name) != another.get(name))


def git(*arguments: str) -> bytes:
    """Return the output of a git command."""
    return subprocess.check_output(["git", *arguments], cwd=ROOT)  # noqa: S603, S607


def say(line: str) -> None:
    """Print a line of progress."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def release(folder: Path, scratch: Path) -> None:
    """Build in `scratch`, and keep the result in `folder`."""
    commit = git("rev-parse", "HEAD").decode().strip()
    epoch = int(git("log", "-1", "--format=%ct"))
    say(f"release of {commit}")
    if git("status", "--porcelain"):
        say("uncommitted changes are not included")
    builds = []
    for name, umask, zone in (("one", 0o022, "UTC"), ("another", 0o077, "Asia/Shanghai")):
        build = Build(scratch / name, scratch / f"{name}-out", epoch, umask, zone)
        with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD"))) as archive:
            archive.extractall(build.source, filter="data")
        build.run()
        builds.append(build)
    first, second = (sums(build.out) for build in builds)
    if different := differences(first, second):
        sys.exit(f"the two builds differ: {', '.join(different)}")
    build = builds[0]
    build.install("--no-index", "--no-deps", build.wheel)
    reported = build.call(build.environment / "bin" / "sd-gateway", "--version").strip()
    if reported != f"sd-gateway {build.version}":
        sys.exit(f"the installed wheel reports the version {reported}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(build.out, folder)
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in first.items()))
    say(f"built twice, identical; the wheel installs, and reports {reported}")
    for name in first:
        say(f"  {folder / name}")


def main(folder: Path) -> None:
    """Make the release, or report what is missing."""
    for program, why in NEEDS.items():
        if shutil.which(program) is None:
            sys.exit(f"make release needs {program}, which is not installed: {why}")
    if not (ROOT / ".git").exists():
        sys.exit("make release needs a git clone: a release is made from a commit")
    with tempfile.TemporaryDirectory(prefix="sd-gateway-release-") as scratch:
        release(folder, Path(scratch))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
