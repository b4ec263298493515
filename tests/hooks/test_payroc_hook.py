"""The hook against a real server: what it sends, and what it makes of every kind of answer."""

from __future__ import annotations

import datetime as dt
import gzip
import ipaddress
import json
import logging
import pickle
import socket
import ssl
import struct

import pytest
from airflow.providers.http.hooks.http import HttpHook
from airflow.sdk.exceptions import AirflowException
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from include.payroc.errors import (
    PayrocConfigurationError,
    PayrocError,
    PayrocIncompleteList,
    PayrocNoAnswer,
    PayrocProblem,
    PayrocUnexpectedAnswer,
)
from include.payroc.models import RefundRequest
from include.refunds.settings import get_settings
from payroc_airflow.hooks.payroc import PayrocHook

PATH = "/v1/bank-transfer-refunds"
ERRORS = "https://docs.payroc.com/api/errors#"
PROBLEM_JSON = {"Content-Type": "application/problem+json"}
BODY = b'{"a": 1, "keep":"these  bytes"}'
CANARY = "123456789012"

REQUEST = {
    "processingTerminalId": "1234001",
    "order": {"orderId": "OrderRef6543", "description": "A refund", "amount": 4999, "currency": "USD"},
    "refundMethod": {
        "type": "ach",
        "secCode": "ppd",
        "accountType": "checking",
        "nameOnAccount": "Canary Payee",
        "accountNumber": CANARY,
        "routingNumber": "053200983",
    },
}


def problem(fragment: str, status: int, **more: object) -> dict[str, object]:
    return {"type": ERRORS + fragment, "title": "t", "status": status, "detail": f"You sent {CANARY}", **more}


@pytest.fixture
def create(hook, token, key):
    return lambda body=BODY: hook.create_refund(body, idempotency_key=key, token=token)


# --- what is sent ---------------------------------------------------------------------------------------------------------


def test_a_hook_is_made_without_reading_the_connection_or_the_settings(monkeypatch) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_HTTP_TIMEOUT_SECONDS", "not a number")
    get_settings.cache_clear()
    assert isinstance(PayrocHook(payroc_conn_id="no_such_connection"), HttpHook)


def test_a_create_sends_exactly_the_bytes_the_key_and_the_token(
    create, payroc, reply, refund_body, key
) -> None:
    payroc.on("POST", PATH, reply(201, refund_body))
    assert create().refund_id == "CD3HN88U9F"
    (request,) = payroc.seen
    assert request.body == BODY
    assert {name: value for name, value in request.headers.items() if name != "host"} == {
        "accept": "application/json, application/problem+json",
        "accept-encoding": "identity",
        "user-agent": "payroc-refunds",
        "authorization": "Bearer canary-token-given",
        "idempotency-key": key,
        "content-type": "application/json",
        "content-length": str(len(BODY)),
    }


def test_a_create_from_a_model_sends_its_body(create, payroc, reply, refund_body) -> None:
    payroc.on("POST", PATH, reply(201, refund_body))
    request = RefundRequest.model_validate(REQUEST)
    create(request)
    assert payroc.seen[0].body == request.to_body()


def test_a_create_never_asks_for_a_token(create, payroc, reply) -> None:
    payroc.on("POST", PATH, reply(401, problem("not-authorized", 401), PROBLEM_JSON))
    with pytest.raises(PayrocProblem):
        create()
    assert payroc.of("/authorize") == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_no_answer_makes_the_hook_post_twice(create, payroc, reply, status) -> None:
    payroc.on("POST", PATH, reply(status, b"later", {"Retry-After": "0"}))
    with pytest.raises(PayrocUnexpectedAnswer):
        create()
    assert len(payroc.seen) == 1


@pytest.mark.parametrize(
    "bad",
    ["", "not-a-uuid", "8e03978e-40d5-13e8-bc93-6894a57f9324", "8e03978e-40d5-43e8-bc93-6894a57f9324\n"],
)
def test_a_key_that_is_no_uuid_v4_is_refused_before_anything_is_sent(hook, payroc, token, bad) -> None:
    with pytest.raises(ValueError, match="UUID v4"):
        hook.create_refund(BODY, idempotency_key=bad, token=token)
    assert payroc.seen == []


def test_one_connection_serves_many_requests(hook, payroc, reply, refund_body, token) -> None:
    payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body))
    for _ in range(5):
        hook.get_refund("CD3HN88U9F", token=token)
    assert len({request.client for request in payroc.seen}) == 1


