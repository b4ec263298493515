"""
Whether the pool of the send tasks exists.

A task in a missing pool is queued for ever, and Airflow says so in one line of the scheduler's log only. A task process may
not open Airflow's database, and the API that tasks use has no route for pools. So the API server answers one question more,
through our plugin: does this one pool exist.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from payroc_airflow.task_context import in_dag_test

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

POOL = "payroc_api"

URL_PREFIX = "/payroc-refunds"

TIMEOUT_SECONDS = 5.0


def pool_exists(name: str) -> bool | None:
    """
    Ask the API server whether a pool exists.

    :param name: only ``payroc_api`` is answered.
    :return: ``None`` when it can't be told: under ``airflow dags test``, which ignores pools, and where no API server with our
        plugin answers within a few seconds.
    """
    if in_dag_test():
        return None
    import requests  # 0.1 s that only the task which asks should pay

    for base, verify in _api_servers():
        try:
            answer = requests.get(
                f"{base}{URL_PREFIX}/pools/{name}",
                timeout=TIMEOUT_SECONDS,
                allow_redirects=False,
                verify=verify,
            )
            # Airflow's UI answers unknown paths with its start page: only our own words count.
            exists = (
                answer.json()["exists"]
                if answer.status_code == 200 and answer.json()["pool"] == name
                else None
            )
        except (requests.RequestException, OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(exists, bool):
            return exists
    return None


async def pool_app(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    """
    Answer ``GET /payroc-refunds/pools/payroc_api`` on the API server with ``{"pool": "payroc_api", "exists": true}``.

    Plain ASGI, so that the processes which only load the plugin need not import FastAPI. Nothing but this one fact is told, so
    it needs no login.
    """
    if scope["type"] != "http":
        return
    known = scope["method"] == "GET" and scope["path"].endswith(f"/pools/{POOL}")
    if known:
        import asyncio

        exists = await asyncio.to_thread(_pool_in_database, POOL)
    body = json.dumps({"pool": POOL, "exists": exists} if known else {"detail": "Not found"}).encode()
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200 if known else 404, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _pool_in_database(name: str) -> bool:
    from airflow.models.pool import Pool
    from airflow.utils.session import create_session

    with create_session() as session:
        return Pool.get_pool(name, session=session) is not None


def _api_servers() -> Iterator[tuple[str, str | bool]]:
    """Yield base URLs, the one that tasks use first: the server of the tasks' API may be one without plugins."""
    from airflow.sdk.configuration import conf

    verify: str | bool = conf.get("api", "ssl_cert", fallback="") or True
    seen = set()
    for url in (
        conf.get("core", "execution_api_server_url", fallback=""),
        conf.get("api", "base_url", fallback=""),
    ):
        base = (url or "").rstrip("/").removesuffix("/execution")
        # Airflow's own default for a base URL that is missing or only a path.
        base = base if base.startswith("http") else f"http://localhost:8080{base}"
        if base not in seen:
            seen.add(base)
            yield base, verify
