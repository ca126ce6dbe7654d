"""Every property of every preset, but for the declared exceptions, which are counted."""

from __future__ import annotations

import pytest

from tests.routing.cases import ANY, EXCEPTIONS, case, names, runs
from tests.routing.properties import ROUTING
from tests.transport.properties import TRANSPORT

RUNS = [(title, name) for title, name, _ in runs(ROUTING)]


@pytest.mark.parametrize(("title", "name"), RUNS)
def test_property(title: str, name: str):
    ROUTING[title].check(case(name))


def test_count(capsys):
    # Nothing is left out but what the table of exceptions names with a reason.
    product = sum(
        len(names()) * len(entry.transports)
        for table in (ROUTING, TRANSPORT)
        for entry in table.values()
    )
    ran = [*runs(ROUTING), *runs(TRANSPORT)]
    assert len(ran) == len(set(ran)) == product - len(EXCEPTIONS)
    with capsys.disabled():
        print(
            f"\n{len(ran)} = {product} preset x transport x property - {len(EXCEPTIONS)} declared"
        )


def test_every_exception_is_about_something_and_has_a_reason():
    tables = ROUTING | TRANSPORT
    for (title, name, transport), reason in EXCEPTIONS.items():
        assert name in names() and reason
        assert transport in tables[title].transports
        assert transport == ANY or title in TRANSPORT
