"""What Airflow reads of this package through the entry point ``apache_airflow_provider``."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """
    Describe the connection type ``payroc``.

    Airflow's form is drawn from this alone, the hook is not imported. ``package-name`` must be the name of the distribution
    that declares the entry point, or Airflow refuses all providers.
    """
    return {
        "package-name": "payroc-refunds",
        "name": "Payroc",
        "description": "Payroc's unreferenced bank-transfer refunds.",
        "connection-types": [
            {
                "connection-type": "payroc",
                "hook-class-name": "payroc_airflow.hooks.payroc.PayrocHook",
                "hook-name": "Payroc",
                "ui-field-behaviour": {
                    "hidden-fields": ["login", "schema"],
                    "relabeling": {
                        "password": "API key",
                        "host": "API base URL",
                        # It would be hidden, but Airflow 3.3.2 tests no connection whose port is empty
                        # (https://github.com/apache/airflow/pull/73298).
                        "port": "Port (0, or Test fails)",
                    },
                    "placeholders": {
                        "password": "API key from Payroc",
                        "host": "Only for a Payroc of your own, such as http://127.0.0.1:8089/v1",
                    },
                },
                "conn-fields": {
                    "environment": {
                        "label": "Environment",
                        "description": "uat or production: gives both hosts. Empty means uat, unless the two URLs are set.",
                        "schema": {"type": ["string", "null"], "enum": ["uat", "production"]},
                    },
                    "identity_url": {
                        "label": "Identity URL",
                        "description": "Only together with the API base URL.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "allow_http": {
                        "label": "Allow plain http",
                        "description": "Shows the API key to the network; loopback needs no permission.",
                        "schema": {"type": ["boolean", "null"]},
                    },
                    "proxy": {
                        "label": "Proxy",
                        "description": "URL of an HTTP proxy; the environment's proxies are not used.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "ca_bundle": {
                        "label": "CA bundle",
                        "description": "File or folder of trusted certificates on the worker, instead of the usual ones.",
                        "schema": {"type": ["string", "null"]},
                    },
                },
            }
        ],
    }
