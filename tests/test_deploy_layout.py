"""docs/deploy says what is true: its commands are run, its YAML is read, and Airflow finds the project where each platform puts it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.postgres import PostgresServer
from include.refunds.settings import Settings
from tests.conftest import ROOT
from tests.test_docs import blocks

PAGES = ROOT / "docs" / "deploy"

# What a deployment begins with: a clone without what tests and people leave in it.
CHECKOUT = ("dags", "plugins", "include", "pyproject.toml", "requirements.txt")
LEFT_OVER = shutil.ignore_patterns("__pycache__", "*.egg-info")

# Runs in a Python without this project, and prints what Airflow has found.
PROBE = """
import json, sys
from airflow import plugins_manager
from airflow.api_fastapi.core_api.services.ui.connections import HookMetaService
from airflow.configuration import conf
from airflow.dag_processing.dagbag import DagBag
from airflow.providers_manager import ProvidersManager

plugins_manager.ensure_plugins_loaded()
bag = DagBag(dag_folder=conf.get("core", "dags_folder"))
hook = ProvidersManager().hooks.get("payroc")
ours = {"include", "payroc_airflow", "payroc_refunds_plugin"}
print("FOUND" + json.dumps({
    "dags": sorted(bag.dags),
    "errors": {name.rsplit("/", 1)[1]: text.splitlines()[-1] for name, text in bag.import_errors.items()},
    "plugins": [plugin.name for plugin in plugins_manager._get_plugins()[0]],
    "plugin errors": plugins_manager.get_import_errors(),
    "form": [kind.connection_type for kind in HookMetaService.hook_meta_data() if kind.connection_type == "payroc"],
    "hook": hook and hook.hook_class_name,
    # What the plugin loader has executed stands among the modules under the name of its file.
    "executed": sorted(
        name
        for name, module in sys.modules.items()
        if "." not in name and name not in ours and str(getattr(module, "__file__", "")).startswith(conf.get("core", "plugins_folder"))
    ),
}))
"""


def commands(page: str, block: int = 0) -> str:
    """Return the commands of a page's console block, as a script."""
    return "\n".join(re.findall(r"^\$ (.*)$", blocks(PAGES / page, "console")[block], re.M))


def run(script: str, folder: Path) -> None:
    """Run a script as a person would in a terminal, but stop at the first error."""
    environment = (
        os.environ
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        | without_isolation()
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def without_isolation() -> dict[str, str]:
    """Let pip build with the setuptools that is installed, if it is new enough: else pip fetches one."""
    # The variable switches isolation off by any value that means no.
    return {"PIP_NO_BUILD_ISOLATION": "0"} if int(version("setuptools").partition(".")[0]) >= 77 else {}


def checkout(folder: Path) -> Path:
    for name in CHECKOUT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=LEFT_OVER)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder)
    return folder


def strange_python(folder: Path) -> Path:
    """Make a Python that has all installed packages but this one, and return its path."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib"))
    target = folder / packages.relative_to(sys.prefix)
    for entry in packages.iterdir():
        if "payroc_refunds" not in entry.name and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def install(python: Path, what: list[str], folder: Path) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *what]
    # On the tests' own path pip would find this project installed already.
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    } | without_isolation()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def look(python: Path, home: Path, **variables: str) -> dict[str, Any]:
    """Start Airflow's parts in a home, with nothing of this test's environment, and return what they found."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
    }
    # -P: the folder in which a process was started is not on the path of Airflow's processes either.
    command = [str(python), "-P", "-c", PROBE]
    done = subprocess.run(command, cwd=home, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.partition("FOUND")[2])
    return found


def everything() -> dict[str, Any]:
    """Return what Airflow has to find."""
    return {
        "dags": sorted(file.stem for file in (ROOT / "dags").glob("*.py")),
        "errors": {},
        "plugins": ["payroc_refunds"],
        "plugin errors": {},
        "form": ["payroc"],
        "hook": "payroc_airflow.hooks.payroc.PayrocHook",
        "executed": [],
    }


def names(requirements: str) -> list[str]:
    """Return the packages of a requirements file, in its order, with their extras and without versions."""
    return [
        line.partition("==")[0]
        for line in requirements.splitlines()
        if line and not line.startswith(("#", "-", "/"))
    ]


@pytest.fixture(scope="module")
def needed() -> list[str]:
    """The packages that the project needs beside Airflow."""
    found = names((ROOT / "requirements.txt").read_text())
    assert "apache-airflow" in found
    return [name for name in found if name != "apache-airflow"]


@pytest.fixture(scope="module")
def mwaa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of mwaa.md have built."""
    folder = checkout(tmp_path_factory.mktemp("mwaa") / "checkout")
    run(commands("mwaa.md"), folder)
    return folder


@pytest.fixture(scope="module")
def composer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of composer.md have built."""
    folder = checkout(tmp_path_factory.mktemp("composer") / "checkout")
    run(commands("composer.md"), folder)
    return folder


