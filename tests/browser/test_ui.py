"""
Airflow's web interface as a person uses it, in Chromium, against a running Airflow.

Olivia keeps the connection and triggers runs, Frank approves one. ``SCREENSHOTS=docs/images`` renews the pictures of docs/ui.md.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote

import pytest
from playwright.sync_api import expect

from payroc_airflow.get_provider_info import get_provider_info
from payroc_refunds import PARAMS
from tests.browser.conftest import CHROMIUM
from tests.browser.person import Person
from tests.scheduler.conftest import Merchant
from tests.scheduler.deployment import DAG

pytestmark = [
    # A build that has no browser by mistake must not pass for one that has tested the pages.
    pytest.mark.skipif(not CHROMIUM and not os.environ.get("CI"), reason="there is no chromium on the PATH"),
]

# -- the connection ----------------------------------------------------------------------------------------------------


def new_connection(person: Person, conn_id: str) -> None:
    person.page.goto("/connections")
    person.page.get_by_role("button", name="Add Connection").click()
    person.form.get_by_role("textbox", name="Connection ID").fill(conn_id)
    person.form.get_by_role("combobox", name="Connection Type").fill("payroc")
    person.page.get_by_role("option", name="Payroc").click()


def save_connection(
    person: Person, merchant: Merchant, conn_id: str, api_key: str, *, port: str = "0"
) -> None:
    new_connection(person, conn_id)
    person.field("API base URL").get_by_role("textbox").fill(merchant.sandbox.api_url)
    person.field("API key").get_by_role("textbox").fill(api_key)
    person.field("Port (0, or Test fails)").get_by_role("spinbutton").fill(port)
    person.form.get_by_role("button", name="Extra Fields", exact=True).click()
    person.field("Identity URL").get_by_role("textbox").fill(merchant.sandbox.url)
    person.form.get_by_role("button", name="Save").click()
    expect(person.form).to_have_count(0)


def press_test(person: Person, conn_id: str) -> None:
    person.page.get_by_role("row").filter(has_text=conn_id).get_by_role(
        "button", name="Test Connection"
    ).click()


def test_the_connection_form_of_type_payroc_has_its_fields_with_hints_and_no_others(olivia: Person) -> None:
    new_connection(olivia, "payroc_default")
    olivia.field("API key").get_by_placeholder("API key from Payroc").fill("not shown")
    expect(olivia.field("API base URL").get_by_placeholder("Only for a Payroc of your own")).to_be_visible()
    labels = olivia.form.get_by_role("region", name="Standard Fields").locator("label")
    expect(labels).to_have_text(["Description", "API base URL", "API key", "Port (0, or Test fails)"])
    olivia.field("Port (0, or Test fails)").get_by_role("spinbutton").fill("0")
    olivia.picture("connection")
    olivia.form.get_by_role("button", name="Extra Fields", exact=True).click()
    (kind,) = get_provider_info()["connection-types"]
    for known in kind["conn-fields"].values():
        expect(olivia.field(known["label"])).to_contain_text(known["description"])
    olivia.picture("connection-extra", height=1150)
    olivia.field("Environment").get_by_role("combobox").click()
    expect(olivia.page.get_by_role("option")).to_have_text(["uat", "production"])


def test_a_connection_saved_in_the_form_is_of_type_payroc_and_its_test_passes_with_the_right_key(
    olivia: Person, merchant: Merchant
) -> None:
    save_connection(olivia, merchant, "payroc_right", "sandbox-key")
    expect(olivia.page.get_by_role("row").filter(has_text="payroc_right")).to_contain_text(
        f"payroc{merchant.sandbox.api_url}"
    )
    with olivia.page.expect_response(re.compile("/connections/test")) as answer:
        press_test(olivia, "payroc_right")
    # The page itself only turns the icon green.
    assert answer.value.json() == {
        "status": True,
        "message": f"Payroc accepted the API key at {merchant.sandbox.url}.",
    }
    button = (
        olivia.page.get_by_role("row")
        .filter(has_text="payroc_right")
        .get_by_role("button", name="Test Connection")
    )
    expect(button.locator("svg")).to_have_css("color", "rgb(0, 128, 0)")


def test_the_test_of_a_wrong_key_says_what_to_check_and_shows_no_key(
    olivia: Person, merchant: Merchant
) -> None:
    save_connection(olivia, merchant, "payroc_refused", "wrong-key-of-olivia")
    press_test(olivia, "payroc_refused")
    expect(olivia.notice).to_contain_text(
        f"Payroc refused the API key (HTTP 401): copy the key again, and check that it belongs to {merchant.sandbox.url}."
    )
    olivia.picture("connection-test", height=520)
    assert "wrong-key-of-olivia" not in olivia.page.content()


def test_airflow_tests_no_connection_with_an_empty_port_which_is_why_the_form_asks_for_one(
    olivia: Person, merchant: Merchant
) -> None:
    # When this fails, Airflow has mended it (https://github.com/apache/airflow/pull/73298): hide the port again.
    save_connection(olivia, merchant, "payroc_no_port", "sandbox-key", port="")
    with olivia.page.expect_response(re.compile("/connections/test")) as answer:
        press_test(olivia, "payroc_no_port")
    assert "host or port to test differs" in answer.value.json()["detail"]


# -- the trigger form --------------------------------------------------------------------------------------------------


def test_the_trigger_form_shows_every_param_with_its_title_and_help(olivia: Person) -> None:
    olivia.opens_trigger_form(DAG)
    for param in PARAMS.values():
        assert param.schema["title"]
        assert param.description
        expect(olivia.field(param.schema["title"])).to_contain_text(param.description)
    olivia.picture("trigger", height=1450)


def test_the_form_takes_no_limit_of_zero_but_shows_the_smallest_one(olivia: Person) -> None:
    olivia.opens_trigger_form(DAG)
    limit = olivia.field("Limit").get_by_role("spinbutton")
    limit.fill("0")
    limit.blur()
    expect(limit).to_have_value("1")


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ('{"limit": 0}', "Invalid input for param limit: 0 is less than the minimum of 1"),
        (
            '{"processing_terminal_id": "abc"}',
            "Invalid input for param processing_terminal_id: 'abc' is too short",
        ),
        (
            '{"approved_before": "yesterday"}',
            "Invalid input for param approved_before: 'yesterday' is not a 'date-time'",
        ),
        (
            '{"approved_before": "2026-11-20T10:00:00"}',
            "approved_before: '2026-11-20T10:00:00' is not a 'date-time'",
        ),
    ],
)
def test_a_bad_value_is_refused_in_the_form_with_its_reason_and_there_is_no_run(
    olivia: Person, conf: str, message: str
) -> None:
    olivia.opens_trigger_form(DAG)
    olivia.writes_conf(conf)
    olivia.triggers()
    expect(olivia.form).to_contain_text(message)
    assert not re.search("/runs/", olivia.page.url)


def test_a_param_that_does_not_exist_fails_the_run_at_once_and_its_log_says_why(
    olivia: Person, merchant: Merchant
) -> None:
    olivia.opens_trigger_form(DAG)
    olivia.writes_conf('{"limits": 5}')
    run_id = olivia.triggered()
    merchant.airflow.client.wait_for_run(DAG, unquote(run_id), "failed")
    olivia.page.goto(f"/dags/{DAG}/runs/{run_id}/tasks/pull_approved")
    expect(
        olivia.page.get_by_text("The run was triggered with unknown params (limits)").first
    ).to_be_visible()
    assert (
        merchant.rows("SELECT 1 FROM refund_ledger.refund_runs WHERE run_id = :id", id=unquote(run_id)) == []
    )


def test_a_dry_run_is_triggered_in_the_form_and_reports_what_would_be_sent(
    olivia: Person, merchant: Merchant
) -> None:
    ref = merchant.approve(order_id="SO-104207", amount=4_500)
    olivia.opens_trigger_form(DAG)
    olivia.field("Dry run").locator("[data-part=control]").click()
    olivia.field("Only these source_refs").get_by_role("textbox").fill(ref)
    run_id = olivia.triggered()
    merchant.airflow.client.wait_for_run(DAG, unquote(run_id), "success")
    olivia.page.goto(f"/dags/{DAG}/runs/{run_id}/tasks/report")
    expect(olivia.page.get_by_text("Dry run: this is what would be sent.").first).to_be_visible()
    expect(
        olivia.page.get_by_text(re.compile(r"SO-104207 +45\.00 USD +4321 +would send")).first
    ).to_be_visible()
    assert merchant.refunds_at_payroc(ref) == []
    # No other test's run shall take it.
    merchant.change_source(ref, "approved_at = NULL, approved_by = NULL")


# -- a run, from the form to the report --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaidRun:
    """
    A run that Olivia triggered and Frank approved, both in their browsers.

    :param id: as it stands in addresses.
    :param question: rows of the table that Frank saw.
    """

    id: str
    paid: list[str]
    refused: str
    question: list[str]


@pytest.fixture(scope="module")
def run(olivia: Person, frank: Person, merchant: Merchant) -> PaidRun:
    paid = [
        merchant.approve(order_id=f"SO-1042{n}", amount=amount)
        for n, amount in ((11, 18_990), (19, 6_450), (23, 129_900))
    ]
    refused = merchant.approve("9001", order_id="SO-104231", amount=21_500)
    olivia.opens_trigger_form(DAG)
    olivia.field("Only these source_refs").get_by_role("textbox").fill("\n".join([*paid, refused]))
    run_id = olivia.triggered()
    client = merchant.airflow.client
    client.question(DAG, unquote(run_id))
    asked = client.task_instances(DAG, unquote(run_id))["approve_run", -1]
    # An answer that comes earlier is lost; people are slower.
    merchant.wait_until(
        lambda: merchant.airflow.knows_the_end_of(asked), "the asking process has ended", pause=0.3
    )
    frank.page.get_by_role("button", name="Browse").click()
    frank.page.get_by_role("menuitem", name="Required Actions").click()
    frank.picture("required-actions", height=420)
    frank.page.get_by_role("link", name=re.compile("^Release ")).click()
    approve = frank.page.get_by_role("button", name="Approve")
    expect(approve).to_be_enabled()
    question = (
        frank.page.get_by_role("table").filter(has_text="Largest refund").get_by_role("row").all_inner_texts()
    )
    frank.picture("approval", height=720)
    approve.click()
    expect(frank.notice).to_contain_text("response successful")
    client.wait_for_run(DAG, unquote(run_id), "success")
    return PaidRun(run_id, paid, refused, question)


def test_required_actions_shows_as_a_table_what_would_be_released(run: PaidRun) -> None:
    assert [row.split("\t") for row in run.question] == [
        ["Currency", "Refunds", "Total", "Largest refund"],
        ["USD", "4", "1,768.40 USD", "1,299.00 USD"],
    ]


def test_after_approve_the_run_goes_on_and_pays_each_refund_once(run: PaidRun, merchant: Merchant) -> None:
    merchant.assert_paid_once(*run.paid)
    assert merchant.row(run.refused)["status"] == "rejected"
    noted = merchant.rows(
        "SELECT approved_by FROM refund_ledger.refund_runs WHERE run_id = :id", id=unquote(run.id)
    )
    assert noted == [{"approved_by": "frank"}]


def test_the_grid_names_each_mapped_task_by_its_order_id(run: PaidRun, olivia: Person) -> None:
    olivia.page.goto(f"/dags/{DAG}/runs/{run.id}/tasks/send_refund/mapped")
    for order_id, state in (
        ("SO-104211", "Success"),
        ("SO-104219", "Success"),
        ("SO-104223", "Success"),
        ("SO-104231", "Failed"),
    ):
        expect(olivia.page.get_by_role("row").filter(has_text=order_id)).to_contain_text(state)
    olivia.picture("grid", height=680)


def test_the_report_is_a_table_in_the_log_of_its_task_and_the_totals_are_its_xcom(
    run: PaidRun, olivia: Person
) -> None:
    olivia.page.goto(f"/dags/{DAG}/runs/{run.id}/tasks/report")
    log = olivia.page.locator("body")
    expect(log).to_contain_text("Audit trail:")
    # What ends a line of the table stands at the end of a line on the page: the columns are not run together.
    seen = log.inner_text()
    assert re.search(r"^order id +amount +last4 +status +refund id +attempts +reason$", seen, re.MULTILINE)
    assert re.search(
        r"^SO-104223 +1,299\.00 USD +4321 +accepted +[A-Z0-9]{10} +1 +Accepted by Payroc\.$",
        seen,
        re.MULTILINE,
    )
    assert re.search(
        r"^SO-104231 +215\.00 USD +9001 +rejected +[A-Z0-9]{10} +1 +Declined by the bank\.$",
        seen,
        re.MULTILINE,
    )
    assert re.search(r"^ +accepted +3 +1,553\.40 USD$", seen, re.MULTILINE)
    olivia.picture("report", height=700)
    olivia.page.goto(f"/dags/{DAG}/runs/{run.id}/tasks/report/xcom")
    expect(olivia.page.get_by_role("row").filter(has_text="return_value")).to_be_visible()
