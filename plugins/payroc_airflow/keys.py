"""The keys of the ledger, from the environment or from Airflow's secrets backend; never from a database."""

from __future__ import annotations

from airflow.sdk.configuration import get_custom_secret_backend
from airflow.sdk.log import mask_secret

from include.refunds.cipher import Cipher
from include.refunds.settings import ENV_PREFIX, Settings, SettingsError, read_settings

_KEYS = ("encryption_keys", "fingerprint_key")


def cipher_of(settings: Settings) -> Cipher:
    """
    Return the cipher of the ledger's requests.

    A key that the environment does not hold is asked for in the secrets backend, under the name that
    ``PAYROC_REFUNDS_ENCRYPTION_KEYS_SECRET`` or ``PAYROC_REFUNDS_FINGERPRINT_KEY_SECRET`` gives, as an option of Airflow's own
    configuration would be (``get_config``). Airflow's database is no such backend.

    :param settings: the settings; a key in them wins over one in the backend.
    :raises SettingsError: when a key is missing, malformed, or not in the backend.
    """
    names = {
        key: name
        for key in _KEYS
        if not getattr(settings, key) and (name := getattr(settings, f"{key}_secret"))
    }
    if not names:
        return Cipher(settings)
    found = {key: _from_backend(name, f"{ENV_PREFIX}{key}_SECRET".upper()) for key, name in names.items()}
    try:
        settings = read_settings(**found)
    except SettingsError as error:
        raise SettingsError(f"{error} It is in Airflow's secrets backend.") from None
    return Cipher(settings)


def _from_backend(name: str, variable: str) -> str:
    try:
        backend = get_custom_secret_backend(worker_mode=True)
        value = None if backend is None else backend.get_config(name)
    except Exception as error:  # noqa: BLE001 - a backend may raise anything, and its text may quote a secret
        raise SettingsError(
            f"Airflow's secrets backend failed ({type(error).__name__}) when it was asked for {name!r}, which {variable} names."
        ) from None
    if backend is None:
        raise SettingsError(
            f"{variable} names a secret, but Airflow has no secrets backend: set AIRFLOW__SECRETS__BACKEND, or the key itself."
        )
    if not value:
        raise SettingsError(
            f"Airflow's secrets backend has no {name!r}, which {variable} names: store the key there."
        )
    for key in str(value).split(","):
        mask_secret(key.strip())
    return str(value)