def test_extras_never_become_headers_and_unknown_ones_are_named_in_the_log(
    payroc, connect, reply, refund_body, token, caplog
) -> None:
    connect(
        host=f"{payroc.url}/v1",
        extra={"identity_url": payroc.url, "X-Secret": "canary-extra", "verify": False, "timeout": 99},
    )
    payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body))
    PayrocHook().get_refund("CD3HN88U9F", token=token)
    assert set(payroc.seen[0].headers) == {"host", "accept", "accept-encoding", "user-agent", "authorization"}
    assert "X-Secret, timeout, verify" in caplog.text
    assert "canary-extra" not in caplog.text


def test_the_environment_gives_neither_proxy_nor_credentials(
    hook, payroc, reply, refund_body, token, monkeypatch, tmp_path
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password canary-netrc\n")
    monkeypatch.setenv("NETRC", str(netrc))
    payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body))
    hook.get_refund("CD3HN88U9F", token=token)
    assert payroc.seen[0].headers["authorization"] == "Bearer canary-token-given"


def test_a_proxy_is_used_when_the_connection_names_one(payroc, connect, reply, refund_body, token) -> None:
    connect(
        host="http://payroc.invalid/v1",
        extra={"identity_url": "http://payroc.invalid", "allow_http": True, "proxy": payroc.url},
    )
    payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body))
    assert PayrocHook().get_refund("CD3HN88U9F", token=token).refund_id == "CD3HN88U9F"
    assert payroc.seen[0].headers["host"] == "payroc.invalid"


def test_cookies_of_an_answer_are_not_sent_back(hook, payroc, reply, refund_body, token) -> None:
    payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body, {"Set-Cookie": "a=b"}))
    for _ in range(2):
        hook.get_refund("CD3HN88U9F", token=token)
    assert "cookie" not in payroc.seen[1].headers


@pytest.mark.parametrize(
    "call",
    [
        lambda hook: hook.run("/v1/anything"),
        lambda hook: hook.run_with_advanced_retry({}, "/v1"),
        lambda hook: hook.run_and_check(None, None, {}),
        lambda hook: hook.check_response(None),
        lambda hook: hook.get_conn(),
    ],
    ids=["run", "run_with_advanced_retry", "run_and_check", "check_response", "get_conn"],
)
def test_the_generic_ways_of_http_hook_are_closed(hook, payroc, call) -> None:
    with pytest.raises(AirflowException, match="create_refund"):
        call(hook)
    assert payroc.seen == []


# --- what comes back ------------------------------------------------------------------------------------------------------


def test_a_200_with_a_refund_counts_as_a_created_one(create, payroc, reply, refund_body) -> None:
    payroc.on("POST", PATH, reply(200, refund_body))
    assert create().last4 == "7890"


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (201, b"", {}),
        (201, b"<html>hello</html>", {"Content-Type": "text/html"}),
        (201, {"refundId": "CD3HN88U9F"}, {}),
        (201, b'{"refundId": "CD3HN8', {}),
        (201, b"\xff\xfe", {}),
        (202, {}, {}),
        (204, b"", {}),
        (206, {}, {}),
        (302, b"", {"Location": "/v1/elsewhere"}),
        (307, b"", {"Location": "/v1/elsewhere"}),
        (400, b"<html>Bad Request</html>", {"Content-Type": "text/html"}),
        (403, {"message": "Forbidden"}, {}),
        (403, {"type": "error", "message": "no"}, {}),
        (404, b"", {}),
        (502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"}),
        (500, b"\xff\xfe", PROBLEM_JSON),
    ],
)
def test_an_answer_that_is_not_payrocs_is_unexpected_and_keeps_its_status(
    create, payroc, reply, status, body, headers
) -> None:
    payroc.on("POST", PATH, reply(status, body, headers))
    with pytest.raises(PayrocUnexpectedAnswer) as caught:
        create()
    assert caught.value.http_status == status
    assert len(payroc.seen) == 1


def test_a_202_with_a_refund_is_still_unexpected(create, payroc, reply, refund_body) -> None:
    payroc.on("POST", PATH, reply(202, refund_body))
    with pytest.raises(PayrocUnexpectedAnswer):
        create()


@pytest.mark.parametrize(
    "headers",
    [
        PROBLEM_JSON,
        {"Content-Type": "application/json"},
        {"Content-Type": "application/problem+json; charset=utf-8"},
    ],
)
@pytest.mark.parametrize(
    ("fragment", "status"),
    [
        ("bad-request", 400),
        ("idempotency-key-in-use", 409),
        ("not-authorized", 401),
        ("forbidden", 403),
        ("api-error", 500),
        ("new-one", 418),
    ],
)
def test_a_problem_document_is_told_by_fragment_and_status(
    create, payroc, reply, fragment, status, headers
) -> None:
    payroc.on("POST", PATH, reply(status, problem(fragment, status), headers))
    with pytest.raises(PayrocProblem) as caught:
        create()
    assert (caught.value.problem_type, caught.value.http_status) == (fragment, status)


