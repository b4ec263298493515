"""The settings: environment variables ``PAYROC_REFUNDS_…``, read once, checked with one clear sentence each."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_PREFIX = "PAYROC_REFUNDS_"


class SettingsError(Exception):
    """A setting is missing or unusable; the message names the environment variable and what to do."""


class Settings(BaseSettings):
    """Settings of the project; each field's description gives its unit and reason."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    source: str = Field(
        "refund_requests",
        min_length=1,
        max_length=100,
        description="Fixed name of the source. Idempotency keys are derived from it: never change it once refunds were sent.",
    )
    schedule: str = Field(
        "0 7 * * 1-5", description="Cron of the refund run, in TIMEZONE. Empty means manual runs only."
    )
    followup_schedule: str = Field(
        "0 */2 * * 1-5",
        description="Cron of the follow-up. ACH moves in days, two hours are soon enough. Empty means manual runs only.",
    )
    summary_schedule: str = Field(
        "0 18 * * 1-5",
        description="Cron of the daily summary. What happens after it is told in the next. Empty means manual runs only.",
    )
    timezone: str = Field(
        "America/New_York",
        description="IANA time zone of all schedules; the ACH calendar runs on Eastern time.",
    )
    retries: int = Field(
        5,
        ge=0,
        le=50,
        description="Airflow retries of a send task. What they do not finish, the next run does.",
    )
    retry_delay_seconds: int = Field(
        60, ge=1, description="Seconds between tries when no outcome asks for another delay."
    )
    unknown_wait_seconds: int = Field(
        90,
        ge=1,
        description="Seconds before an unknown refund is sent again under its key, so that a POST in flight has ended at Payroc.",
    )
    key_window_days: float = Field(
        6,
        gt=0,
        le=6,
        description="Days after the first POST in which a key may be sent again. Payroc keeps keys for 7; this can only be lowered.",
    )
    lease_margin_seconds: int = Field(
        600,
        ge=5,
        description="Seconds by which a lease outlives its token, so that a POST sent on the token's last second has ended.",
    )
    http_timeout_seconds: float = Field(
        30, gt=0, le=120, description="Seconds to connect, and seconds to wait for an answer from Payroc."
    )
    requests_in_flight: int = Field(
        32,
        ge=1,
        le=1000,
        description="Refunds under way to Payroc at a time from one worker host; its tasks share them evenly, each has at least one. "
        "Fewer after a 429, until Payroc takes more again.",
    )
    requests_per_second: float | None = Field(
        None,
        gt=0,
        description="Refunds that one worker host begins to send in a second. Unset: no limit, for Payroc documents none.",
    )
    approval_timeout_hours: float = Field(
        8,
        gt=0,
        le=168,
        description="Hours in which a person may approve a run. The wait ends earlier when the next scheduled run is due.",
    )
    approvers: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Ids of the Airflow users who may approve a run, comma-separated. Unset: everybody who may answer for the DAG.",
    )
    notifiers: SecretStr | None = Field(
        None,
        description="Who is told of a run that needs people, and of the daily summary: a JSON list of Airflow notifiers, each with the "
        "path of its class under notifier, and its arguments. Unset: nobody. It is read when there is something to tell; a mistake in it "
        "is told by the report, and stops no refund.",
    )
    deadline_hours: float = Field(
        4,
        ge=0,
        le=168,
        description="Hours after which people are told that a run of payroc_refunds has not ended, from when it was due. 0: never.",
    )
    summary_folder: str | None = Field(
        None,
        description="Where the daily summaries are kept, as Airflow's object storage names it, such as file:///srv/summaries or "
        "s3://conn_id@bucket/summaries. Unset: the folder summaries in AIRFLOW_HOME.",
    )
    sec_code: Literal["ppd", "ccd"] = Field(
        "ppd",
        description="SEC code of rows that name none: ppd for payees who are consumers, ccd for businesses.",
    )
    allow_sec_web: bool = Field(
        False,
        description="Accept the SEC code web. As a credit it is for payments between consumers: ask your originating bank first.",
    )
    request_days: int = Field(
        30,
        ge=1,
        description="Days for which the encrypted request, with the payee's account, is kept after a refund has ended. "
        "Without it a refund can't be reissued.",
    )
    aba_checksum: bool = Field(
        True, description="Refuse routing numbers that fail the ABA checksum. Payroc's own samples fail it."
    )
    token_cache: bool = Field(
        True, description="Share tokens between the tasks of one host through an encrypted file."
    )
    token_cache_dir: Path | None = Field(
        None,
        description="Folder of that file. Unset: a folder with owner-only rights in the temporary directory.",
    )
    encryption_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Fernet keys, comma-separated; the first encrypts, all decrypt."
    )
    encryption_keys_secret: str | None = Field(
        None,
        description="Name of those keys in Airflow's secrets backend, for deployments that hold no secrets in the environment.",
    )
    fingerprint_key: SecretStr | None = Field(
        None,
        description="Key of payee fingerprints and request hashes, at least 32 characters. Never rotated: old ones must stay comparable.",
    )
    fingerprint_key_secret: str | None = Field(
        None, description="Name of that key in Airflow's secrets backend."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any, info: ValidationInfo) -> Any:
        # An empty schedule says something: manual runs only.
        if value == "" and info.field_name is not None and not info.field_name.endswith("schedule"):
            return cls.model_fields[info.field_name].get_default()
        return value

    @field_validator("encryption_keys", "approvers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @model_validator(mode="after")
    def _lease_outlives_an_exchange(self) -> Self:
        # Connecting may take one time-out and the whole answer two; a POST of the token's last second must have ended by then.
        if self.lease_margin_seconds < 3 * self.http_timeout_seconds:
            raise ValueError("LEASE_MARGIN_SECONDS must be at least three times HTTP_TIMEOUT_SECONDS")
        return self

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (LookupError, ValueError, OSError):  # a folder of time zones is an OSError
            raise ValueError("is not an IANA time zone such as America/New_York") from None
        return value


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """
    Return the settings of this process.

    :raises SettingsError: when a variable has an unusable value.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        variable = f"{ENV_PREFIX}{first['loc'][0]}".upper() if first["loc"] else f"{ENV_PREFIX}…"
        raise SettingsError(
            f"Environment variable {variable} is not usable: {first['msg'].removeprefix('Value error, ')}."
        ) from None
