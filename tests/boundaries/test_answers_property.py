"""
Arbitrary answers: a neighbour comes through whatever lies next to it, nothing but a `PayrocError` is raised,
and what is taken for a refund is what was sent. Each property goes red when one bound is taken away.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from include.payroc import answers
from include.payroc.errors import PayrocError
from include.payroc.models import AccessToken, Refund
from include.refunds import release
from include.refunds.ledger import Ledger
from include.refunds.release import PreflightFailed, preflight
from payroc_airflow.gateway import HookGateway
from payroc_airflow.hooks.payroc import PayrocHook
from tests.hooks.conftest import KEY, REFUND, FakePayroc, Reply, serve

# A failing example of 20,000 brackets is printed to nobody.
_of_large_examples = pytest.mark.filterwarnings("ignore:Generating overly large repr")

GOOD = [REFUND | {"refundId": f"NEIGHBOUR{number}"} for number in range(2)]
PATH = "/v1/bank-transfer-refunds"

# What json.dumps writes of them is not always JSON: NaN, and halves of an emoji.
TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
NUMBERS = st.integers() | st.integers(10**30, 10**60) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def nearly_refunds(draw: st.DrawFn) -> dict[str, Any]:
    """A refund in which a few members, at any level, are something else, or missing."""
    changed = json.loads(json.dumps(REFUND))
    for _ in range(draw(st.integers(0, 3))):
        inside = changed
        while True:
            name = draw(st.sampled_from(sorted(inside)) | TEXT if inside else TEXT)
            if not isinstance(inside.get(name), dict) or draw(st.booleans()):
                break
            inside = inside[name]
        if draw(st.booleans()):
            inside[name] = draw(VALUES)
        else:
            inside.pop(name, None)
        if not inside:
            break
    return changed


def _dumps(value: object) -> bytes:
    # Half an emoji as its escape, or as bytes that are no UTF-8.
    return json.dumps(value).encode()


def _nested(depth: int, brackets: tuple[bytes, bytes], inner: bytes) -> bytes:
    opening, closing = brackets
    return opening * depth + inner + closing * depth


# Elements of a list as bytes: JSON, what only looks like it, and what each bound is about. All have matching
# brackets and quotes, because without these nobody can tell where an element ends; whole answers below are
# any bytes.
ELEMENTS = st.one_of(
    nearly_refunds().map(_dumps),
    VALUES.map(_dumps),
    st.binary(max_size=40).map(lambda raw: b'{"x": "' + raw.replace(b"\\", b"").replace(b'"', b"") + b'"}'),
    st.builds(
        _nested,
        st.sampled_from([1, 31, 33, 200, 10_000, 20_000]),
        st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]),
        VALUES.map(_dumps),
    ),
    st.builds(
        lambda digits, member: b'{"%s": %s, ' % (member, b"9" * digits) + _dumps(REFUND)[1:],
        st.sampled_from([39, 41, 4299, 4301, 5000]),
        st.sampled_from([b"amount", b"extra"]),
    ),
    st.integers(0, 9).map(
        lambda amount: _dumps(REFUND).replace(b'"amount"', b'"amount": %d, "amount"' % amount)
    ),
    st.sampled_from(
        [
            b"NaN",
            b"-Infinity",
            b"'a'",
            b"{a:1}",
            b"01",
            b"1.",
            b"\xef\xbb\xbf{}",
            b'{"refundId":"NEIGHBOUR0"}',
        ]
    ),
)


def neighbours_come_through(elements: list[bytes]) -> None:
    """Property of a page: good refunds around any elements are read, and each as it was sent."""
    good = [_dumps(refund) for refund in GOOD]
    data = b", ".join([good[0], *elements, good[1]])
    page = answers.read_page(b'{"limit":9,"count":9,"hasMore":false,"links":[],"data":[%s]}' % data, 3)
    first, *read, last = page.refunds
    assert [first, last] == [Refund.model_validate_json(each) for each in good]
    assert len(read) + len(page.not_understood) == len(elements)
    assert all(len(name) <= 40 and name.isprintable() for name in page.not_understood)
    sent = iter(elements)
    for refund in read:
        assert any(_equals(refund, element) for element in sent)


def _equals(refund: Refund, element: bytes) -> bool:
    """Return whether an element, read by another parser, says of the refund what matters."""
    try:
        found = json.loads(element, object_pairs_hook=_members, parse_int=_of_40_digits)
    except (ValueError, RecursionError):
        return False
    try:
        order, result = found["order"], found["transactionResult"]
        fields = [(field["name"], field["value"]) for field in found.get("customFields") or ()]
        same = [
            (refund.refund_id, found["refundId"]),
            (refund.processing_terminal_id, found["processingTerminalId"]),
            (refund.order.order_id, order["orderId"]),
            (refund.order.amount, order["amount"]),
            (refund.order.currency, order["currency"]),
            (refund.transaction_result.status, result["status"]),
            (refund.transaction_result.response_code, result["responseCode"]),
            (refund.transaction_result.authorized_amount, result.get("authorizedAmount")),
            ([(field.name, field.value) for field in refund.custom_fields or ()], fields),
        ]
    except (KeyError, TypeError):
        return False
    return all(ours == theirs and type(ours) is type(theirs) for ours, theirs in same)


def _of_40_digits(text: str) -> int:
    if len(text) > 40:
        raise ValueError("a number is too long")
    return int(text)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


@given(st.lists(ELEMENTS, max_size=4))
def test_any_object_of_a_page_spoils_itself_at_most(elements: list[bytes]) -> None:
    neighbours_come_through(elements)


def _without_depth(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answers, "MAX_DEPTH", 10**9)


def _without_digits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answers, "_STRICT", json.JSONDecoder(object_pairs_hook=answers._no_name_twice))


def _with_the_last_of_two_names(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answers, "_STRICT", json.JSONDecoder(parse_int=answers._number))


def _one_object_spoils_the_page(patch: pytest.MonkeyPatch) -> None:
    whole = answers._parse

    def parse(model: Any, text: bytes) -> Any:
        try:
            return whole(model, text)
        except answers.NotUnderstood as error:
            raise PayrocError("list refunds", str(error)) from None

    patch.setattr(answers, "_parse", parse)


@_of_large_examples
@pytest.mark.parametrize(
    "mistake", [_without_depth, _without_digits, _with_the_last_of_two_names, _one_object_spoils_the_page]
)
def test_the_property_of_a_page_finds_a_planted_mistake(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    goes_red(neighbours_come_through, st.lists(ELEMENTS, max_size=4))


def goes_red(a_property: Callable[..., None], *arguments: st.SearchStrategy[Any]) -> None:
    """Make sure that a property fails; how small the example can be made is of no interest."""
    # It ends at the first example that fails, nearly always one of the first hundred; and always the same
    # one.
    hunt = settings(max_examples=2000, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, LookupError, RecursionError, TypeError, ValueError, PayrocError)):
        hunt(given(*arguments)(a_property))()


# -- whole answers, over HTTP --------------------------------------------------------------------------------

LIST = b'{"limit":1,"count":0,"hasMore":false,"links":[],"data":[]}'
TOKEN = b'{"access_token":"a","expires_in":3600,"token_type":"Bearer","scope":"x"}'
WHOLES = [LIST, TOKEN, _dumps(REFUND), b'{"type":"x#bad-request","title":"t","status":400,"detail":"d"}']


@st.composite
def cut_and_spliced(draw: st.DrawFn) -> bytes:
    """Bytes of a right answer with some cut out, and others in their place."""
    whole = draw(st.sampled_from(WHOLES))
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, len(whole)))
    return whole[:start] + draw(st.binary(max_size=3) | st.just(b"")) + whole[end:]


ANSWERS = st.one_of(
    st.sampled_from(WHOLES),
    cut_and_spliced(),
    st.binary(max_size=60),
    VALUES.map(_dumps),
    ELEMENTS,
    ELEMENTS.map(lambda element: LIST.replace(b"[]}", b"[%s]}" % element)),
    st.sampled_from(
        [b"\xef\xbb\xbf" + LIST, gzip.compress(LIST, mtime=0), LIST.decode().encode("utf-16"), b"<html>"]
    ),
)
STATUSES = st.sampled_from([200, 201] * 5 + [204, 302, 400, 401, 403, 404, 409, 413, 422, 429, 500, 503])
TYPES = st.sampled_from(["application/json", "application/problem+json", "text/html", "", "\xff"])


@dataclass
class Wire:
    """A local server that answers everything as it is told to, and the hook and gateway that talk to it."""

    payroc: FakePayroc
    hook: PayrocHook
    gateway: HookGateway
    token: AccessToken

    def answer(self, body: bytes, status: int = 200, content_type: str = "application/json") -> None:
        replies = [Reply(status, body, {"Content-Type": content_type})]
        for method, path in (
            ("POST", ""),
            ("GET", ""),
            ("GET", "/CD3HN88U9F"),
            ("POST", "/CD3HN88U9F/reverse"),
        ):
            self.payroc.replies[method, PATH + path] = replies
        self.payroc.seen.clear()

    def operations(self) -> list[Callable[[], object]]:
        hook, token = self.hook, self.token
        return [
            lambda: hook.create_refund(b"{}", idempotency_key=KEY, token=token),
            lambda: hook.get_refund("CD3HN88U9F", token=token),
            lambda: hook.reverse_refund("CD3HN88U9F", idempotency_key=KEY, token=token),
            lambda: list(hook.list_refunds("1234001", token=token)),
        ]


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    served = serve()
    payroc = next(served)
    connection = {
        "conn_type": "payroc",
        "password": "a-key-of-the-property",
        "host": f"{payroc.url}/v1",
        "extra": {"identity_url": payroc.url},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_CONN_PAYROC_DEFAULT", json.dumps(connection))
        hook = PayrocHook(timeout_seconds=5)
        yield Wire(payroc, hook, HookGateway(hook), hook.get_token())
    served.close()


def every_operation_ends_properly(wire: Wire, body: bytes, status: int, content_type: str) -> None:
    """Property of an operation: it returns an object of Payroc's, or raises a short `PayrocError`."""
    wire.answer(body, status, content_type)
    for operation in wire.operations():
        try:
            found = operation()
        except PayrocError as error:
            sentence = str(error)
        else:
            sentence = ""
            assert isinstance(found, Refund | list)
            assert status in (200, 201)
        assert sentence.isascii()
        assert len(sentence) < 1000
    wire.payroc.replies["POST", "/authorize"] = [Reply(status, body, {"Content-Type": content_type})]
    try:
        ok, sentence = wire.hook.test_connection()
    finally:
        del wire.payroc.replies["POST", "/authorize"]
    assert sentence.isascii()
    if ok:
        assert status == 200
        assert json.loads(body)["access_token"]