def test_a_problem_keeps_the_status_of_the_answer_not_the_one_in_its_body(create, payroc, reply) -> None:
    payroc.on("POST", PATH, reply(400, problem("idempotency-key-in-use", 409), PROBLEM_JSON))
    with pytest.raises(PayrocProblem) as caught:
        create()
    assert caught.value.http_status == 400


def test_a_problem_document_by_content_type_needs_only_its_type(create, payroc, reply) -> None:
    payroc.on(
        "POST",
        PATH,
        reply(400, {"type": ERRORS + "bad-request", "errors": "odd", "instance": 5}, PROBLEM_JSON),
    )
    with pytest.raises(PayrocProblem) as caught:
        create()
    assert caught.value.problem_type == "bad-request"


def test_a_problem_hands_on_names_of_fields_and_places_but_no_text(create, payroc, reply) -> None:
    errors = [
        {"parameter": "order.amount", "message": f"You entered {CANARY}"},
        {"parameter": "customFields[0].name"},
        {"parameter": CANARY},
        {"parameter": f"account {CANARY}"},
        {"parameter": f"field{CANARY}"},
        {"parameter": "x" * 65},
        {"message": "no parameter"},
        *({"parameter": f"field{letter}"} for letter in "abcdefghijkl"),
    ]
    body = problem(
        "bad-request", 400, errors=errors, instance="https://api.payroc.com/v1/x", resource="terminal"
    )
    payroc.on("POST", PATH, reply(400, body, PROBLEM_JSON))
    with pytest.raises(PayrocProblem) as caught:
        create()
    error = caught.value
    assert error.parameters[:3] == ("order.amount", "customFields[0].name", "fielda")
    assert len(error.parameters) == 10
    assert (error.instance, error.resource) == ("https://api.payroc.com/v1/x", "terminal")
    assert CANARY not in str(error) + repr(error) + repr(vars(error))
    assert str(error).startswith(
        "Payroc, create refund: bad-request about order.amount, customFields[0].name"
    )


def test_odd_words_of_a_problem_are_left_out(create, payroc, reply) -> None:
    body = problem("free text", 400, instance=f"account {CANARY}", resource="two words")
    payroc.on("POST", PATH, reply(400, body, PROBLEM_JSON))
    with pytest.raises(PayrocProblem) as caught:
        create()
    assert (caught.value.problem_type, caught.value.instance, caught.value.resource) == (None, None, None)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("99999999999", 86400),
        ("-1", None),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("", None),
        ("1e9", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_date_and_capped_at_a_day(
    create, payroc, reply, value, seconds
) -> None:
    payroc.on("POST", PATH, reply(429, b"", {"Retry-After": value}))
    with pytest.raises(PayrocUnexpectedAnswer) as caught:
        create()
    assert caught.value.retry_after == seconds


def test_retry_after_as_a_date_to_come_is_read_as_seconds_from_now(create, payroc, reply) -> None:
    when = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=100)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    payroc.on("POST", PATH, reply(503, problem("api-error", 503), PROBLEM_JSON | {"Retry-After": when}))
    with pytest.raises(PayrocProblem) as caught:
        create()
    # It is a little less each moment.
    assert 0 < caught.value.retry_after <= 100


# --- no answer ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def create_hastily(hasty, token, key):
    return lambda: hasty.create_refund(BODY, idempotency_key=key, token=token)


def test_a_silent_server_is_left_after_the_timeout(create_hastily, payroc, reply) -> None:
    payroc.on("POST", PATH, reply(raw=lambda handler: payroc.stopped.wait()))
    with pytest.raises(PayrocNoAnswer, match=r"no answer within 0.5 s"):
        create_hastily()


@pytest.mark.parametrize(
    "start",
    [b"HTTP/1.1 201 Cre", b"HTTP/1.1 201 Created\r\nContent-Length: 1000\r\n\r\n{"],
    ids=["headers", "body"],
)
def test_a_server_that_sends_a_byte_now_and_then_holds_nobody(create_hastily, payroc, reply, start) -> None:
    def drip(handler) -> None:
        handler.wfile.write(start)
        while not payroc.stopped.wait(0.1):
            handler.wfile.write(b"a")

    payroc.on("POST", PATH, reply(raw=drip))
    with pytest.raises(PayrocNoAnswer, match="no complete answer within 1 s") as caught:
        create_hastily()
    assert caught.value.http_status is None


