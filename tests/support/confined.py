"""Runs a command as the unit `config/sd-gateway.service` confines it: `python confined.py FILE COMMAND…`.

FILE has the names of the system calls that are allowed, one a line. Every other call fails with EPERM, and no
memory is writable and executable. The command inherits both restrictions.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 38, 65, 1
SCMP_ACT_ALLOW, SCMP_ACT_ERRNO = 0x7FFF0000, 0x00050000


def confine(names: list[str]) -> None:
    """Restrict this process."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(seccomp.seccomp_init(SCMP_ACT_ERRNO | errno.EPERM))
    for name in names:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # negative: a call of another architecture
            assert seccomp.seccomp_rule_add(rules, SCMP_ACT_ALLOW, number, 0) == 0
    assert seccomp.seccomp_load(rules) == 0


if __name__ == "__main__":
    confine(Path(sys.argv[1]).read_text(encoding="utf-8").split())
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606  # a shell is not needed
