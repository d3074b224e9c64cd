"""Look up known vulnerabilities of the locked packages in the package index: python audit.py LOCK...

pip-audit queries the index about each version. Some mirrors have documents of packages, but none of versions.
Their document of a package describes only its newest version. A version that cannot be looked up is listed,
and does not fail the audit. The audit first queries a version that is known to be vulnerable. It fails if the
index does not report that one, because such an index has no data about vulnerabilities.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from packaging.version import Version
from pip_audit._dependency_source import RequirementSource
from pip_audit._service import ResolvedDependency
from pip_audit._service.pypi import PyPIService

# Its last version, of 2013. CVE-2013-7459 and CVE-2018-6594 have no fix.
KNOWN = ResolvedDependency("pycrypto", Version("2.6.1"))
CONNECTIONS = 8

# Vulnerabilities that do not concern this project, by ID, with the reason.
ACCEPTED: dict[str, str] = {}


class Session(requests.Session):
    """Falls back to the document of the package, if the version is its newest and has no document."""

    def get(self, url: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        """Return the response with the document of a version."""
        response = super().get(url, **options)
        if response.status_code != requests.codes.not_found:
            return response
        package, version, _ = str(url).rsplit("/", 2)
        latest = super().get(f"{package}/json", **options)
        return latest if latest.ok and latest.json()["info"]["version"] == version else response


def main(locks: list[str]) -> int:
    """Return the exit status: 1 if a vulnerability is found, or if the index has no data."""
    service = PyPIService(timeout=30)
    service.session = Session()
    service.session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS, max_retries=3))
    if not service.query(KNOWN)[1]:
        sys.stderr.write(
            f"the index does not report {KNOWN.name} {KNOWN.version} as vulnerable: it has no such data\n"
        )
        return 1
    files = [Path(lock) for lock in locks]
    packages = set(RequirementSource(files, require_hashes=True, disable_pip=True).collect())
    found, skipped = 0, []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for package, vulnerabilities in pool.map(service.query, packages):
            if package.is_skipped():
                skipped.append(package.name)
            for one in vulnerabilities:
                if not {one.id, *one.aliases} & ACCEPTED.keys():
                    found += 1
                    fixed = ", ".join(map(str, one.fix_versions)) or "none"
                    sys.stderr.write(
                        f"{package.name}: {one.id}, fixed in: {fixed}; {one.description[:200]}\n"
                    )
    looked_up = len(packages) - len(skipped)
    sys.stdout.write(f"Looked up {looked_up} locked packages; {found} known vulnerabilities\n")
    if skipped:
        sys.stdout.write(
            f"Not looked up, because the index only has newer versions: {', '.join(sorted(skipped))}\n"
        )
    return int(found > 0 or not looked_up)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