def test_a_body_that_stops_is_left_after_the_timeout(create_hastily, payroc, reply) -> None:
    def stop(handler) -> None:
        handler.wfile.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 1000\r\n\r\n{")
        payroc.stopped.wait()

    payroc.on("POST", PATH, reply(raw=stop))
    with pytest.raises(PayrocNoAnswer, match=r"the answer stopped for 0.5 s before its end"):
        create_hastily()


def test_a_body_that_breaks_off_is_no_answer(create, payroc, reply, refund_body) -> None:
    content = json.dumps(refund_body).encode()
    head = f"HTTP/1.1 201 Created\r\nContent-Length: {len(content) + 1}\r\n\r\n".encode()
    payroc.on("POST", PATH, reply(raw=lambda handler: handler.wfile.write(head + content)))
    with pytest.raises(PayrocNoAnswer, match="connection closed before the answer's end"):
        create()


def test_a_reset_is_no_answer(create, payroc, reply) -> None:
    def reset(handler) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    payroc.on("POST", PATH, reply(raw=reset))
    with pytest.raises(PayrocNoAnswer, match="connection closed without an answer"):
        create()
    assert len(payroc.seen) == 1


def test_not_even_a_get_is_sent_twice(hook, payroc, reply, token) -> None:
    payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(raw=lambda handler: None))
    with pytest.raises(PayrocNoAnswer):
        hook.get_refund("CD3HN88U9F", token=token)
    assert len(payroc.seen) == 1


def test_a_closed_connection_is_no_answer(create, payroc, reply) -> None:
    payroc.on("POST", PATH, reply(raw=lambda handler: None))
    with pytest.raises(PayrocNoAnswer, match="connection closed without an answer"):
        create()
    assert len(payroc.seen) == 1


