"""Look up the locked packages in the package index's list of known vulnerabilities: python audit.py LOCK...

pip-audit asks the index about each version. Some mirrors have documents of packages, but none of versions:
they are asked about the package. Its document tells of its newest version, and of no other. A version that
cannot be looked up is named, and fails nothing. A version known to be vulnerable is asked about first:
an index that does not tell of it cannot be asked, and that is a failure.
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

# Its last version, of 2013: CVE-2013-7459 and CVE-2018-6594 have no fix.
KNOWN = ResolvedDependency("pycrypto", Version("2.6.1"))
CONNECTIONS = 8

# Vulnerabilities that do not concern us: an id and the reason.
ACCEPTED: dict[str, str] = {}


class Session(requests.Session):
    """Answers for a version with its package's document, where the index has none and it is the newest."""

    def get(self, url: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        """Ask for the document of a version."""
        answer = super().get(url, **options)
        if answer.status_code != requests.codes.not_found:
            return answer
        package, version, _ = str(url).rsplit("/", 2)
        latest = super().get(f"{package}/json", **options)
        return latest if latest.ok and latest.json()["info"]["version"] == version else answer


def main(locks: list[str]) -> int:
    """Return the exit status: 1 when a vulnerability is found, or none can be."""
    service = PyPIService(timeout=30)
    service.session = Session()
    service.session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS, max_retries=3))
    if not service.query(KNOWN)[1]:
        sys.stderr.write(
            f"{KNOWN.name} {KNOWN.version} is not told to be vulnerable: this index cannot be asked\n"
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
            f"Not looked up, for the index tells of newer versions alone: {', '.join(sorted(skipped))}\n"
        )
    return int(found > 0 or not looked_up)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
