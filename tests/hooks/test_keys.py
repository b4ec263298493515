"""The ledger's keys from Airflow's secrets backend."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from airflow.sdk.log import _secrets_masker
from sqlalchemy import URL

from include.refunds.cipher import Cipher
from include.refunds.keys import key_id
from include.refunds.settings import Settings, SettingsError, get_settings
from payroc_airflow.keys import cipher_of
from tests.dags.conftest import Runner, everything_that_airflow_kept
from tests.dags.conftest import run_dag as run_dag
from tests.refunds.conftest import World
from tests.refunds.conftest import world as world
from tests.refunds.test_cli import cli

KEYS = {
    "refunds/encryption": "bmV3LWZlcm5ldC1rZXktb2YtdGhlLXRlc3RzLS0tLSE=,bGVkZ2VyLWZlcm5ldC1rZXktb2YtdGhlLXRlc3RzISE=",
    "refunds/fingerprint": "fingerprint key of the tests, never rotated",
}
NAMES = {
    "PAYROC_REFUNDS_ENCRYPTION_KEYS_SECRET": "refunds/encryption",
    "PAYROC_REFUNDS_FINGERPRINT_KEY_SECRET": "refunds/fingerprint",
}
BACKEND = """
from airflow.secrets import BaseSecretsBackend

class Vault(BaseSecretsBackend):
    def __init__(self, **kept):
        self.kept = kept

    def get_config(self, key):
        return self.kept.get(key)
"""


def backend(folder: Path, section: str, kept: dict[str, str]) -> dict[str, str]:
    """Return the environment in which Airflow has a secrets backend that keeps these."""
    (folder / "vault_of_the_tests.py").write_text(BACKEND)
    prefix = "AIRFLOW__WORKERS__SECRETS_BACKEND" if section == "workers" else "AIRFLOW__SECRETS__BACKEND"
    return {prefix: "vault_of_the_tests.Vault", f"{prefix}_KWARGS": json.dumps(kept)}


@pytest.fixture
def vault(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys in a backend and none in the environment."""
    monkeypatch.syspath_prepend(str(tmp_path))
    # For processes that a test starts.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    monkeypatch.delenv("PAYROC_REFUNDS_ENCRYPTION_KEYS")
    monkeypatch.delenv("PAYROC_REFUNDS_FINGERPRINT_KEY")
    for name, value in (NAMES | backend(tmp_path, getattr(request, "param", "secrets"), KEYS)).items():
        monkeypatch.setenv(name, value)
    yield
    sys.modules.pop("vault_of_the_tests", None)


@pytest.mark.parametrize("vault", ["secrets", "workers"], indirect=True)
def test_the_keys_come_from_the_backend_of_the_worker_or_of_all(vault: None) -> None:
    cipher = cipher_of(get_settings())
    both = Cipher(
        Settings(encryption_keys=KEYS["refunds/encryption"], fingerprint_key=KEYS["refunds/fingerprint"])
    )
    assert cipher.key_ids == both.key_ids
    assert cipher.fingerprint_check == both.fingerprint_check