def test_something_that_is_not_http_is_no_answer(create, payroc, reply) -> None:
    payroc.on("POST", PATH, reply(raw=lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")))
    with pytest.raises(PayrocNoAnswer):
        create()


def test_a_refused_connection_is_no_answer(connect, token, key) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    connect(host=f"{url}/v1", extra={"identity_url": url})
    with pytest.raises(PayrocNoAnswer, match="create refund: connection refused"):
        PayrocHook().create_refund(BODY, idempotency_key=key, token=token)


def test_an_unknown_host_is_no_answer(connect, token) -> None:
    connect(host="https://payroc.invalid/v1", extra={"identity_url": "https://payroc.invalid"})
    with pytest.raises(PayrocNoAnswer, match="the host name can't be resolved"):
        PayrocHook(timeout_seconds=60).get_refund("CD3HN88U9F", token=token)


@pytest.mark.parametrize("announced", [True, False], ids=["with its length", "chunked"])
def test_a_body_of_100_mb_is_not_read(create, payroc, reply, announced) -> None:
    sent = 0

    def flood(handler) -> None:
        nonlocal sent
        size = 100 * 1024 * 1024
        handler.wfile.write(b"HTTP/1.1 201 Created\r\n")
        handler.wfile.write(
            f"Content-Length: {size}\r\n\r\n".encode() if announced else b"Transfer-Encoding: chunked\r\n\r\n"
        )
        block = b"a" * 65536
        while sent < size:
            handler.wfile.write(block if announced else b"10000\r\n" + block + b"\r\n")
            sent += len(block)

    payroc.on("POST", PATH, reply(raw=flood))
    with pytest.raises(PayrocUnexpectedAnswer, match="larger than 1 MiB") as caught:
        create()
    assert caught.value.http_status == 201
    assert sent < 20 * 1024 * 1024


def test_a_compressed_answer_is_not_unpacked(create, payroc, reply, refund_body) -> None:
    payroc.on(
        "POST",
        PATH,
        reply(201, gzip.compress(json.dumps(refund_body).encode()), {"Content-Encoding": "gzip"}),
    )
    with pytest.raises(PayrocUnexpectedAnswer):
        create()


# --- TLS ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tls_payroc(serve_tls, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + dt.timedelta(days=1)
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    (tmp_path / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    yield from serve_tls(context)


def test_a_certificate_that_nobody_vouches_for_is_refused(
    tls_payroc, connect, token, monkeypatch, tmp_path
) -> None:
    # Neither an extra nor the environment switches verification off.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    url = tls_payroc.url.replace("http:", "https:")
    connect(host=f"{url}/v1", extra={"identity_url": url, "verify": False, "verify_ssl": False})
    with pytest.raises(PayrocNoAnswer, match="TLS certificate not trusted"):
        PayrocHook().get_refund("CD3HN88U9F", token=token)
    assert tls_payroc.seen == []


def test_a_certificate_of_the_connections_ca_bundle_is_trusted(
    tls_payroc, connect, reply, refund_body, token, tmp_path
) -> None:
    url = tls_payroc.url.replace("http:", "https:")
    connect(host=f"{url}/v1", extra={"identity_url": url, "ca_bundle": str(tmp_path / "ca.pem")})
    tls_payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body))
    assert PayrocHook().get_refund("CD3HN88U9F", token=token).refund_id == "CD3HN88U9F"


def test_a_tls_server_that_drips_is_left_at_the_deadline(tls_payroc, connect, reply, token, tmp_path) -> None:
    def drip(handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Word: ")
        while not tls_payroc.stopped.wait(0.1):
            handler.wfile.write(b"H")

    url = tls_payroc.url.replace("http:", "https:")
    connect(host=f"{url}/v1", extra={"identity_url": url, "ca_bundle": str(tmp_path / "ca.pem")})
    tls_payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(raw=drip))
    with pytest.raises(PayrocNoAnswer, match=r"no complete answer within 0.8 s"):
        PayrocHook(timeout_seconds=0.4).get_refund("CD3HN88U9F", token=token)


def test_https_to_a_server_that_speaks_http_is_no_answer(payroc, connect, token) -> None:
    url = payroc.url.replace("http:", "https:")
    connect(host=f"{url}/v1", extra={"identity_url": url})
    with pytest.raises(PayrocNoAnswer, match="TLS could not be set up"):
        PayrocHook(timeout_seconds=60).get_refund("CD3HN88U9F", token=token)


# --- get and reverse ------------------------------------------------------------------------------------------------------


def test_a_refund_is_got_with_a_token_of_the_cache_when_none_is_given(
    hook, payroc, reply, refund_body
) -> None:
    payroc.on("GET", f"{PATH}/CD3HN88U9F", reply(200, refund_body))
    for _ in range(3):
        hook.get_refund("CD3HN88U9F")
    assert [request.headers["authorization"] for request in payroc.of(f"{PATH}/CD3HN88U9F")] == [
        "Bearer canary-token-1"
    ] * 3
    assert len(payroc.of("/authorize")) == 1


def test_another_refund_than_the_one_asked_for_is_unexpected(hook, payroc, reply, refund_body, token) -> None:
    payroc.on("GET", f"{PATH}/XXXXXXXXXX", reply(200, refund_body))
    with pytest.raises(PayrocUnexpectedAnswer, match="another refund"):
        hook.get_refund("XXXXXXXXXX", token=token)


def test_a_refund_id_can_not_lead_to_another_path(hook, payroc, token) -> None:
    with pytest.raises(PayrocProblem):
        hook.get_refund("../x?a=b/#", token=token)
    assert payroc.seen[0].path == f"{PATH}/..%2Fx%3Fa%3Db%2F%23"


def test_a_reverse_posts_the_key_and_no_body(hook, payroc, reply, refund_body, token, key) -> None:
    refund_body["transactionResult"]["status"] = "reversal"
    payroc.on("POST", f"{PATH}/CD3HN88U9F/reverse", reply(200, refund_body))
    assert (
        hook.reverse_refund("CD3HN88U9F", idempotency_key=key, token=token).transaction_result.status
        == "reversal"
    )
    (request,) = payroc.seen
    assert (request.body, request.headers["content-length"], request.headers["idempotency-key"]) == (
        b"",
        "0",
        key,
    )
    assert "content-type" not in request.headers


# --- lists ----------------------------------------------------------------------------------------------------------------


def page(refunds: list, next_url: str | None = None, *, has_more: bool | None = None) -> dict[str, object]:
    links = [{"rel": "next", "method": "get", "href": next_url}] if next_url else []
    more = has_more if has_more is not None else next_url is not None
    return {"limit": 100, "count": len(refunds), "hasMore": more, "links": links, "data": refunds}


@pytest.fixture
def refunds(refund_body):
    return [refund_body | {"refundId": f"REFUND{number:04}"} for number in range(6)]


def test_a_list_follows_its_pages_and_carries_the_filters(hook, payroc, reply, refunds, token) -> None:
    payroc.on(
        "GET",
        PATH,
        reply(200, page(refunds[:2], f"{payroc.url}{PATH}?processingTerminalId=1234001&after=REFUND0001")),
        reply(200, page(refunds[2:4], f"{PATH}?processingTerminalId=1234001&after=REFUND0003")),
        reply(200, page(refunds[4:])),
    )
    zone = dt.timezone(dt.timedelta(hours=-5))
    got = hook.list_refunds(
        "1234001",
        order_id="OrderRef6543",
        status=["ready", "pending"],
        date_from=dt.datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=zone),
        date_to=dt.datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=zone),
        last4="7890",
        settlement_state="settled",
        token=token,
    )
    assert [refund.refund_id for refund in got] == [refund["refundId"] for refund in refunds]
    assert payroc.seen[0].query == [
        ("processingTerminalId", "1234001"),
        ("orderId", "OrderRef6543"),
        ("type", "unreferencedRefund"),
        ("status", "ready"),
        ("status", "pending"),
        ("dateFrom", "2026-01-02T08:04:05Z"),
        ("dateTo", "2026-01-02T08:04:06Z"),
        ("last4", "7890"),
        ("settlementState", "settled"),
        ("limit", "100"),
    ]
    assert [request.query[-1] for request in payroc.seen[1:]] == [
        ("after", "REFUND0001"),
        ("after", "REFUND0003"),
    ]


