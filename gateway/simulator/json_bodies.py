"""JSON of the simulator: validation of control requests, and rendering of responses."""

import inspect
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel
from starlette.responses import Response

Seconds = Annotated[float, Field(ge=0, le=1e9)]  # a timeout that every event loop supports
Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
HttpStatus = Annotated[int, Field(ge=200, le=599)]
# Valid in a header: Latin-1 without control characters. Anything else would make the response fail.
HeaderText = Annotated[str, Field(pattern=r"^[\x20-\x7e\xa0-\xff]*$")]


class ControlError(ValueError):
    """An invalid control request; the message is sent to the client."""


def arguments(target: Callable[..., object], given: Mapping[str, object]) -> dict[str, Any]:
    """Return JSON members as keyword arguments of `target`, checked against its annotations.

    Members are in camelCase, without a trailing underscore as in `bytes_`; those with a default are optional.
    Positional-only parameters are ignored.

    Raises: ControlError with the name of the member and what is allowed.
    """
    parameters = {
        to_camel(name.rstrip("_")): parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind is not parameter.POSITIONAL_ONLY
    }
    if unknown := sorted(given.keys() - parameters.keys()):
        raise ControlError(f"unknown: {', '.join(unknown)}; known: {', '.join(parameters) or 'none'}")
    if missing := [name for name, p in parameters.items() if p.default is p.empty and name not in given]:
        raise ControlError(f"missing: {', '.join(missing)}")
    return {parameters[name].name: _checked(name, parameters[name].annotation, given[name]) for name in given}


def parse_object(text: bytes) -> dict[str, Any] | None:
    """Return a JSON object, or None if `text` is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_response(content: object, status: int = 200) -> Response:
    """Return a JSON response. Unlike Starlette's, it accepts NaN and lone surrogates."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode(errors="replace"), status, media_type="application/json;charset=UTF-8")


def envelope(
    data: Mapping[str, Any] | None,
    *,
    err_code: str | None = None,
    err_message: str | None = None,
    sub_err_code: str | None = None,
    sub_err_message: str | None = None,
) -> Response:
    """Return an envelope of the vendor: status 10 with `data`, 20 without; always HTTP 200."""
    return json_response(
        {
            "status": 20 if data is None else 10,
            "apiInvokeId": f"i_{secrets.token_hex(12)}",
            "data": data,
            "errCode": err_code,
            "errMessage": err_message,
            "subErrCode": sub_err_code,
            "subErrMessage": sub_err_message,
            "startTime": None,
            "endTime": None,
        }
    )


def _checked(name: str, annotation: Any, value: object) -> Any:
    try:
        return TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        raise ControlError(f"{name}: {error.errors()[0]['msg']}") from error
