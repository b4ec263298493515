from __future__ import annotations

from tests.patience import PATIENCE_SECONDS, eventually
from tests.sandbox.running import Client, RunningSandbox, problem_type, running_sandbox


def test_an_api_key_buys_a_token_for_an_hour(sandbox: RunningSandbox, payroc: Client) -> None:
    answer = payroc.authorize("any-key")
    assert answer.status_code == 200
    assert set(answer.json()) == {"access_token", "expires_in", "scope", "token_type"}
    assert (answer.json()["expires_in"], answer.json()["token_type"]) == (3600, "Bearer")


def test_a_wrong_or_missing_api_key_is_not_authorized(payroc: Client) -> None:
    missing = payroc.session.post(f"{payroc.url}/authorize", timeout=PATIENCE_SECONDS)
    for answer in (payroc.authorize("wrong-key"), missing):
        assert answer.status_code == 401
        assert problem_type(answer) == "not-authorized"


def test_only_the_given_api_keys_are_accepted() -> None:
    with running_sandbox("--api-key", "first-key", "--api-key", "second-key") as sandbox:
        assert "first-key" not in "".join(sandbox.output)
        client = Client(sandbox.url, "second-key")
        assert client.authorize("first-key").status_code == 200
        assert client.authorize("sandbox-key").status_code == 401


def test_a_request_without_a_token_or_with_a_made_up_one_is_not_authorized(payroc: Client) -> None:
    for header in (None, "Bearer made-up", f"Basic {payroc.token}", payroc.token):
        answer = payroc.send("GET", "/bank-transfer-refunds", headers={"Authorization": header})
        assert answer.status_code == 401
        assert problem_type(answer) == "not-authorized"


def test_a_token_expires_after_its_seconds() -> None:
    with running_sandbox("--token-seconds", "1") as sandbox:
        client = sandbox.client()

        def a_new_one_is_good() -> bool:
            answer = client.authorize("sandbox-key").json()
            client.token = answer["access_token"]
            return answer["expires_in"] == 1 and client.list().status_code == 200

        # A busy machine may take longer than a token lives.
        eventually(a_new_one_is_good)
        eventually(lambda: client.list().status_code == 401)
        assert problem_type(client.list()) == "not-authorized"


def test_a_token_expires_when_the_clock_is_advanced(sandbox: RunningSandbox, payroc: Client) -> None:
    sandbox.advance(3590)
    assert payroc.list().status_code == 200
    sandbox.advance(11)
    assert payroc.list().status_code == 401


def test_a_new_token_leaves_the_older_one_valid(payroc: Client) -> None:
    payroc.authorize("sandbox-key")
    assert payroc.list().status_code == 200


def test_revoked_tokens_are_not_authorized_and_new_ones_are(sandbox: RunningSandbox, payroc: Client) -> None:
    assert sandbox.admin("POST", "tokens/revoke") == {"revoked": 1}
    assert payroc.list().status_code == 401
    assert sandbox.client().list().status_code == 200