def test_a_list_asks_for_a_page_only_when_it_is_wanted(hook, payroc, reply, refunds, token) -> None:
    payroc.on("GET", PATH, reply(200, page(refunds, f"{PATH}?after=a")))
    got = hook.list_refunds("1234001", token=token)
    assert payroc.seen == []
    next(got)
    assert len(payroc.seen) == 1


def test_a_limit_ends_the_list_and_makes_the_page_smaller(hook, payroc, reply, refunds, token) -> None:
    payroc.on("GET", PATH, reply(200, page(refunds, f"{PATH}?after=a")))
    assert len(list(hook.list_refunds("1234001", limit=3, token=token))) == 3
    assert payroc.seen[0].query[-1] == ("limit", "3")
    assert len(payroc.seen) == 1


def test_an_empty_list_is_empty(hook, payroc, reply, token) -> None:
    payroc.on("GET", PATH, reply(200, page([])))
    assert list(hook.list_refunds("1234001", token=token)) == []


@pytest.mark.parametrize(
    "elsewhere",
    [
        "http://evil.invalid/v1/bank-transfer-refunds?after=a",
        "https://127.0.0.1/v1/bank-transfer-refunds?after=a",
        "//evil.invalid/v1/bank-transfer-refunds?after=a",
        "http://user@127.0.0.1/v1/bank-transfer-refunds",
        "/v1/bank-transfer-refunds/CD3HN88U9F?after=a",
        "/v1/authorize",
        "http://[::1",
        "file:///etc/passwd",
    ],
)
def test_a_link_that_leads_elsewhere_is_not_followed(hook, payroc, reply, refunds, token, elsewhere) -> None:
    payroc.on("GET", PATH, reply(200, page(refunds, elsewhere)))
    with pytest.raises(PayrocUnexpectedAnswer, match="leads elsewhere"):
        list(hook.list_refunds("1234001", token=token))
    assert len(payroc.seen) == 1


def test_pages_that_go_round_in_a_circle_are_found_out(hook, payroc, reply, refunds, token) -> None:
    payroc.on("GET", PATH, *[reply(200, page(refunds, f"{PATH}?after={cursor}")) for cursor in "abcab"])
    with pytest.raises(PayrocUnexpectedAnswer, match="circle"):
        list(hook.list_refunds("1234001", token=token))
    assert len(payroc.seen) == 4


def test_a_list_without_end_is_given_up(hook, payroc, reply, token, monkeypatch) -> None:
    monkeypatch.setattr("payroc_airflow.client.MAX_PAGES", 3)
    payroc.on("GET", PATH, *[reply(200, page([], f"{PATH}?after={cursor}")) for cursor in "abcdefg"])
    with pytest.raises(PayrocUnexpectedAnswer, match="did not end after 3 pages"):
        list(hook.list_refunds("1234001", token=token))
    assert len(payroc.seen) == 3


def test_a_list_that_promises_more_without_a_link_is_not_passed_off_as_whole(
    hook, payroc, reply, refunds, token
) -> None:
    payroc.on("GET", PATH, reply(200, page(refunds, has_more=True)))
    with pytest.raises(PayrocUnexpectedAnswer, match="no link to the next"):
        list(hook.list_refunds("1234001", token=token))


