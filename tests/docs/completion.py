"""`make docs`: generates the completion scripts with shtab, from the parser of the command line.

shtab is needed only here. The scripts are in the package, so that users need no further package.
"""

import shtab

from gateway.cli.command_line import Parser, create_parser
from gateway.cli.completion import SHELLS
from tests.docs.markdown import ROOT

FOLDER = ROOT / "gateway" / "cli" / "completion"
_PATHS = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}


def script(shell: str) -> str:
    """Return the completion script for a shell."""
    parser = create_parser()
    for command in (parser, *map(parser.load, parser.commands)):
        _mark_paths(command)
    lines = shtab.complete(parser, shell).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _mark_paths(parser: Parser) -> None:
    for action in parser._actions:
        if action.metavar in _PATHS:
            action.complete = _PATHS[action.metavar]  # type: ignore[attr-defined]


def main() -> None:
    """Write all scripts."""
    for shell in SHELLS:
        (FOLDER / f"sd-gateway.{shell}").write_text(script(shell), encoding="utf-8")


if __name__ == "__main__":
    main()
