"""Claims about the control interface's OpenAPI document: it is one, and a running daemon answers as it says."""

from __future__ import annotations

import json
from typing import Any, Final

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from jsonschema_rs import Draft202012Validator, meta
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from dmafs.service.openapi import document as made
from dmafs.service.operations import OPERATIONS

AT: Final = "0s ago"
ASKED: Final[dict[str, list[dict[str, str | int]]]] = {
    "status": [{}],
    "points": [{}],
    "moment": [{"at": AT}, {"at": "kept", "volume": "disk"}],
    "snapshots": [{}],
    "take_snapshot": [{"name": "one"}],
    "pin": [{"id": "one"}],
    "unpin": [{"id": "one"}],
    "rename_snapshot": [{"id": "one", "name": "first"}],
    "drop_snapshot": [{"id": "first"}],
    "mark": [{"name": "another"}],
    "sync": [{}],
    "thin": [{"dry_run": 1}, {"dry_run": 0}],
    "clones": [{}],
    "create_clone": [{"name": "one"}, {"name": "two", "at": "kept"}],
    "drop_clone": [{"name": "one"}, {"name": "two"}],
    "read": [{"volume": "disk", "at": AT, "offset": 4096, "length": 5}],
    "diff": [{"volume": "disk", "a": "kept", "b": AT}],
    "verify": [{"volume": "disk"}, {"volume": "disk", "rate": 0}],
    "resync": [{"volume": "disk"}],
    "scrub": [{"volume": "disk"}],
    "metrics": [{}],
    "openapi": [{}],
}
"""What each operation is asked that is answered with 200; in this order."""
WRONG: Final = {
    "/nothing": 404,
    "/status/": 404,
    "/status?x=1": 400,
    "/moment": 400,
    "/moment?at=latest&at=latest": 400,
    "/moment?at=nowhere": 404,
    "/read?volume=disk&at=latest&offset=-1&length=1": 400,
    "/diff?volume=none&a=latest&b=latest": 404,
    "/sync": 405,
}
EXAMPLES: Final = 60
KNOWN: Final = {
    "volume": ["disk"],
    "at": [AT, "kept", "0s ago"],
    "id": ["spare"],
    "name": ["spare"],
    "a": [AT],
    "b": [AT],
}


def checked(document: dict[str, Any], schema: dict[str, Any], answer: Any) -> None:
    """Validate an answer; references in the schema are into the document."""
    whole = {**schema, "components": document["components"]}
    Draft202012Validator(whole, validate_formats=True).validate(answer)


def operation_of(document: dict[str, Any], name: str) -> tuple[str, str, dict[str, Any]]:
    return next(
        (method, path, each)
        for path, methods in document["paths"].items()
        for method, each in methods.items()
        if each["operationId"] == name
    )


def test_it_is_one(document: dict[str, Any]) -> None:
    """It is valid, all operations are in it, and it is what the program makes."""
    OpenAPIV31SpecValidator(document).validate()
    assert document == json.loads(json.dumps(made()))
    named = {each["operationId"] for methods in document["paths"].values() for each in methods.values()}
    assert named == {operation.name for operation in OPERATIONS}
    for schema in document["components"]["schemas"].values():
        meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
        assert schema["description"]


def test_every_operation_answers_as_it_says(client: httpx.Client, document: dict[str, Any]) -> None:
    """All are asked for what they do; media types, schemas of answers and of each event are those of the document."""
    assert {operation.name for operation in OPERATIONS} - set(ASKED) == {"tap"}
    for name, queries in ASKED.items():
        method, path, operation = operation_of(document, name)
        for query in queries:
            answer = client.request(method.upper(), path, params=query)
            assert answer.status_code == 200, (name, answer.text)
            (media, content), *_ = operation["responses"]["200"]["content"].items()
            assert answer.headers["content-type"].partition(";")[0] == media.partition(";")[0]
            if media == "application/json":
                checked(document, content["schema"], answer.json())
            elif media == "text/event-stream":
                told = events(answer.text)
                assert [event for event, _ in told] == ["progress"] * (len(told) - 1) + ["result"]
                types = next(each.events for each in OPERATIONS if each.name == name)
                for event, data in told:
                    checked(document, {"$ref": f"#/components/schemas/{types[event].__name__}"}, data)
    read = client.get("/read", params=ASKED["read"][0])
    assert read.content == b"first"


def events(text: str) -> list[tuple[str, Any]]:
    """Take a stream of events apart: each has a name and data, and ends in an empty line."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    told = []
    for part in parts:
        name, data = part.split("\n")
        told.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return told


@pytest.mark.parametrize(("target", "status"), WRONG.items())
def test_errors_are_answered_as_it_says(
    client: httpx.Client, document: dict[str, Any], target: str, status: int
) -> None:
    """All of them in JSON, also where there is nothing."""
    answer = client.get(target)
    assert answer.status_code == status, answer.text
    checked(document, {"$ref": "#/components/schemas/Error"}, answer.json())


def test_what_cannot_be_now_is_a_conflict(client: httpx.Client, document: dict[str, Any]) -> None:
    """What is there already, is in use: nothing of the daemon's has failed. HEAD isn't there."""
    for method, path in (
        ("POST", "/snapshots?name=kept"),
        ("POST", "/clones?name=scratch"),
    ):
        answer = client.request(method, path)
        assert answer.status_code == 409, answer.text
        checked(document, {"$ref": "#/components/schemas/Error"}, answer.json())
    refused = client.head("/snapshots")
    assert (refused.status_code, set(refused.headers["allow"].split(", "))) == (405, {"DELETE", "GET", "POST"})


@schemathesis.hook
def map_query(_context: schemathesis.HookContext, query: dict[str, Any] | None) -> dict[str, Any] | None:
    """Have half of the texts be ones that mean something, so that more than the check of parameters is tried."""
    if query is None:
        return None
    for name in query:
        if (words := KNOWN.get(name)) and len(str(query[name])) % 2:
            query[name] = words[len(str(query[name])) // 2 % len(words)]
    if "rate" in query:
        query["rate"] = 0  # a byte a second would take days
    return query


NOT_CHECKED: Final[list[Any]] = [positive_data_acceptance, negative_data_rejection]
"""Limits that depend on the store aren't in the document; and a wrong text may have been replaced."""
SCHEMA: Final = schemathesis.openapi.from_dict(made())


@pytest.mark.parametrize("name", [operation.name for operation in OPERATIONS])
def test_whatever_is_asked_the_answer_is_as_it_says(client: httpx.Client, name: str) -> None:
    """Requests made from the document, right ones and wrong ones: no answer says that the daemon has failed."""

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=SCHEMA.find_operation_by_id(name).as_strategy())
    def asked(case: schemathesis.Case[Any]) -> None:
        asking = requests.Request(**case.as_transport_kwargs(base_url="http://dmafs")).prepare()
        assert asking.body is None
        answer = client.request(str(asking.method), str(asking.url))
        case.validate_response(answer, excluded_checks=NOT_CHECKED)

    asked()