def test_one_odd_refund_hides_no_other_and_the_list_is_not_passed_off_as_whole(
    hook, payroc, reply, refunds, token
) -> None:
    del refunds[0]["transactionResult"]
    payroc.on(
        "GET",
        PATH,
        reply(200, page(refunds[:2], f"{payroc.url}{PATH}?processingTerminalId=1234001&after=REFUND0001")),
        reply(200, page(refunds[2:])),
    )
    listed = hook.list_refunds("1234001", token=token)
    assert [next(listed).refund_id for _ in refunds[1:]] == [refund["refundId"] for refund in refunds[1:]]
    with pytest.raises(
        PayrocIncompleteList, match=r"1 object \(refund REFUND0000\) can't be understood"
    ) as caught:
        next(listed)
    assert (caught.value.missing, caught.value.objects) == (1, ("refund REFUND0000",))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_odd_object_counts_for_the_limit_of_a_list(hook, payroc, reply, refunds, token) -> None:
    payroc.on("GET", PATH, reply(200, page([{}, *refunds], f"{PATH}?after=a")))
    listed = hook.list_refunds("1234001", limit=2, token=token)
    with pytest.raises(PayrocIncompleteList):
        list(listed)
    assert len(payroc.seen) == 1


def test_of_very_many_odd_objects_all_are_counted_and_the_first_are_named(hook, payroc, reply, token) -> None:
    payroc.on("GET", PATH, reply(200, page([{}] * 150, f"{PATH}?after=a")), reply(200, page([{}])))
    with pytest.raises(
        PayrocIncompleteList, match=r"^Payroc, list refunds: 151 objects \(object 1 of page 1,"
    ) as caught:
        list(hook.list_refunds("1234001", token=token))
    assert (caught.value.missing, len(caught.value.objects)) == (151, 100)
    assert str(caught.value).endswith("object 10 of page 1, 141 more) can't be understood (HTTP 200)")


@pytest.mark.parametrize(
    "arguments",
    [
        {"page_size": 0},
        {"page_size": 101},
        {"limit": 0},
        {"last4": "789"},
        {"date_from": dt.datetime(2026, 1, 1)},  # noqa: DTZ001
        {"date_to": dt.datetime(2026, 1, 1)},  # noqa: DTZ001
    ],
)
def test_an_argument_out_of_bounds_is_refused_before_anything_is_sent(hook, payroc, token, arguments) -> None:
    with pytest.raises(ValueError, match=r"."):
        hook.list_refunds("1234001", token=token, **arguments)
    assert payroc.seen == []


# --- authorize and the Test button ------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_with_the_key_and_without_a_body(hook, payroc, api_key) -> None:
    token = hook.get_token()
    assert token.access_token.get_secret_value() == "canary-token-1"
    (request,) = payroc.seen
    assert (request.method, request.path, request.body) == ("POST", "/authorize", b"")
    assert request.headers["x-api-key"] == api_key
    assert request.headers["content-length"] == "0"
    assert not {"authorization", "content-type", "idempotency-key"} & set(request.headers)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("as_problem", [True, False])
def test_a_refused_key_keeps_its_status(hook, payroc, reply, status, as_problem) -> None:
    payroc.on("POST", "/authorize", reply(status, problem("not-authorized", status) if as_problem else b"no"))
    with pytest.raises(PayrocProblem if as_problem else PayrocUnexpectedAnswer) as caught:
        hook.get_token()
    assert (caught.value.operation, caught.value.http_status) == ("authorize", status)


@pytest.mark.parametrize(
    "body",
    [
        {"access_token": "a", "expires_in": 0},
        {"access_token": "a", "expires_in": -5},
        {"access_token": "a", "expires_in": True},
        {"access_token": "a", "expires_in": "3600"},
        {"access_token": "", "expires_in": 3600},
        {"access_token": "two words", "expires_in": 3600},
        {"access_token": "with\nnewline", "expires_in": 3600},
        {"expires_in": 3600},
        [],
    ],
)
def test_an_odd_token_is_unexpected(hook, payroc, reply, body) -> None:
    payroc.on("POST", "/authorize", reply(200, body))
    with pytest.raises(PayrocUnexpectedAnswer):
        hook.get_token()


def test_a_token_that_would_live_longer_than_a_day_is_a_configuration_error(hook, payroc, reply) -> None:
    payroc.on("POST", "/authorize", reply(200, {"access_token": "long", "expires_in": 86401}))
    with pytest.raises(PayrocConfigurationError, match="24 hours"):
        hook.get_token()
    assert hook.test_connection()[0] is False


