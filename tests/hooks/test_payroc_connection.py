"""What the hook makes of an Airflow connection, in each form that Airflow stores one."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from urllib.parse import quote

import pytest
from airflow.sdk import Connection
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from include.payroc.errors import PayrocConfigurationError
from payroc_airflow.connection import read_connection
from payroc_airflow.hooks.payroc import PayrocHook

PAIR = {"host": "http://127.0.0.1:8089/v1", "extra": {"identity_url": "http://127.0.0.1:8089"}}


def urls() -> tuple[str, str]:
    hook = PayrocHook()
    return hook.api_url, hook.identity_url


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, ("https://api.uat.payroc.com/v1", "https://identity.uat.payroc.com")),
        ({"environment": "uat"}, ("https://api.uat.payroc.com/v1", "https://identity.uat.payroc.com")),
        ({"environment": "production"}, ("https://api.payroc.com/v1", "https://identity.payroc.com")),
        # Airflow's form stores untouched fields like this.
        (
            {"environment": "", "identity_url": None, "allow_http": False, "proxy": None, "ca_bundle": ""},
            ("https://api.uat.payroc.com/v1", "https://identity.uat.payroc.com"),
        ),
    ],
)
def test_the_environment_gives_both_hosts_and_uat_is_the_default(connect, extra, expected) -> None:
    connect(extra=extra)
    assert urls() == expected


@pytest.mark.parametrize(
    ("parts", "api_url"),
    [
        ({"host": "http://127.0.0.1:8089/v1"}, "http://127.0.0.1:8089/v1"),
        ({"host": "http://127.0.0.1:8089/v1/"}, "http://127.0.0.1:8089/v1"),
        ({"host": "HTTP://LocalHost:8089/v1"}, "http://localhost:8089/v1"),
        ({"host": "http://[::1]:8089/v1"}, "http://[::1]:8089/v1"),
        ({"host": "https://payroc.example:443/v1"}, "https://payroc.example/v1"),
        ({"host": "payroc.example/v1"}, "https://payroc.example/v1"),
        # As the form splits it.
        ({"host": "127.0.0.1", "schema": "http", "port": 8089}, "http://127.0.0.1:8089"),
        ({"host": "127.0.0.1/v1", "schema": "http", "port": 8089}, "http://127.0.0.1:8089/v1"),
        ({"host": "http://127.0.0.1", "schema": "v1", "port": 8089}, "http://127.0.0.1:8089/v1"),
        ({"host": "payroc.example", "schema": "v1"}, "https://payroc.example/v1"),
    ],
)
def test_a_host_is_put_together_from_the_fields_that_hold_its_parts(connect, parts, api_url) -> None:
    connect(**parts, extra={"identity_url": "http://127.0.0.1:8089"})
    assert urls() == (api_url, "http://127.0.0.1:8089")


def test_a_uri_says_the_same_as_json(connect, api_key) -> None:
    connect(**PAIR)
    from_json = PayrocHook()
    identity = quote("http://127.0.0.1:8089", safe="")
    connect(f"payroc://http://:{api_key}@127.0.0.1:8089/v1?identity_url={identity}", conn_id="as_uri")
    from_uri = PayrocHook(payroc_conn_id="as_uri")
    assert (from_uri.api_url, from_uri.identity_url, from_uri.sent_with) == (
        from_json.api_url,
        from_json.identity_url,
        from_json.sent_with,
    )


@pytest.mark.parametrize(
    "parts",
    [
        PAIR,
        {"extra": {"environment": "production"}},
        {"host": "payroc.example/v1", "extra": {"identity_url": "https://i.example"}},
    ],
)
def test_a_connection_survives_airflows_own_uri_form(parts, api_key) -> None:
    one = Connection.from_json(json.dumps({"conn_type": "payroc", "password": api_key, **parts}), conn_id="a")
    assert read_connection(Connection.from_uri(one.get_uri(), conn_id="a")) == read_connection(one)


def test_a_uri_with_only_a_key_and_an_environment_is_enough(connect, api_key) -> None:
    connect(f"payroc://:{api_key}@/?environment=production")
    assert urls()[0] == "https://api.payroc.com/v1"


@pytest.mark.parametrize(
    ("parts", "field", "words"),
    [
        ({"password": None}, "password", "is empty"),
        ({"password": ""}, "password", "is empty"),
        ({"password": " canary-password"}, "password", "white space"),
        ({"password": "canary-password\n"}, "password", "white space"),
        ({"password": "canary-pässword"}, "password", "characters that no API key has"),
        ({"extra": {"environment": "prod"}}, "extra environment", "must be one of uat, production"),
        ({"extra": {"environment": 1}}, "extra environment", "must be text"),
        ({"host": "http://127.0.0.1:8089/v1"}, "extra identity_url", "is empty but host is set"),
        (
            {"extra": {"identity_url": "http://127.0.0.1:8089"}},
            "host",
            "is empty but extra identity_url is set",
        ),
        (
            PAIR | {"extra": {"identity_url": "http://127.0.0.1:8089", "environment": "production"}},
            "extra environment",
            "both hosts already",
        ),
        (
            PAIR | {"extra": {"identity_url": "http://127.0.0.1:8089", "environment": "uat"}},
            "extra environment",
            "both hosts already",
        ),
        (
            {"host": "https://api.payroc.com/v1", "extra": {"identity_url": "https://i.example"}},
            "host",
            "production",
        ),
        (
            {"host": "https://API.PAYROC.COM./v1", "extra": {"identity_url": "https://i.example"}},
            "host",
            "production",
        ),
        (
            {"host": "https://a.example", "extra": {"identity_url": "https://identity.payroc.com"}},
            "extra identity_url",
            "production",
        ),
        (
            {"host": "http://a.example/v1", "extra": {"identity_url": "https://i.example"}},
            "host",
            "plain http",
        ),
        (
            {"host": "https://a.example/v1", "extra": {"identity_url": "http://i.example"}},
            "extra identity_url",
            "plain http",
        ),
        (
            {"host": "http://localhost.example/v1", "extra": {"identity_url": "http://localhost"}},
            "host",
            "plain http",
        ),
        (
            {"host": "http://127.0.0.1.example/v1", "extra": {"identity_url": "http://localhost"}},
            "host",
            "plain http",
        ),
        (
            {
                "host": "http://a.example/v1",
                "extra": {"identity_url": "http://i.example", "allow_http": "no"},
            },
            "extra allow_http",
            "true or false",
        ),
        (
            {"host": "ftp://a.example/v1", "extra": {"identity_url": "https://i.example"}},
            "host",
            "must be a URL",
        ),
        ({"host": "https:///v1", "extra": {"identity_url": "https://i.example"}}, "host", "must be a URL"),
        (
            {"host": "https://a b.example/v1", "extra": {"identity_url": "https://i.example"}},
            "host",
            "must be a URL",
        ),
        ({"host": "https://[::1/v1", "extra": {"identity_url": "https://i.example"}}, "host", "is not a URL"),
        (
            {"host": "https://a.example:x/v1", "extra": {"identity_url": "https://i.example"}},
            "host",
            "is not a URL",
        ),
        (
            {"host": "https://canary-password@a.example/v1", "extra": {"identity_url": "https://i.example"}},
            "host",
            "without user",
        ),
        (
            {
                "host": "https://a.example/v1?k=canary-password",
                "extra": {"identity_url": "https://i.example"},
            },
            "host",
            "without user",
        ),
        (
            {"host": "https://a.example/v1", "extra": {"identity_url": {"canary-password": 1}}},
            "extra identity_url",
            "must be text",
        ),
        ({"port": 8089}, "port", "host is empty"),
        ({"schema": "v1"}, "schema", "host is empty"),
        ({"extra": "canary-password"}, "extra", "is not JSON"),
        ({"extra": '["canary-password"]'}, "extra", "JSON object"),
        ({"extra": {"proxy": "canary-password:3128"}}, "extra proxy", "must be a URL"),
        ({"extra": {"proxy": "http://proxy.example:x"}}, "extra proxy", "must be a URL"),
        ({"extra": {"proxy": "http://canary-password proxy:3128"}}, "extra proxy", "must be a URL"),
        ({"extra": {"proxy": "http://pröxy.example:3128"}}, "extra proxy", "must be a URL"),
        ({"extra": {"proxy": "http://:3128"}}, "extra proxy", "must be a URL"),
        ({"extra": {"proxy": "socks5://canary-password@proxy.example"}}, "extra proxy", "must be a URL"),
        ({"extra": {"ca_bundle": "/no/such/file.pem"}}, "extra ca_bundle", "does not exist"),
        ({"extra": {"ca_bundle": "/dev/zero"}}, "extra ca_bundle", "neither a file nor a folder"),
        ({"extra": {"ca_bundle": "/proc/self/mem"}}, "extra ca_bundle", "can't be read"),
    ],
)
def test_a_connection_that_can_not_be_used_is_named_with_its_field_and_the_remedy(
    connect, parts, field, words
) -> None:
    connect(conn_id="my_payroc", **parts)
    with pytest.raises(PayrocConfigurationError) as caught:
        _ = PayrocHook(payroc_conn_id="my_payroc").api_url
    sentence = str(caught.value)
    assert sentence.startswith(f"Airflow connection 'my_payroc', {field}: ")
    assert words in sentence
    assert "canary-password" not in sentence


def certificate() -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "a test")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + dt.timedelta(days=1)
    )
    return builder.sign(key, hashes.SHA256())


PEM = certificate().public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>Sign in</html>",
        certificate().public_bytes(serialization.Encoding.DER),
        PEM + b"-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n",
        PEM.replace(b"CERTIFICATE", b"PRIVATE KEY"),
    ],
    ids=["empty", "HTML", "DER", "the second one broken", "a key"],
)
def test_a_ca_bundle_without_certificates_is_named_before_anything_is_sent(
    connect, tmp_path, content
) -> None:
    (tmp_path / "ca.pem").write_bytes(content)
    connect(extra={"ca_bundle": str(tmp_path / "ca.pem")})
    with pytest.raises(
        PayrocConfigurationError,
        match=r"'payroc_default', extra ca_bundle: .* holds no certificate in PEM form",
    ):
        PayrocHook().get_token()


def test_a_ca_bundle_may_be_a_folder_of_certificates_named_by_their_hash(connect, tmp_path) -> None:
    connect(extra={"ca_bundle": str(tmp_path)})
    with pytest.raises(PayrocConfigurationError, match="run `openssl rehash` on this folder"):
        _ = PayrocHook().api_url
    (tmp_path / "ca.pem").write_bytes(PEM)
    (tmp_path / "0a1b2c3d.0").write_bytes(b"<html>")
    with pytest.raises(PayrocConfigurationError, match="run `openssl rehash` on this folder"):
        _ = PayrocHook().api_url
    (tmp_path / "0a1b2c3d.1").write_bytes(PEM)
    assert PayrocHook().api_url


@pytest.mark.parametrize("allow", [True, "true", "True"])
def test_plain_http_to_another_host_needs_permission(connect, allow) -> None:
    connect(host="http://a.example/v1", extra={"identity_url": "http://i.example", "allow_http": allow})
    assert urls() == ("http://a.example/v1", "http://i.example")


@pytest.mark.parametrize("text", [None, "{not json", "payroc://a://b://canary-password@c"])
def test_a_missing_or_unreadable_connection_is_a_configuration_error(connect, text) -> None:
    if text is not None:
        connect(text, conn_id="my_payroc")
    with pytest.raises(
        PayrocConfigurationError, match="Airflow connection 'my_payroc' is not defined or can't be read"
    ) as caught:
        _ = PayrocHook(payroc_conn_id="my_payroc").sent_with
    assert "canary-password" not in str(caught.value)


def test_sent_with_is_the_hash_of_api_url_and_key(connect, api_key) -> None:
    connect()
    assert (
        PayrocHook().sent_with
        == hashlib.sha256(b"https://api.uat.payroc.com/v1\0" + api_key.encode()).hexdigest()
    )


def test_sent_with_changes_with_the_key_and_with_the_host(connect) -> None:
    hashes = set()
    for parts in ({}, {"password": "another-key-of-theirs"}, {"extra": {"environment": "production"}}):
        connect(**parts)
        hashes.add(PayrocHook().sent_with)
    assert len(hashes) == 3


def test_a_connection_does_not_show_its_key_or_its_proxy(connect, api_key) -> None:
    connect(extra={"proxy": "http://user:canary-password@proxy.example:3128"})
    hook = PayrocHook()
    assert hook.api_url
    assert api_key not in repr(hook.__dict__)
    assert "canary-password" not in repr(hook.__dict__)
