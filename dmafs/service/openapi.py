"""The control interface's OpenAPI document, made from the table of operations and the types of the answers.

OpenAPI 3.1, whose schemas are JSON Schema 2020-12. Imported when somebody asks for the document.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints, is_typeddict

from dmafs.answers import Error
from dmafs.service.operations import OPERATIONS, Operation, Parameter

Schema = dict[str, Any]

_PLAIN: Final = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_DESCRIPTION: Final = (
    "The control interface of the daemon that serves a store, by HTTP over the unix socket control.sock in the store. "
    "A request has no body; what it says is in its URL. Unknown parameters are refused."
)
_ERRORS: Final = {
    "400": "Something in the request can't be used; nothing was changed.",
    "404": "What was asked for isn't there.",
    "405": "The path has other methods: see Allow.",
    "409": "Not now: it is in use, pinned or under way, is there already, or is nothing that the volume's tap can do.",
    "503": "There are too many connections.",
    "507": "The store is full.",
    "default": "The daemon doesn't serve this user, or it failed.",
}


def document() -> Schema:
    """Return the document."""
    schemas: dict[str, Schema] = {}
    paths: dict[str, dict[str, Schema]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dmafs",
            "version": version("dmafs"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://dmafs", "description": "The unix socket; the name of the host doesn't count."}],
        "paths": paths,
        "components": {"schemas": dict(sorted(schemas.items()))},
    }


def _operation(operation: Operation, schemas: dict[str, Schema]) -> Schema:
    error = {"application/json": {"schema": schema_of(Error, schemas)}}
    return {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": [_parameter(parameter) for parameter in operation.parameters],
        "responses": {
            "200": {"description": operation.told, "content": _content(operation, schemas)},
            **{status: {"description": what, "content": error} for status, what in _ERRORS.items()},
        },
    }


def _parameter(parameter: Parameter) -> Schema:
    return {
        "name": parameter.name,
        "in": "query",
        "required": parameter.required,
        "description": parameter.what,
        "schema": parameter.kind.schema,
    }


def _content(operation: Operation, schemas: dict[str, Schema]) -> Schema:
    if operation.media == "application/json":
        return {operation.media: {"schema": schema_of(operation.answer, schemas)}}
    if operation.events:  # one of these each: as OpenAPI 3.2 describes the events of a stream
        return {operation.media: {"schema": {"oneOf": [_event(*each, schemas) for each in operation.events.items()]}}}
    return {operation.media: {"schema": {"type": "string"}}}


def _event(name: str, kind: Any, schemas: dict[str, Schema]) -> Schema:  # noqa: ANN401 - a TypedDict
    content = {"contentMediaType": "application/json", "contentSchema": schema_of(kind, schemas)}
    data = {"type": "string", **content}
    return {"type": "object", "properties": {"event": {"const": name}, "data": data}, "required": ["event", "data"]}


def schema_of(kind: Any, schemas: dict[str, Schema]) -> Schema:  # noqa: ANN401 - any type
    """Return the schema of a type; those of objects are put into *schemas*, and referred to."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if kind is Any:
        return {}
    if is_typeddict(kind):
        if kind.__name__ not in schemas:
            schemas[kind.__name__] = {}  # it may be in itself
            schemas[kind.__name__] = _object(kind, schemas)
        return {"$ref": f"#/components/schemas/{kind.__name__}"}
    if origin not in _COMPOSED:
        raise TypeError(f"{kind} has no schema")
    return _COMPOSED[origin](arguments, schemas)


_COMPOSED: Final[Mapping[Any, Callable[[tuple[Any, ...], dict[str, Schema]], Schema]]] = {
    Annotated: lambda arguments, schemas: schema_of(arguments[0], schemas) | dict(arguments[1:]),
    Union: lambda arguments, schemas: {"anyOf": [schema_of(each, schemas) for each in arguments]},
    types.UnionType: lambda arguments, schemas: {"anyOf": [schema_of(each, schemas) for each in arguments]},
    list: lambda arguments, schemas: {"type": "array", "items": schema_of(arguments[0], schemas)},
    dict: lambda arguments, schemas: {"type": "object", "additionalProperties": schema_of(arguments[1], schemas)},
}


def _object(kind: Any, schemas: dict[str, Schema]) -> Schema:  # noqa: ANN401 - a TypedDict
    hints = get_type_hints(kind, include_extras=True)
    return {
        "type": "object",
        "description": " ".join((kind.__doc__ or "").split()),
        "properties": {name: schema_of(hint, schemas) for name, hint in hints.items()},
        "required": sorted(kind.__required_keys__),
        "additionalProperties": False,
    }