def test_the_test_button_tells_a_right_key_from_a_wrong_one(hook, payroc, reply) -> None:
    assert hook.test_connection() == (True, f"Payroc accepted the API key at {payroc.url}.")
    payroc.on("POST", "/authorize", reply(401, problem("not-authorized", 401), PROBLEM_JSON))
    ok, sentence = hook.test_connection()
    assert not ok
    assert (
        sentence
        == f"Payroc refused the API key (HTTP 401): copy the key again, and check that it belongs to {payroc.url}."
    )
    assert {request.path for request in payroc.seen} == {"/authorize"}


TOKEN = b'{"access_token": "a", "expires_in": 3600, "token_type": "Bearer"}'


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>Sign in</html>", "it is a web page or XML"),
        (gzip.compress(TOKEN), "it is compressed, which was not asked for"),
        (b"\xef\xbb\xbf" + TOKEN, "it begins with a byte order mark"),
        (TOKEN.replace(b"Bearer", b"mac"), "see token_type"),
        (TOKEN.replace(b'"expires_in"', b'"access_token": "b", "expires_in"'), "two members of one name"),
        (b"[]", "see the whole"),
        (b"3600", "see the whole"),
    ],
    ids=["web page", "gzip", "byte order mark", "another scheme", "two tokens", "list", "number"],
)
def test_the_test_button_takes_no_200_that_is_not_payrocs_token(hook, payroc, reply, body, why) -> None:
    payroc.on("POST", "/authorize", reply(200, body))
    ok, sentence = hook.test_connection()
    assert not ok
    assert why in sentence
    assert sentence.endswith(f"; asked {payroc.url}.")


def test_the_test_button_asks_payroc_and_not_the_cache(hook, payroc) -> None:
    hook.get_token()
    hook.test_connection()
    assert len(payroc.of("/authorize")) == 2


def test_the_test_button_names_what_stands_in_the_way(connect, monkeypatch) -> None:
    connect(host="http://127.0.0.1:9/v1", extra={"identity_url": "http://127.0.0.1:9"})
    assert PayrocHook().test_connection() == (False, "No answer from http://127.0.0.1:9: connection refused.")
    connect(host="http://payroc.example/v1", extra={"identity_url": "http://payroc.example"})
    ok, sentence = PayrocHook().test_connection()
    assert not ok
    assert sentence.startswith("This connection, host: is plain http")
    monkeypatch.delenv("AIRFLOW_CONN_PAYROC_DEFAULT")
    ok, sentence = PayrocHook().test_connection()
    assert not ok
    assert sentence.startswith("This connection is not defined")


# --- secrecy --------------------------------------------------------------------------------------------------------------


def test_nothing_secret_reaches_a_log_or_the_screen_even_at_debug(
    hook, payroc, reply, refund_body, api_key, key, caplog, capfd
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("aiohttp.client", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    payroc.on("POST", PATH, reply(201, refund_body), reply(400, problem("bad-request", 400), PROBLEM_JSON))
    payroc.on("GET", PATH, reply(200, page([refund_body])))
    token = hook.get_token()
    body = json.dumps(REQUEST).encode()
    hook.create_refund(body, idempotency_key=key, token=token)
    list(hook.list_refunds("1234001", order_id="OrderRef6543", token=token))
    with pytest.raises(PayrocError) as caught:
        hook.create_refund(body, idempotency_key=key, token=token)
    logging.getLogger("test").error("failed", exc_info=caught.value)
    hook.test_connection()
    shown = caplog.text + "".join(capfd.readouterr()) + repr(hook.__dict__) + repr(caught.value)
    assert "Payroc, create refund: bad-request (HTTP 400)" in shown
    for secret in (api_key, "canary-token-", CANARY, "Canary Payee"):
        assert secret not in shown


def test_the_key_and_each_token_are_masked_in_airflows_logs_as_soon_as_they_are_got(hook, api_key) -> None:
    from airflow.sdk._shared.secrets_masker import redact

    hook.test_connection()
    assert redact(f"x {api_key} y canary-token-1 z") == "x *** y *** z"


def test_the_password_of_a_proxy_is_masked(connect) -> None:
    from airflow.sdk._shared.secrets_masker import redact

    connect(extra={"proxy": "http://user:canary-of-the-proxy@proxy.example:3128"})
    assert PayrocHook().api_url
    assert redact("a canary-of-the-proxy b") == "a *** b"


def test_an_error_survives_a_pickle(create, payroc, reply) -> None:
    payroc.on("POST", PATH, reply(400, problem("bad-request", 400), PROBLEM_JSON))
    with pytest.raises(PayrocProblem) as caught:
        create()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
