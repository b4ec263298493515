"""
The settings: environment variables ``PAYROC_REFUNDS_…``, read once and checked.

An environment is written by many hands: ``.env`` files with CRLF, ``docker --env-file``, which keeps quotes,
shells, Kubernetes. What surrounds a value is left out where that is harmless, and refused where it is not.
"""

from __future__ import annotations

import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_PREFIX = "PAYROC_REFUNDS_"

OTHER_NAMES = ("LEDGER_URL", "SOURCE_URL", "DEMO_STATE", "DEMO_OWNER")
"""Names with the prefix that are no settings: the commands read the first two, the demo the others."""

DEFAULT_SOURCE = "refund_requests"

# Idempotency keys derive from one, payee fingerprints from the other: a repaired value would be another value.
_VERBATIM = ("source", "fingerprint_key")

_APPROVER = re.compile(r"""[^\s,;"'`()<>\[\]{}]{1,200}""")


# Payroc's schema: 4 to 50 characters.
_TERMINAL = re.compile(r"""[!#-&(-+\--~]{4,50}""")


class SettingsError(Exception):
    """A setting is missing or unusable; the message names the environment variable and what to do."""


class Settings(BaseSettings):
    """Settings of the project; each field's description gives its unit and reason."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    source: str = Field(
        DEFAULT_SOURCE,
        min_length=1,
        max_length=100,
        description="Fixed name of the source. Idempotency keys derive from it: never change it once "
        "refunds were sent. Production needs a name of your own, for two shops with one name "
        "and one Payroc account share their keys.",
    )
    schedule: str = Field(
        "0 7 * * 1-5", description="Cron of the refund run, in TIMEZONE. Empty means manual runs only."
    )
    followup_schedule: str = Field(
        "0 */2 * * 1-5",
        description="Cron of the follow-up, in TIMEZONE. ACH takes days, so two hours are enough. "
        "Empty means manual runs only.",
    )
    summary_schedule: str = Field(
        "0 18 * * 1-5",
        description="Cron of the daily summary, in TIMEZONE. Later events are in the next one. "
        "Empty means manual runs only.",
    )
    timezone: str = Field(
        "America/New_York",
        description="IANA time zone of all schedules; the ACH calendar runs on Eastern time.",
    )
    retries: int = Field(
        5,
        ge=0,
        le=50,
        description="Airflow retries of a task. The next run takes up the refunds that they do not finish.",
    )
    retry_delay_seconds: int = Field(
        60, ge=1, le=86_400, description="Seconds between tries when no outcome asks for another delay."
    )
    unknown_wait_seconds: int = Field(
        90,
        ge=1,
        le=86_400,
        description="Seconds before an unknown refund is sent again under its key, so that a POST in flight "
        "has ended at Payroc.",
    )
    key_window_days: float = Field(
        6,
        gt=0,
        le=6,
        description="Days after the first POST in which a key may be sent again. Payroc keeps keys for 7 "
        "days.",
    )
    lease_margin_seconds: int = Field(
        600,
        ge=5,
        le=86_400,
        description="Seconds by which a lease outlives its token, so that a POST sent on the token's last "
        "second has ended. At least three times HTTP_TIMEOUT_SECONDS.",
    )
    http_timeout_seconds: float = Field(
        30, gt=0, le=120, description="Seconds to connect, and seconds to wait for an answer from Payroc."
    )
    requests_in_flight: int = Field(
        32,
        ge=1,
        le=1000,
        description="Refunds that one worker host sends at a time; its tasks share them evenly, each has at "
        "least one. Fewer after a 429, until Payroc takes more again.",
    )
    requests_per_second: float | None = Field(
        None,
        ge=0.001,
        le=10_000,
        description="Refunds that one worker host begins to send in a second. Unset: no limit, for Payroc "
        "documents none.",
    )
    approval_timeout_hours: float = Field(
        8,
        gt=0,
        le=168,
        description="Hours in which an approver may answer. The wait ends earlier when the next scheduled "
        "run is due.",
    )
    approvers: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Ids of the Airflow users who may approve a run, with commas between them. "
        "Unset: everybody who may answer for the DAG.",
    )
    notifiers: SecretStr | None = Field(
        None,
        description="Who is notified of a run that needs someone, and of the daily summary: a JSON list of "
        "Airflow notifiers, each with the path of its class under notifier, and its arguments. "
        "Unset: nobody. It is read when there is something to notify of; a mistake in it is in "
        "the report, and stops no refund.",
    )
    deadline_hours: float = Field(
        4,
        ge=0,
        le=168,
        description="Hours from its due time after which a run of payroc_refunds that has not ended is "
        "notified of. 0: never.",
    )
    summary_folder: str | None = Field(
        None,
        description="Where the daily summaries are kept, as Airflow's object storage names it, such as "
        "file:///srv/summaries or s3://conn_id@bucket/summaries. Unset: the folder summaries in "
        "AIRFLOW_HOME.",
    )
    sec_code: Literal["ppd", "ccd"] = Field(
        "ppd",
        description="SEC code of rows that name none: ppd for payees who are consumers, ccd for businesses.",
    )
    terminals: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Payroc's ids of all terminals that ever paid refunds of this source, with commas between "
        "them. Their lists are read, too, so that a ledger which was lost finds what was paid "
        "through a terminal that no row names any more. Unset: those of the ledger's refunds.",
    )
    look_back_days: int = Field(
        180,
        ge=8,
        le=3650,
        description="Days back from which on the list of a terminal is read that this ledger never read. "
        "A lost ledger does not find older payments.",
    )
    allow_sec_web: bool = Field(
        False,
        description="Accept the SEC code web. As a credit it is for payments between consumers: ask your "
        "originating bank first.",
    )
    request_days: int = Field(
        30,
        ge=1,
        le=36_500,
        description="Days for which the encrypted request, with the payee's account, is kept after a refund "
        "has ended. Without it a refund can't be reissued.",
    )
    aba_checksum: bool = Field(
        True, description="Refuse routing numbers that fail the ABA checksum. Payroc's own samples fail it."
    )
    token_cache: bool = Field(
        True, description="Share tokens between the tasks of one host through an encrypted file."
    )
    token_cache_dir: Path | None = Field(
        None,
        description="Folder of that file, and of what the tasks of a host share to keep to their limits. It "
        "has to be the user's own, with rights 0700; else sending goes on without it. Unset: "
        "one in the temporary directory.",
    )
    encryption_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Fernet keys, with commas between them; the first encrypts, all decrypt."
    )
    encryption_keys_secret: str | None = Field(
        None,
        description="Name of those keys in Airflow's secrets backend, for deployments that hold no secrets "
        "in the environment.",
    )
    fingerprint_key: SecretStr | None = Field(
        None,
        description="Key of payee fingerprints and request hashes, at least 32 characters. Never rotated: "
        "old ones must stay comparable.",
    )
    fingerprint_key_secret: str | None = Field(
        None, description="Name of that key in Airflow's secrets backend."
    )

    @field_validator("source")
    @classmethod
    def _plain(cls, value: str) -> str:
        canonical = _bare(unicodedata.normalize("NFC", value))
        quoted = any(
            character in "\"'`" or unicodedata.category(character) in ("Pi", "Pf") for character in value
        )
        if value != canonical or quoted or not value.isprintable():
            raise ValueError(_PLAIN_NAME)
        return value

    @field_validator("fingerprint_key")
    @classmethod
    def _alone(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and value.get_secret_value() != _bare(value.get_secret_value()):
            raise ValueError("give the key alone, without quotes, line ends or blanks around it")
        return value

    @field_validator("encryption_keys", mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        return _parts(value) if isinstance(value, str) else value

    @field_validator("terminals", mode="before")
    @classmethod
    def _terminals(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        terminals = _parts(value)
        # None named must not look like all of them named.
        if not terminals or not all(_TERMINAL.fullmatch(each) for each in terminals):
            raise ValueError(
                "give Payroc's terminal ids with commas between them, such as 7701001,7701002, or leave it unset"
            )
        return terminals

    @field_validator("approvers", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        ids = _parts(value)
        # Nobody named must not become everybody.
        if not ids or not all(_APPROVER.fullmatch(each) and each.isprintable() for each in ids):
            raise ValueError(
                "give ids of Airflow users with commas between them, such as 2,3, "
                "or leave it unset for everybody who may answer for the DAG"
            )
        return ids

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (LookupError, ValueError, OSError):  # a folder of time zones is an OSError
            raise ValueError("give an IANA time zone such as America/New_York") from None
        return value

    # The last one here is the first to see a value.
    @field_validator("*", mode="before")
    @classmethod
    def _clean(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if isinstance(value, str) and name not in _VERBATIM:
            value = _bare(value)
        # An empty schedule has a meaning: manual runs only.
        if value == "" and not name.endswith("schedule"):
            return cls.model_fields[name].get_default()
        return value

    @model_validator(mode="after")
    def _lease_outlives_an_exchange(self) -> Self:
        # Connecting may take one time-out and the answer two: a POST of the token's last second has ended by then.
        if self.lease_margin_seconds < 3 * self.http_timeout_seconds:
            raise ValueError(_MARGIN_TOO_SHORT)
        return self


_PLAIN_NAME = (
    "give a name of up to 100 plain characters such as acme_refunds, "
    "without quotes, line ends or blanks at an end"
)
_MARGIN_TOO_SHORT = f"give at least three times {ENV_PREFIX}HTTP_TIMEOUT_SECONDS"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """
    Return the settings of this process.

    :raises SettingsError: when a name is unknown or a value unusable; the message names all of them.
    """
    sentences = _unknown_names()
    try:
        settings = read_settings()
    except SettingsError as error:
        sentences.append(str(error))
    if sentences:
        raise SettingsError(" ".join(sentences))
    return settings


def read_settings(**values: str) -> Settings:
    """
    Return the settings of the environment.

    :param values: by name, what takes the place of what the environment says.
    :raises SettingsError: when a value is unusable; the message names all of them, and quotes none.
    """
    try:
        return Settings(**values)  # type: ignore[arg-type]  # text, as in an environment
    except ValidationError as error:
        sentences = _sentences(error)
    raise SettingsError(" ".join(sentences))


def check_names() -> None:
    """
    Refuse names with our prefix that nothing reads: a misspelled setting must not silently keep its default.

    :raises SettingsError: names each unknown variable and the nearest known one.
    """
    if sentences := _unknown_names():
        raise SettingsError(" ".join(sentences))


def _unknown_names() -> list[str]:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in (*Settings.model_fields, *OTHER_NAMES)}
    # Names in lower case included: with both spellings set it would be chance which of them counts.
    unknown = sorted(
        name for name in os.environ if name[: len(ENV_PREFIX)].upper() == ENV_PREFIX and name not in known
    )
    if not unknown:
        return []
    from difflib import get_close_matches  # needed for the sentence only

    return [
        f"{ascii(name[:60])[1:-1]} is not a setting; the nearest is "
        f"{get_close_matches(name[:60].upper(), sorted(known), n=1, cutoff=0)[0]}. Rename or remove it."
        for name in unknown[:20]
    ]


def _sentences(error: ValidationError) -> list[str]:
    """Return a sentence for each unusable setting, without its value: that may be a secret."""
    advice: dict[str, str] = {}
    for found in error.errors(include_input=False, include_url=False):
        # Only the check of two settings together has no place of its own.
        name = str(found["loc"][0]) if found["loc"] else "lease_margin_seconds"
        ours = found["type"] == "value_error" and found["msg"].removeprefix("Value error, ")
        advice.setdefault(name, ours or _expected(name))
    return [f"{ENV_PREFIX}{name.upper()} is not usable; {what}." for name, what in advice.items()]


def _expected(name: str) -> str:
    """Return what to give for a setting, from its type and bounds."""
    if name == "source":
        return _PLAIN_NAME
    schema = Settings.model_json_schema()["properties"][name]
    # Of an optional setting the first alternative is the one that is not unset.
    schema = schema.get("anyOf", [schema])[0]
    if "enum" in schema:
        return f"give {' or '.join(schema['enum'])}"
    if schema["type"] == "boolean":
        return "give true or false"
    if schema["type"] not in ("integer", "number"):
        return "give text in UTF-8"
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    if "exclusiveMinimum" in schema:
        return f"give {kind} above {schema['exclusiveMinimum']:g} and up to {schema['maximum']:g}"
    return f"give {kind} from {schema['minimum']:g} to {schema['maximum']:g}"


def _bare(text: str) -> str:
    """Return a text without white space, a BOM and one pair of quotes around it."""
    text = text.strip().strip("\ufeff").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1].strip()
    return text


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
