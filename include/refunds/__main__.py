"""``python -m include.refunds``: the ledger's commands."""

from include.refunds.cli import main

main()
