"""A person at the web interface of Airflow."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Browser, Locator, expect

from tests.scheduler.client import AirflowClient

# What a page may take on a busy machine; an answer that is missing after it is missing.
PATIENCE_SECONDS = 120
_WINDOW = {"width": 1280, "height": 860}

expect.set_options(timeout=PATIENCE_SECONDS * 1000)


class Person:
    """
    A person who has logged in.

    :param client: of the deployment, whose passwords it knows.
    :param name: Airflow's user.
    :param pictures: folder for the pictures of the documentation; ``None`` takes none.
    """

    def __init__(self, chromium: Browser, client: AirflowClient, name: str, *, pictures: Path | None) -> None:
        self.name = name
        self._pictures = pictures
        context = chromium.new_context(
            viewport=_WINDOW,
            base_url=client.address,
            locale="en-GB",
            timezone_id="UTC",
            reduced_motion="reduce",
        )
        context.set_default_timeout(PATIENCE_SECONDS * 1000)
        self.page = context.new_page()
        self.page.goto("/auth/login?next=/")
        self.page.get_by_role("textbox", name="Username").fill(name)
        self.page.get_by_label("Password").fill(client.passwords[name])
        self.page.get_by_role("button", name="Sign in").click()
        expect(self.page.get_by_role("link", name="Dags", exact=True).first).to_be_visible()

    def sees(self) -> str:
        """Return where the person is, and the text that stands there."""
        return f"{self.page.url}\n{self.page.locator('body').inner_text()}"

    def picture(self, name: str, *, height: int = _WINDOW["height"]) -> None:
        """Take a picture for the documentation, if pictures are wanted."""
        if self._pictures is None:
            return
        self.page.set_viewport_size({**_WINDOW, "height": height})
        # Fonts and the last of what moves; nothing that a test looks at.
        self.page.wait_for_timeout(700)
        self.page.screenshot(path=self._pictures / f"ui-{name}.png", animations="disabled")
        self.page.set_viewport_size(_WINDOW)

    # -- parts of pages that several tests use ---------------------------------------------------------------------

    @property
    def form(self) -> Locator:
        """The form that is open over the page."""
        return self.page.get_by_role("dialog").filter(has=self.page.get_by_role("heading"))

    def field(self, label: str) -> Locator:
        """Return a field of the form with its label and help; Airflow does not tie all of them together for screen readers."""
        label_ = self.page.locator("label").filter(has_text=re.compile(rf"^{re.escape(label)}\s*\*?$"))
        return self.form.get_by_role("group").filter(has=label_)

    @property
    def notice(self) -> Locator:
        """What Airflow says in the corner of the page."""
        return self.page.get_by_role("region", name="Notifications")

    def opens_trigger_form(self, dag_id: str) -> None:
        self.page.goto(f"/dags/{dag_id}")
        self.page.get_by_role("button", name="Trigger").first.click()
        expect(self.field("Dry run")).to_be_visible()

    def writes_conf(self, conf: str) -> None:
        """Replace the configuration JSON of the trigger form."""
        self.form.get_by_role("button", name="Advanced Options").click()
        self.form.locator(".view-lines").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(conf)
        # The editor has closed quotes and brackets that are closed already.
        self.page.keyboard.press("Control+Shift+End")
        self.page.keyboard.press("Delete")
        self.form.get_by_text("Configuration JSON").click()

    def triggers(self) -> None:
        self.form.get_by_role("button", name="Trigger").click()

    def triggered(self) -> str:
        """Press the form's button, and return the id of the run to whose page it leads."""
        self.triggers()
        self.page.wait_for_url(re.compile("/runs/"))
        return re.split("/runs/", self.page.url)[1].split("/")[0].split("?")[0]
