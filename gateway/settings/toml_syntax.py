"""Describes syntax errors of a settings file: position, what is wrong, and what is a likely cause."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

from gateway.settings.toml_statements import Statement, split_statements

_POSITION = re.compile(
    r"(?P<message>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL
)
_REPEATED = ("Cannot overwrite", "Cannot declare", "Cannot mutate")
_LONG_NUMBER = re.compile(r"[0-9_]{4000}")
_QUOTES = "text needs quotes"

# By the start of the parser's message. Other messages are shown as they are.
_MESSAGES = {
    "Invalid value": f"not a value; {_QUOTES}, and a truth value is true or false",
    "Expected newline or end of document after a statement": f"unexpected text after the value; {_QUOTES}",
    "Expected '=' after a key": 'expected "=" after the key',
    "Invalid statement": "not a statement: expected [section] or key = value",
    "Illegal character '\\n'": "the text has no closing quote",
    "Found invalid character '\\n'": "the text has no closing quote",
    'Expected "\'"': "the text has no closing quote",
    "Unterminated string": "the text has no closing quote",
    "Expected \"'''\"": "the text has no closing quotes",
    "Unescaped '\\' in a string": "a backslash in \"…\" begins an escape; write the text in '…'",
    "Unclosed array": 'the list has no closing "]"',
    "Unclosed inline table": 'the inline table has no closing "}"',
    "Expected ']' at the end of a table": 'the header has no closing "]"',
    "Expected ']]' at the end of an array": 'the header has no closing "]]"',
    "Invalid date or datetime": "there is no such date or time",
    "Duplicate inline table key": "the key is set twice in the inline table",
}


def describe_syntax_error(file: Path, text: str, error: ValueError) -> str:
    """Return one line for the error that the parser raised for a text."""
    match = _POSITION.fullmatch(str(error))
    if match is None:  # the parser passes numbers on to Python, which limits their length
        number = _LONG_NUMBER.search(text)
        where = f"{file}:{text.count(chr(10), 0, number.start()) + 1}" if number else f"{file}"
        return f"{where}: is not TOML: a number has too many digits"
    message, line, column = match["message"], match["line"], match["column"]
    statements = list(split_statements(text))
    if message.startswith(_REPEATED):
        return _describe_repetition(file, [found for found in statements if found.line <= int(line)])
    if not line:  # at the end of the document: a bracket or quote of an earlier statement is not closed
        line, column, _, _ = next((found for found in statements if not found.keys), statements[-1])
        message = message.replace("Invalid value", "the value is not complete")
    return f"{file}:{line}:{column}: is not TOML: {_explain(message)}"


def _explain(message: str) -> str:
    for start, explanation in _MESSAGES.items():
        if message.startswith(start):
            return explanation
    return f"{message[0].lower()}{message[1:]}"


def _describe_repetition(file: Path, statements: list[Statement]) -> str:
    *earlier, repeated = statements
    keys = repeated.keys

    def shared(statement: Statement) -> int:
        return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(statement.keys, keys, strict=False))))

    where = f"{file}:{repeated.line}:{repeated.column}: is not TOML"
    first = max(
        filter(shared, earlier), key=lambda statement: (shared(statement), -statement.line), default=None
    )
    if first is None:
        return f"{where}: a key is set twice"
    return f"{where}: {'.'.join(keys)} is already set in line {first.line}"
