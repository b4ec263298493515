"""What an Airflow connection of type ``payroc`` says, checked before anything is sent."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from yarl import URL

from include.payroc.errors import PayrocConfigurationError
from include.payroc.hosts import HOSTS
from payroc_airflow.trust import NoCertificates, trusted

if TYPE_CHECKING:
    from airflow.sdk import Connection

log = logging.getLogger(__name__)

PRODUCTION_HOSTS = frozenset(urlsplit(url).hostname for url in HOSTS["production"])

EXTRAS = ("environment", "identity_url", "allow_http", "proxy", "ca_bundle")

PORTS = {"http": 80, "https": 443}

_VISIBLE_ASCII = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class PayrocConnection:
    """
    Where Payroc is and how we may reach it.

    :param api_url: API base URL with its path, without a slash at its end.
    :param identity_url: base URL of the identity service, without a slash at its end.
    :param api_key: the API key.
    :param proxy: URL of a proxy for both, ``None`` for a direct way.
    :param ca_bundle: file or folder of trusted certificates, ``None`` for the usual ones.
    """

    api_url: str
    identity_url: str
    api_key: str = field(repr=False)
    proxy: str | None = field(default=None, repr=False)
    ca_bundle: str | None = None

    @property
    def sent_with(self) -> str:
        """SHA-256 of API URL and API key, in hex. API keys are long and random, so the hash does not give them away."""
        return hashlib.sha256(f"{self.api_url}\0{self.api_key}".encode()).hexdigest()


def read_connection(connection: Connection) -> PayrocConnection:
    """
    Read an Airflow connection.

    The password is the API key. Extra ``environment`` (``uat``, the default, or ``production``) gives both hosts; any other pair
    is ``host`` (the API base URL with its path) and extra ``identity_url``. Airflow's URI and form split a URL over host,
    schema and port: it is put together again. Extras never become HTTP headers; unknown ones are named in the log and ignored.

    :raises PayrocConfigurationError: names the connection, the field and the remedy.
    """
    return _Reader(connection).read()


class _Reader:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.extra = self._extra()

    def read(self) -> PayrocConnection:
        api_url, identity_url = self._urls()
        return PayrocConnection(
            api_url=api_url,
            identity_url=identity_url,
            api_key=self._api_key(),
            proxy=self._proxy(),
            ca_bundle=self._ca_bundle(),
        )

    def refuse(self, field_name: str, sentence: str) -> NoReturn:
        raise PayrocConfigurationError(
            f"Airflow connection {self.connection.conn_id!r}, {field_name}: {sentence}"
        )

    def _extra(self) -> dict[str, Any]:
        text = self.connection.extra
        if not text:
            return {}
        try:
            extra = json.loads(text)
        except ValueError:
            self.refuse("extra", 'is not JSON; write an object such as {"environment": "uat"}.')
        if not isinstance(extra, dict):
            self.refuse("extra", 'must be a JSON object such as {"environment": "uat"}.')
        # Airflow's form sends an untouched field as null or as empty text.
        extra = {name: value for name, value in extra.items() if value not in (None, "")}
        if unknown := sorted(name for name in extra if name not in EXTRAS):
            log.warning(
                "Airflow connection %r: unknown extras are ignored (%s); known are %s.",
                self.connection.conn_id,
                ", ".join(name[:40] for name in unknown[:10]),
                ", ".join(EXTRAS),
            )
        return extra

    def _text(self, name: str) -> str | None:
        value = self.extra.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self.refuse(f"extra {name}", "must be text.")
        return value.strip() or None

    def _api_key(self) -> str:
        key = self.connection.password
        if not key:
            self.refuse("password", "is empty; put Payroc's API key there.")
        if not _VISIBLE_ASCII.fullmatch(key):
            self.refuse(
                "password", "holds white space or characters that no API key has; copy the key again."
            )
        return key

    def _urls(self) -> tuple[str, str]:
        environment = self._text("environment")
        host = self._host()
        identity_url = self._text("identity_url")
        if environment is not None and environment not in HOSTS:
            self.refuse("extra environment", f"must be one of {', '.join(HOSTS)}.")
        if host is None and identity_url is None:
            return HOSTS[environment or "uat"]
        if environment is not None:
            self.refuse(
                "extra environment",
                "gives both hosts already; remove it, or remove host and extra identity_url.",
            )
        if host is None:
            self.refuse("host", "is empty but extra identity_url is set; a custom Payroc needs both.")
        if identity_url is None:
            self.refuse("extra identity_url", "is empty but host is set; a custom Payroc needs both.")
        return self._base_url("host", host), self._base_url("extra identity_url", identity_url)

    def _host(self) -> str | None:
        """Put together what a URI or the form has split: the schema field is a scheme there, or the path."""
        host = (self.connection.host or "").strip()
        schema = (self.connection.schema or "").strip()
        port = self.connection.port
        if not host:
            if port:
                self.refuse("port", "is set but host is empty; host is the API base URL.")
            if schema not in ("", *PORTS):
                self.refuse("schema", "is set but host is empty; host is the API base URL.")
            return None
        if "://" not in host:
            host = f"{schema if schema in PORTS else 'https'}://{host}"
        scheme, _, rest = host.partition("://")
        netloc, slash, path = rest.partition("/")
        if port and not re.search(r":\d+$", netloc):
            netloc = f"{netloc}:{port}"
        if schema and schema not in PORTS:
            path, slash = f"{path.rstrip('/')}/{schema.lstrip('/')}".lstrip("/"), "/"
        return f"{scheme}://{netloc}{slash}{path}"

    def _base_url(self, field_name: str, url: str) -> str:
        try:
            parts = urlsplit(url)
            scheme, hostname, port = parts.scheme.lower(), parts.hostname, parts.port
        except ValueError:
            self.refuse(field_name, "is not a URL.")
        if scheme not in PORTS or not hostname or not _VISIBLE_ASCII.fullmatch(url):
            self.refuse(field_name, "must be a URL such as https://api.uat.payroc.com/v1.")
        if parts.username is not None or parts.query or parts.fragment:
            self.refuse(
                field_name,
                "must be a base URL without user, query or fragment; the API key goes into the password.",
            )
        hostname = hostname.rstrip(".")
        if hostname in PRODUCTION_HOSTS:
            self.refuse(
                field_name,
                "names Payroc's production; remove the URLs and set extra environment to production.",
            )
        if scheme == "http" and not _is_loopback(hostname) and not self._allow_http():
            self.refuse(
                field_name,
                "is plain http, which shows the API key to the network; use https, or set extra allow_http to true.",
            )
        netloc = f"[{hostname}]" if ":" in hostname else hostname
        if port is not None and port != PORTS[scheme]:
            netloc = f"{netloc}:{port}"
        return f"{scheme}://{netloc}{parts.path.rstrip('/')}"

    def _allow_http(self) -> bool:
        value = self.extra.get("allow_http", False)
        # A URI has only text.
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            self.refuse("extra allow_http", "must be true or false.")
        return value

    def _proxy(self) -> str | None:
        proxy = self._text("proxy")
        if proxy is None:
            return None
        try:
            parts = urlsplit(proxy)
            usable = parts.scheme in PORTS and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            # As the transport will read it.
            usable = usable and _VISIBLE_ASCII.fullmatch(proxy) is not None and bool(URL(proxy).host)
        except ValueError:
            usable = False
        if not usable:
            self.refuse("extra proxy", "must be a URL such as http://proxy.example:3128.")
        return proxy

    def _ca_bundle(self) -> str | None:
        path = self._text("ca_bundle")
        if path is not None:
            try:
                trusted(path)
            except NoCertificates as error:
                self.refuse("extra ca_bundle", f"{path} {error}")
        return path


def _is_loopback(hostname: str) -> bool:
    if hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return False
