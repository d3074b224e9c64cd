"""`make bench`: compares the gateway with its alternatives, on this machine, in one run.

    load cores:   wrk, pollers ──> server core:  gateway, nginx, gateway, nginx …
                  upstream     <──

Absolute times depend on the machine and its current load, so compare the ratios. Each ratio uses adjacent
measurements, with one server under load at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import busy_streams
import curve
import fifty_replicas
import herd
import hits
import misses
import outages
import replicas
import report
import rotation
import rush
import slow_clients
import slow_readers
import soak
import start
import throttle
import watchers
from measuring import Bench, Comparison
from processes import choose_cores, pinned
from servers import NCHAN_MODULE, NJS_MODULE

SCENARIOS = {
    "hits": hits,
    "curve": curve,
    "herd": herd,
    "rush": rush,
    "start": start,
    "misses": misses,
    "watchers": watchers,
    "busy_streams": busy_streams,
    "slow_readers": slow_readers,
    "slow_clients": slow_clients,
    "rotation": rotation,
    "soak": soak,
    "throttle": throttle,
    "replicas": replicas,
    "fifty_replicas": fifty_replicas,
    "outages": outages,
}
PACKAGES = {
    "wrk": "wrk",
    "nginx": "nginx",
    "njs": "libnginx-mod-http-js",
    "nchan": "libnginx-mod-nchan",
    "varnishd": "varnish",
}
_MODULES = {"njs": NJS_MODULE, "nchan": NCHAN_MODULE}  # of nginx

_MEMORY = Path("/dev/shm")  # noqa: S108  # nginx caches in files; a RAM disk is its fastest place


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scenarios; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.scenarios if name not in SCENARIOS]:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    if options.list:
        for name, scenario in SCENARIOS.items():
            _say(f"{name:12} {(scenario.__doc__ or '').splitlines()[0]}")
        return 0
    if options.install and not _install():
        return 1
    missing = {tool: package for tool, package in PACKAGES.items() if not _is_there(tool)}
    chosen = options.scenarios or list(SCENARIOS)
    used = {tool for name in chosen for tool in getattr(SCENARIOS[name], "USES", ())}
    for tool in sorted(used & missing.keys()):
        _say(f"measured without {tool}: not installed (Debian package {missing[tool]}, or --install)")
    skipped = {name: [tool for tool in SCENARIOS[name].NEEDS if tool in missing] for name in chosen}
    skipped = {name: tools for name, tools in skipped.items() if tools}
    for name, tools in skipped.items():
        packages = " ".join(missing[tool] for tool in tools)
        _say(f"{name} is skipped: not installed: {', '.join(tools)} (Debian: {packages}, or --install)")
    comparisons, failed = _measure(options, [name for name in chosen if name not in skipped])
    given = {"seconds": options.seconds, "rounds": options.rounds}
    results = report.document(comparisons, skipped=skipped, options=given)
    _keep(results, file=options.json, plots_folder=options.plots)
    for name in failed:
        _say(f"{name} failed")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make bench", description="Compare the gateway with its alternatives."
    )
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help=f"{', '.join(SCENARIOS)}; default: all"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="duration of a measurement (default 4; some scenarios use a multiple)",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of measurements of each server (default 3)"
    )
    parser.add_argument(
        "--tree",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="another source tree of the gateway to compare with, for example an older version",
    )
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to this file")
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="write charts to this folder, as SVG for light and dark"
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="first install missing programs with apt-get, as root; Debian may start their services",
    )
    return parser


def _measure(options: argparse.Namespace, names: Sequence[str]) -> tuple[list[Comparison], list[str]]:
    cores = choose_cores()
    comparisons: list[Comparison] = []
    failed: list[str] = []
    in_memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sd-gateway-bench-", dir=in_memory) as folder, pinned(cores.load):
        Path(folder).chmod(0o755)  # nginx started by root runs its worker as another user
        bench = Bench(
            cores=cores,
            seconds=options.seconds,
            rounds=options.rounds,
            folder=Path(folder),
            trees=tuple(options.tree),
        )
        for name in names:
            sys.stderr.write(f"{name}\n")
            try:
                for comparison in SCENARIOS[name].run(bench):
                    comparisons.append(comparison)
                    _say(report.text(comparison))
            except (ExceptionGroup, OSError, RuntimeError, subprocess.SubprocessError):
                failed.append(name)
                traceback.print_exc()
    return comparisons, failed


def _keep(results: dict[str, Any], *, file: Path | None, plots_folder: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(results, indent=1))
    if plots_folder is not None:
        import plots  # noqa: PLC0415  # matplotlib is installed for `make bench` only

        for drawn in plots.draw(results, plots_folder):
            _say(f"drawn: {drawn}")


def _is_there(tool: str) -> bool:
    module = _MODULES.get(tool)
    return shutil.which(tool) is not None if module is None else module.exists()


def _install() -> bool:
    packages = [package for tool, package in PACKAGES.items() if not _is_there(tool)]
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    return not packages or subprocess.run(command, check=False).returncode == 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
