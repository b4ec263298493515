"""
Engines whose rows stay out of every log.

At DEBUG SQLAlchemy logs each row that it reads, and a row of the source is a bank account.
"""

from __future__ import annotations

import logging
from typing import Any

_NAME = "refunds"

QUIET: dict[str, Any] = {"hide_parameters": True, "logging_name": _NAME}
"""Options for an engine: its errors and logs show no value, whatever the level of the logs."""


def _is_no_row(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


logging.getLogger(f"sqlalchemy.engine.Engine.{_NAME}").addFilter(_is_no_row)
