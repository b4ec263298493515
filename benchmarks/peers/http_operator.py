"""
### The usual way to call an API for each row of a table

One task reads the rows and a token, one mapped ``HttpOperator`` posts each row under its own idempotency key, and one task writes the
results back. There is no ledger: a row whose result was not written back is posted again by the next run, and bank data stands in XCom.
"""

from __future__ import annotations

import json
import uuid
from datetime import timedelta
from typing import Any

import requests
from airflow.providers.http.operators.http import HttpOperator
from airflow.providers.postgres.hooks.postgres import PostgresHook
from airflow.sdk import DAG, BaseHook, TriggerRule, get_current_context, task

ROWS = """
    SELECT order_id, processing_terminal_id, description, amount, currency, name_on_account, account_type, sec_code, routing_number,
           account_number
    FROM public.refund_requests WHERE approved_by IS NOT NULL AND status IS NULL ORDER BY approved_at"""
WRITE_BACK = """
    UPDATE public.refund_requests SET status = 'accepted', payroc_refund_id = %s, payroc_status = %s, updated_at = now()
    WHERE order_id = %s"""
# A row keeps its key however often it is posted; a UUID v4 by its form.
NAMESPACE = uuid.UUID("5d1f6a0e-6f0c-4f43-9a55-6a4c0f2f3d11")


def _post(row: tuple[Any, ...], token: str) -> dict[str, Any]:
    (
        order_id,
        terminal,
        description,
        amount,
        currency,
        name,
        account_type,
        sec_code,
        routing_number,
        account_number,
    ) = row
    method = {"type": "ach", "nameOnAccount": name, "accountType": account_type, "secCode": sec_code}
    body = {
        "processingTerminalId": terminal,
        "order": {"orderId": order_id, "description": description, "amount": amount, "currency": currency},
        "refundMethod": {**method, "routingNumber": routing_number, "accountNumber": account_number},
    }
    key = uuid.UUID(bytes=uuid.uuid5(NAMESPACE, order_id).bytes, version=4)
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {token}",
        "Idempotency-Key": str(key),
    }
    return {"data": json.dumps(body), "headers": headers}


def _result(response: requests.Response) -> list[str]:
    refund = response.json()
    return [refund["refundId"], refund["transactionResult"]["status"], refund["order"]["orderId"]]


with DAG(
    "http_operator",
    doc_md=__doc__,
    schedule=None,
    default_args={"retries": 3, "retry_delay": timedelta(seconds=10)},
) as dag:

    @task
    def read() -> list[dict[str, Any]]:
        """Return what each task posts."""
        connection = BaseHook.get_connection("payroc_http")
        identity = connection.extra_dejson["identity_url"]
        answer = requests.post(
            f"{identity}/authorize", headers={"x-api-key": connection.password or ""}, timeout=30
        )
        answer.raise_for_status()
        rows = PostgresHook("refunds_source").get_records(ROWS)
        return [_post(row, answer.json()["access_token"]) for row in rows]

    @task(trigger_rule=TriggerRule.ALL_DONE)
    def write_back() -> None:
        """Tell the table what became of its rows."""
        results = get_current_context()["ti"].xcom_pull(task_ids="send")
        with PostgresHook("refunds_source").get_conn() as connection, connection.cursor() as cursor:
            cursor.executemany(WRITE_BACK, list(results))

    send = HttpOperator.partial(
        task_id="send",
        http_conn_id="payroc_http",
        method="POST",
        endpoint="bank-transfer-refunds",
        response_filter=_result,
        pool="payroc_api",
    ).expand_kwargs(read())
    send >> write_back()
