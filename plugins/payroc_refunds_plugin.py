"""The Airflow plugin: lets tasks ask the API server whether the pool of the send tasks exists."""

from __future__ import annotations

from airflow.sdk.plugins_manager import AirflowPlugin

from payroc_airflow.pools import URL_PREFIX, pool_app


class PayrocRefundsPlugin(AirflowPlugin):
    """See :mod:`payroc_airflow.pools`."""

    name = "payroc_refunds"
    fastapi_apps = [  # noqa: RUF012 - as the base class declares it
        {"app": pool_app, "url_prefix": URL_PREFIX, "name": "Payroc refunds"}
    ]
