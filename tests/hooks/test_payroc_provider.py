"""What Airflow finds of the package: the connection type, the plugin, and nothing by accident."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import airflow
import jsonschema

from payroc_airflow.connection import EXTRAS
from payroc_airflow.get_provider_info import get_provider_info
from payroc_airflow.hooks.payroc import PayrocHook

ROOT = Path(__file__).parents[2]


def run(code: str, tmp_path: Path, **environment: str) -> str:
    """Run Python in a fresh process, because Airflow scans plugins and providers once for each."""
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'plugins'}",
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path}/airflow.db",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_provider_info_follows_airflows_schema_and_names_the_hook() -> None:
    info = get_provider_info()
    jsonschema.validate(
        info, json.loads((Path(airflow.__file__).parent / "provider_info.schema.json").read_text())
    )
    (kind,) = info["connection-types"]
    assert info["package-name"] == "payroc-refunds"
    assert kind["hook-class-name"] == f"{PayrocHook.__module__}.{PayrocHook.__qualname__}"
    assert (kind["connection-type"], kind["hook-name"]) == (PayrocHook.conn_type, PayrocHook.hook_name)
    assert tuple(kind["conn-fields"]) == EXTRAS


def test_the_connection_form_shows_payroc_without_importing_the_hook(tmp_path) -> None:
    # The distribution as an installation leaves it, so that the test does not depend on one.
    dist = tmp_path / "dist" / "payroc_refunds-0.0.1.dist-info"
    dist.mkdir(parents=True)
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: payroc-refunds\nVersion: 0.0.1\n")
    (dist / "entry_points.txt").write_text(
        "[apache_airflow_provider]\nprovider_info = payroc_airflow.get_provider_info:get_provider_info\n"
    )
    code = """
import json, sys
from airflow.api_fastapi.core_api.services.ui.connections import HookMetaService
(meta,) = [m for m in HookMetaService.hook_meta_data() if m.connection_type == "payroc"]
assert "payroc_airflow.hooks.payroc" not in sys.modules
print(json.dumps(meta.model_dump(mode="json")))
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), str(dist.parent)])
    meta = json.loads(run(code, tmp_path, PYTHONPATH=path).splitlines()[-1])
    assert meta["hook_name"] == "Payroc"
    assert meta["standard_fields"]["password"]["title"] == "API key"
    assert meta["extra_fields"]["environment"]["schema"]["enum"] == ["uat", "production"], (
        "Airflow's form would offer the word null"
    )
    assert set(meta["extra_fields"]) == set(EXTRAS)


def test_the_plugin_loads_alone_and_cheaply(tmp_path) -> None:
    code = """
import sys
from airflow import plugins_manager
import airflow.sdk.plugins_manager
before = set(sys.modules)
plugins, errors = plugins_manager._get_plugins()
new = {name for name in set(sys.modules) - before if not name.startswith("airflow")}
assert errors == {}, errors
assert [plugin.name for plugin in plugins] == ["payroc_refunds"], plugins
assert plugins_manager.get_fastapi_plugins()[0][0]["url_prefix"] == "/payroc-refunds"
print(*sorted(new))
"""
    # Where the package is installed, Airflow has read its provider info already.
    loaded = set(run(code, tmp_path).splitlines()[-1].split()) - {"payroc_airflow"}
    assert loaded == {"payroc_airflow.pools", "payroc_airflow.task_context", "payroc_refunds_plugin"}
