"""The page at ``/``: what the sandbox has paid, for people. One self-contained HTML document, escaped, refreshed by itself."""

from __future__ import annotations

from html import escape
from itertools import groupby
from operator import itemgetter

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from include.sandbox.pipeline import Sandbox
from include.sandbox.refunds import instant
from include.sandbox.store import Refund

SHOWN_REFUNDS = 200
# Currencies whose minor unit is not a hundredth.
MINOR_DIGITS = {
    **dict.fromkeys(
        (
            "BIF",
            "CLP",
            "DJF",
            "GNF",
            "ISK",
            "JPY",
            "KMF",
            "KRW",
            "PYG",
            "RWF",
            "UGX",
            "UYI",
            "VND",
            "VUV",
            "XAF",
            "XOF",
            "XPF",
        ),
        0,
    ),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Payroc sandbox</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --line: #8884; --soft: #8882; }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem; }
  h1 { font-size: 1.4rem; margin: 0; }
  p { margin: .25rem 0 1.25rem; opacity: .75; }
  ul { list-style: none; display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; margin: 0 0 1.5rem; }
  li { border: 1px solid var(--line); border-radius: .6rem; padding: .6rem 1rem; min-width: 8rem; }
  li b { display: block; font-size: 1.3rem; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; padding: .45rem .75rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
  th { font-weight: 600; opacity: .75; }
  .number { text-align: right; font-variant-numeric: tabular-nums; }
  .id { font-family: ui-monospace, monospace; }
  .status { border-radius: 1rem; padding: .1rem .6rem; background: var(--soft); }
  .complete { background: #2a7d4633; } .ready { background: #2f6fd033; } .pending { background: #c9921a33; }
  .declined, .returned, .admin { background: #c0392b33; }
</style>
</head>
<body>
<h1>Payroc sandbox</h1>
<main>
<!-- refunds -->
</main>
<script>
  const main = document.querySelector("main");
  setInterval(async () => {
    if (document.hidden) return;
    try {
      const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
      const fresh = page.querySelector("main").innerHTML;
      if (fresh !== main.innerHTML) main.innerHTML = fresh;
    } catch { /* the sandbox is down: keep what was shown last */ }
  }, 3000);
</script>
</body>
</html>
"""


def page_routes(sandbox: Sandbox) -> APIRouter:
    """Make the route of the page."""
    router = APIRouter()

    @router.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(render(sandbox))

    return router


def render(sandbox: Sandbox) -> str:
    """Write the page."""
    newest = sandbox.store.refunds([], limit=SHOWN_REFUNDS)
    if not newest:
        return _document("<p>No refunds yet. They appear here as they are created.</p>")
    requests = sandbox.store.creates_per_key([refund.idempotency_key for refund in newest])
    rows = "\n".join(_row(refund, requests.get(refund.idempotency_key, 0)) for refund in newest)
    total = sandbox.store.count_refunds()
    count = f"{total} refund{'s' if total > 1 else ''}, newest first"
    if total > SHOWN_REFUNDS:
        count += f"; the newest {SHOWN_REFUNDS} are shown"
    clock = instant(sandbox.store.now())[:16].replace("T", " ")
    return _document(
        f"<p>{count}. The sandbox's clock says {clock} UTC.</p>\n<ul>{_totals(sandbox.store.totals())}</ul>\n"
        '<table>\n<tr><th>Order</th><th class="number">Amount</th><th>Account</th><th>Status</th><th>Refund</th><th>Created (UTC)</th>'
        f'<th class="number">Times requested</th></tr>\n{rows}\n</table>'
    )


def money(amount: int, currency: str) -> str:
    """Write an amount for people: ``1,234.50 USD``."""
    digits = MINOR_DIGITS.get(currency, 2)
    return f"{amount / 10**digits:,.{digits}f} {currency}"


def _document(main: str) -> str:
    return _DOCUMENT.replace("<!-- refunds -->", main)


def _totals(totals: list[tuple[str, str, int, int]]) -> str:
    items = []
    for status, group in groupby(totals, key=itemgetter(0)):
        of_status = list(group)
        count = sum(refunds for _, _, refunds, _ in of_status)
        amounts = " + ".join(money(amount, currency) for _, currency, _, amount in of_status)
        items.append(f"<li>{escape(status)}<b>{count}</b>{escape(amounts)}</li>")
    return "".join(items)


def _shown(text: str) -> str:
    """Return a text of a request as HTML, and what can't be seen in it, such as a change of the writing's direction, by its number."""
    return escape("".join(char if char.isprintable() else f"\u27e8U+{ord(char):04X}\u27e9" for char in text))


def _row(refund: Refund, requests: int) -> str:
    status = escape(refund.status)
    return (
        f'<tr><td class="id">{_shown(refund.order_id)}</td><td class="number">{escape(money(refund.amount, refund.currency))}</td>'
        f'<td class="id">····{escape(refund.last4)}</td><td><span class="status {status}">{status}</span></td>'
        f'<td class="id">{refund.refund_id}</td><td>{instant(refund.created_at).replace("T", " ")[:-1]}</td>'
        f'<td class="number">{requests}</td></tr>'
    )