@given(ANSWERS, STATUSES, TYPES)
def test_any_answer_is_an_object_of_payrocs_or_an_error_of_ours(
    wire: Wire, body: bytes, status: int, content_type: str
) -> None:
    every_operation_ends_properly(wire, body, status, content_type)


@_of_large_examples
def test_the_property_of_operations_finds_a_planted_mistake(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_depth(monkeypatch)

    def with_the_mistake(body: bytes, status: int, content_type: str) -> None:
        every_operation_ends_properly(wire, body, status, content_type)

    goes_red(with_the_mistake, ANSWERS, STATUSES, TYPES)


class Pauses:
    """Takes the pauses of a preflight."""

    async def pause(self, scope: str, reason: str) -> None:
        assert reason.isascii()


def only_payrocs_list_passes_the_preflight(wire: Wire, body: bytes) -> None:
    """Property of the preflight: what passes it is a list of Payroc's to another reader, too."""
    wire.answer(body)
    try:
        asyncio.run(preflight({"1234001"}, cast("Ledger", Pauses()), wire.gateway))
    except PreflightFailed:
        return
    # What is on the list makes no difference.
    found = json.loads(re.sub(rb'"data":\[.*\]', b'"data":[]', body, flags=re.DOTALL))
    assert [type(found[name]) for name in ("limit", "count", "hasMore", "data")] == [int, int, bool, list]


@given(ANSWERS)
def test_nothing_but_payrocs_list_passes_the_preflight(wire: Wire, body: bytes) -> None:
    only_payrocs_list_passes_the_preflight(wire, body)


@_of_large_examples
def test_the_property_of_the_preflight_finds_a_planted_mistake(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def every_200_is_well(terminal: str, token: AccessToken, gateway: Any) -> None:
        try:
            async for _ in gateway.list_refunds(token, processing_terminal_id=terminal, limit=1):
                return
        except PayrocError as error:
            if error.http_status != 200:
                raise

    monkeypatch.setattr(release, "_list_one", every_200_is_well)

    def with_the_mistake(body: bytes) -> None:
        only_payrocs_list_passes_the_preflight(wire, body)

    goes_red(with_the_mistake, ANSWERS)
