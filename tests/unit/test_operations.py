"""Claims about dmafs.service.operations: what comes from outside is checked, by the table."""

from __future__ import annotations

import inspect

import pytest

from dmafs.errors import InputError
from dmafs.service.control import Handlers
from dmafs.service.operations import FLAG, NUMBER, OPERATIONS, Operation
from dmafs.service.session import Session

BY_NAME = {operation.name: operation for operation in OPERATIONS}


def test_flags_are_0_or_1() -> None:
    """Nothing else is taken for yes or no."""
    assert (FLAG.read("0"), FLAG.read("1")) == (False, True)
    for text in ("", "2", "true", "01"):
        with pytest.raises(InputError, match="neither 0 nor 1"):
            FLAG.read(text)


def test_numbers_are_not_negative() -> None:
    """They are bytes, in decimal digits of ASCII, and fit 63 bits."""
    assert (NUMBER.read("0"), NUMBER.read("4096"), NUMBER.read("9" * 18)) == (0, 4096, 10**18 - 1)
    for text in ("-1", "4K", "", "1.0", "+1", " 1", "\u0661", "9" * 19):
        with pytest.raises(InputError, match="is not a number"):
            NUMBER.read(text)


def test_what_a_query_says_is_what_the_operation_takes() -> None:
    """What is optional and not there is None; what is unknown, missing or there twice is named."""
    moment = BY_NAME["moment"]
    assert moment.read([("at", "latest")]) == {"at": "latest", "volume": None}
    assert moment.read([("volume", "disk"), ("at", "")]) == {"at": "", "volume": "disk"}
    for query, said in (
        ([], "GET /moment lacks parameter at"),
        ([("at", "a"), ("at", "a")], "parameter at is given twice"),
        ([("at", "a"), ("when", "b")], "GET /moment has no parameter 'when'"),
    ):
        with pytest.raises(InputError, match=said):
            moment.read(query)
    with pytest.raises(InputError, match="parameter name: snapshot name 'a/b' can't be used"):
        BY_NAME["take_snapshot"].read([("name", "a/b")])
    with pytest.raises(InputError, match="parameter action: 'remove' is none of attach, detach, status"):
        BY_NAME["tap"].read([("action", "remove")])


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_each_has_a_handler_with_its_parameters(operation: Operation) -> None:
    """All that the table says, and nothing else, is passed to the method."""
    taken = inspect.signature(getattr(Handlers, operation.name)).parameters
    assert set(taken) - {"self"} == {parameter.name for parameter in operation.parameters}


def test_a_session_can_ask_for_all_of_it() -> None:
    """But for what is about the daemon only, by the same names."""
    asked = {name for name, _ in inspect.getmembers(Session, inspect.isfunction) if not name.startswith("_")}
    assert asked == set(BY_NAME) - {"metrics", "openapi"}
