"""The project's documents, parsed as Markdown: their code blocks, links and headings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
_NOT_OURS = {"node_modules", "build", "dist"}
_PROMPT = "$ "


@dataclass(frozen=True)
class Command:
    """A command as a reader types it, and the output that the document shows."""

    text: str
    shown: str


@dataclass(frozen=True)
class Block:
    """A fenced block. `name` is the file name after the language, if there is one."""

    document: str
    line: int
    language: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def commands(self) -> list[Command]:
        """Return the commands of a console block, in order."""
        found: list[Command] = []
        lines = iter(self.text.splitlines())
        for line in lines:
            if line.startswith(_PROMPT):
                lines_of_command = [line.removeprefix(_PROMPT)]
                while lines_of_command[-1].endswith("\\"):
                    lines_of_command.append(next(lines))
                found.append(Command("\n".join(lines_of_command), ""))
            else:
                command = found.pop()
                found.append(Command(command.text, f"{command.shown}{line}\n"))
        return found


@dataclass(frozen=True)
class Document:
    """One Markdown file; `name` is its path from the project's root."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, language: str = "") -> list[Block]:
        """Return the fenced blocks, all or those in one language."""
        found = []
        for token in _tokens(self.text):
            if token.type == "fence":
                kind, _, name = token.info.strip().partition(" ")
                assert token.map is not None
                found.append(Block(self.name, token.map[0] + 1, kind, name, token.content))
        return [block for block in found if language in {"", block.language}]

    def block(self, name: str) -> Block:
        """Return the block with this file name."""
        [found] = [block for block in self.blocks() if block.name == name]
        return found

    def targets(self) -> list[str]:
        """Return the targets of links and pictures, including those in HTML."""
        markdown = [
            str(token.attrs[key]) for token in self._inline() for key in ("href", "src") if key in token.attrs
        ]
        html = " ".join(
            token.content
            for token in [*_tokens(self.text), *self._inline()]
            if token.type.startswith("html_")
        )
        return markdown + re.findall(r'(?:href|src|srcset)="([^"]+)"', html)

    def code(self) -> list[str]:
        """Return the inline code of the text."""
        return [token.content for token in self._inline() if token.type == "code_inline"]

    def anchors(self) -> set[str]:
        """Return the fragments of the headings, as GitHub generates them."""
        tokens = _tokens(self.text)
        titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    def _inline(self) -> Iterator[Token]:
        for token in _tokens(self.text):
            yield from token.children or []


@cache
def _tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def documents() -> list[Document]:
    """Return every document of the project."""
    found = []
    for path in sorted(ROOT.rglob("*.md")):
        name = path.relative_to(ROOT)
        if not any(part.startswith(".") or part in _NOT_OURS for part in name.parts):
            found.append(Document(name.as_posix()))
    return found
