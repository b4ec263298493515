"""What the demo says when it cannot go on."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on; the message says why, and what to do, in a sentence for the person who watches."""