def test_a_key_of_the_environment_wins_over_one_of_the_backend(
    vault: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "b3duLWZlcm5ldC1rZXktb2YtdGhlLXRlc3RzLS0tLSE="
    monkeypatch.setenv("PAYROC_REFUNDS_ENCRYPTION_KEYS", own)
    fingerprint = KEYS["refunds/fingerprint"]
    expected = Cipher(Settings(encryption_keys=own, fingerprint_key=fingerprint))
    cipher = cipher_of(get_settings())
    assert (cipher.key_ids, cipher.fingerprint_check) == (expected.key_ids, expected.fingerprint_check)


def test_a_name_that_the_backend_does_not_have_and_a_missing_backend_are_told_in_a_sentence(
    vault: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYROC_REFUNDS_FINGERPRINT_KEY_SECRET", "refunds/other")
    with pytest.raises(
        SettingsError,
        match=r"^Airflow's secrets backend has no 'refunds/other', which PAYROC_REFUNDS_FINGERPRINT_KEY_SECRET names:",
    ):
        cipher_of(get_settings())
    for name in [name for name in os.environ if "BACKEND" in name]:
        monkeypatch.delenv(name)
    with pytest.raises(
        SettingsError,
        match=r"_SECRET names a secret, but Airflow has no secrets backend: set AIRFLOW__SECRETS__BACKEND",
    ):
        cipher_of(get_settings())


def test_a_backend_that_fails_is_told_in_a_sentence_without_its_own_words(
    vault: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vault_of_the_tests import Vault

    def fail(self: object, key: str) -> str:
        raise RuntimeError("token hunter2 has expired")

    monkeypatch.setattr(Vault, "get_config", fail)
    with pytest.raises(SettingsError, match=r"secrets backend failed \(RuntimeError\)") as caught:
        cipher_of(get_settings())
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("around", ["{}\n", '"{}"', " {}"])
def test_a_fingerprint_key_of_the_backend_with_something_around_it_is_refused_without_being_shown(
    vault: None, monkeypatch: pytest.MonkeyPatch, around: str
) -> None:
    from vault_of_the_tests import Vault

    key = KEYS["refunds/fingerprint"]
    monkeypatch.setattr(Vault, "get_config", lambda self, name: around.format(self.kept[name]))
    monkeypatch.delenv("PAYROC_REFUNDS_ENCRYPTION_KEYS_SECRET")
    monkeypatch.setenv("PAYROC_REFUNDS_ENCRYPTION_KEYS", KEYS["refunds/encryption"])
    with pytest.raises(SettingsError) as caught:
        cipher_of(get_settings())
    said = str(caught.value)
    assert said.startswith("PAYROC_REFUNDS_FINGERPRINT_KEY is not usable; give the key alone")
    assert said.endswith(" It is in Airflow's secrets backend.")
    assert key not in said
    assert caught.value.__suppress_context__


def test_line_ends_around_encryption_keys_of_the_backend_are_left_out(
    vault: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vault_of_the_tests import Vault

    expected = cipher_of(get_settings()).key_ids
    monkeypatch.setattr(
        Vault, "get_config", lambda self, name: self.kept[name] + "\r\n" * ("encryption" in name)
    )
    assert cipher_of(get_settings()).key_ids == expected


def test_a_run_sends_and_the_commands_rotate_with_keys_of_the_backend_and_no_log_shows_them(
    world: World, run_dag: Runner, ledger_url: URL, vault: None
) -> None:
    # The world's own key is the second of the backend's.
    refs = [world.approve() for _ in range(2)]
    world.pull()
    run = run_dag(limit=1)
    assert (run.state, [world.row(ref)["status"] for ref in refs]) == ("success", ["accepted", "approved"])
    first = key_id(KEYS["refunds/encryption"].split(",")[0])
    rotated = cli("rotate-keys", ledger=ledger_url)
    assert (rotated.returncode, rotated.stderr) == (0, "")
    assert f"2 requests were encrypted anew with the key {first}." in rotated.stdout
    masker = _secrets_masker()
    for key in (*KEYS["refunds/encryption"].split(","), KEYS["refunds/fingerprint"]):
        assert key not in run.log + rotated.stdout
        assert key.encode() not in everything_that_airflow_kept()
        assert "***" in str(masker.redact(f"The key is {key}."))


def test_the_commands_say_in_a_sentence_what_the_backend_does_not_have(vault: None, ledger_url: URL) -> None:
    refused = cli("rotate-keys", ledger=ledger_url, PAYROC_REFUNDS_ENCRYPTION_KEYS_SECRET="refunds/other")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert (
        "secrets backend has no 'refunds/other', which PAYROC_REFUNDS_ENCRYPTION_KEYS_SECRET names"
        in refused.stderr
    )