@pytest.fixture(scope="module")
def astro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Astro project that the commands of astronomer.md have made."""
    folder = checkout(tmp_path_factory.mktemp("astro") / "checkout")
    run(commands("astronomer.md"), folder)
    return folder.parent / "payroc-astro"


def test_the_index_names_each_page() -> None:
    linked = set(re.findall(r"\]\(([a-z]+\.md)\)", (PAGES / "README.md").read_text()))
    assert {page.name for page in PAGES.glob("*.md")} - {"README.md"} <= linked
    assert {"kubernetes.md", "astronomer.md", "mwaa.md", "composer.md"} <= linked


def test_as_the_repository_stands_airflow_does_not_find_include_by_itself(tmp_path: Path) -> None:
    # https://airflow.apache.org/docs/apache-airflow/stable/administration-and-deployment/modules_management.html
    home = checkout(tmp_path / "home")
    found = look(strange_python(tmp_path / "venv"), home)
    assert found["dags"] == []
    assert set(found["errors"].values()) == {"ModuleNotFoundError: No module named 'include'"}


def test_the_astro_project_has_what_the_runtime_image_copies(astro: Path, needed: list[str]) -> None:
    # https://astronomer.io/docs/astro/create-project; a missing packages.txt or requirements.txt ends the build.
    assert {path.name for path in astro.iterdir()} >= {
        "dags",
        "include",
        "plugins",
        "requirements.txt",
        "packages.txt",
    }
    assert names((astro / "requirements.txt").read_text()) == needed


def test_airflow_finds_everything_in_the_astro_project(astro: Path, tmp_path: Path) -> None:
    # The image copies the project to /usr/local/airflow, then the Dockerfile's own lines are run there.
    home = shutil.copytree(astro, tmp_path / "home")
    dockerfile = blocks(PAGES / "astronomer.md", "dockerfile")[0]
    path, options = (
        re.search(r"^ENV PYTHONPATH=(.*)$", dockerfile, re.M),
        re.search(r"^RUN pip install (.*)$", dockerfile, re.M),
    )
    assert path is not None
    assert options is not None
    python = strange_python(tmp_path / "venv")
    install(python, options[1].split(), home)
    assert look(python, home, PYTHONPATH=path[1].replace("/usr/local/airflow", str(home))) == everything()


def test_mwaas_requirements_name_a_constraint_and_the_wheel_and_what_the_project_needs(
    mwaa: Path, needed: list[str]
) -> None:
    text = (mwaa / "build" / "requirements.txt").read_text()
    constraint, wheel, *_ = text.splitlines()
    # The pattern is that of MWAA's image; https://docs.aws.amazon.com/mwaa/latest/userguide/airflow-versions.html demands a constraint.
    assert re.search(r"-c |--constraint ", constraint)
    # https://docs.aws.amazon.com/mwaa/latest/userguide/configuring-dag-import-plugins.html: the zip is unpacked there.
    folder, _, name = wheel.rpartition("/")
    assert folder == "/usr/local/airflow/plugins"
    assert name in zipfile.ZipFile(mwaa / "build" / "plugins.zip").namelist()
    assert names(text) == needed
    # Else a version of ours could contradict the constraint.
    assert "==" not in text


def test_airflow_finds_everything_in_mwaas_plugins_zip_without_pythonpath(mwaa: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(mwaa / "dags", home / "dags")
    with zipfile.ZipFile(mwaa / "build" / "plugins.zip") as archive:
        archive.extractall(home / "plugins")
    wheel = (mwaa / "build" / "requirements.txt").read_text().splitlines()[1]
    python = strange_python(tmp_path / "venv")
    install(python, ["--no-index", wheel.replace("/usr/local/airflow", str(home))], home)
    # What the image itself has set, and lets nobody change:
    # https://github.com/aws/amazon-mwaa-docker-images/blob/main/images/airflow/3.3.1/Dockerfiles/Dockerfile.base
    assert look(python, home, PYTHONPATH="/python") == everything()


def test_composers_bucket_has_the_two_folders_that_are_brought_to_all_components(
    composer: Path, needed: list[str]
) -> None:
    # https://cloud.google.com/composer/docs/composer-3/cloud-storage
    bucket = composer / "build" / "bucket"
    assert {path.name for path in bucket.iterdir()} == {"dags", "plugins"}
    assert {path.name for path in bucket.glob("dags/*.py")} == {
        path.name for path in (ROOT / "dags").glob("*.py")
    }
    assert (composer / "build" / "pypi-packages.txt").read_text().splitlines() == needed


@pytest.mark.parametrize("path", [True, False], ids=["with PYTHONPATH", "without PYTHONPATH"])
def test_airflow_finds_all_in_composers_bucket_and_without_pythonpath_all_but_the_form(
    composer: Path, tmp_path: Path, path: bool
) -> None:
    home = shutil.copytree(composer / "build" / "bucket", tmp_path / "home")
    variables = {"PYTHONPATH": str(home / "plugins")} if path else {}
    found = look(strange_python(tmp_path / "venv"), home, **variables)
    assert found == everything() | ({} if path else {"form": []})


@pytest.mark.parametrize("page", ["mwaa", "composer"])
def test_what_is_uploaded_brings_the_sql_files_but_no_local_payroc_and_no_bytecode(
    page: str, request: pytest.FixtureRequest
) -> None:
    build = request.getfixturevalue(page) / "build"
    plugins = build / "plugins" if page == "mwaa" else build / "bucket" / "plugins"
    uploaded = {str(path.relative_to(plugins)) for path in plugins.rglob("*")}
    assert {
        "include/sql/select_approved.sql",
        "include/sql/write_back.sql",
        "include/refunds/send.py",
    } <= uploaded
    assert [name for name in sorted(uploaded) if "sandbox" in name or "__pycache__" in name] == []


def documents(page: str) -> Iterator[dict[str, Any]]:
    for block in blocks(PAGES / page, "yaml"):
        yield from yaml.safe_load_all(block)


@pytest.mark.parametrize(
    "page", sorted(path.name for path in PAGES.glob("*.md") if "```yaml" in path.read_text())
)
def test_the_yaml_of_the_pages_can_be_read(page: str) -> None:
    found = list(documents(page))
    assert found
    assert all(isinstance(document, dict) and document for document in found)


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """The values for Airflow's Helm chart."""
    return next(document for document in documents("kubernetes.md") if "executor" in document)


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The job that migrates the ledger, its only container."""
    document = next(document for document in documents("kubernetes.md") if document.get("kind") == "Job")
    (container,) = document["spec"]["template"]["spec"]["containers"]
    return dict(container)


def test_the_charts_values_run_the_image_that_was_built_with_the_version_of_the_requirements(
    values: dict[str, Any], job: dict[str, Any]
) -> None:
    assert (
        f"apache-airflow=={values['airflowVersion']}" in (ROOT / "requirements.txt").read_text().splitlines()
    )
    image = values["images"]["airflow"]
    assert f"docker build -t {image['repository']}:{image['tag']} ." in commands("kubernetes.md")
    assert job["image"] == f"{image['repository']}:{image['tag']}"


def test_the_charts_values_give_tasks_all_they_need_from_secrets_that_were_made(
    values: dict[str, Any], job: dict[str, Any]
) -> None:
    made = {
        (secret, key.partition("=")[0])
        for secret, keys in re.findall(
            r"create secret generic (\S+) (.*)$", commands("kubernetes.md", 1), re.M
        )
        for key in re.findall(r"--from-file=(\S+)", keys)
    }
    used = {(entry["secretName"], entry["secretKey"]) for entry in values["secret"]}
    owner = job["env"][0]["valueFrom"]["secretKeyRef"]
    assert used | {(owner["name"], owner["key"])} == made
    assert {entry["envName"] for entry in values["secret"]} == {
        *(f"AIRFLOW_CONN_{name}" for name in ("PAYROC_DEFAULT", "REFUNDS_LEDGER", "REFUNDS_SOURCE")),
        "PAYROC_REFUNDS_ENCRYPTION_KEYS",
        "PAYROC_REFUNDS_FINGERPRINT_KEY",
    }


def test_the_charts_values_set_settings_that_exist_and_the_pool_of_the_send_tasks(
    values: dict[str, Any],
) -> None:
    from payroc_airflow.pools import POOL

    plain = {entry["name"]: entry["value"] for entry in values["env"]}
    settings = {
        name.removeprefix("PAYROC_REFUNDS_").lower(): value
        for name, value in plain.items()
        if name.startswith("PAYROC_REFUNDS_")
    }
    assert settings
    assert settings.keys() <= Settings.model_fields.keys()
    # The values are strings, as a container's environment demands; a number would be refused by Kubernetes.
    assert {type(value) for value in plain.values()} == {str}
    assert f"airflow pools set {POOL} 4 " in values["migrateDatabaseJob"]["args"][-1]


def test_the_job_of_the_kubernetes_page_migrates_a_ledger(
    job: dict[str, Any], postgres: PostgresServer
) -> None:
    postgres.create_database("ledger_of_the_job")
    url = postgres.url("ledger_of_the_job").set(drivername="postgres").render_as_string(hide_password=False)
    (variable,) = [entry["name"] for entry in job["env"]]
    program, *arguments = job["args"]
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {variable: url},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The ledger is at revision")
