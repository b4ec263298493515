"""The tables of a refund, and all of its columns, for tests that look at what the view ``refunds`` leaves out."""

REFUNDS = """
    (SELECT r.*, i.source_ref_folded, i.requested_by_folded, i.approved_by_folded, i.request_sha256, s.sent_with,
            q.request
     FROM refund_ledger.refunds AS r
     JOIN refund_ledger.refund_instructions AS i ON i.id = r.id
     JOIN refund_ledger.refund_states AS s ON s.refund_id = r.id
     JOIN refund_ledger.frozen_requests AS q ON q.refund_id = r.id) AS refund"""
"""Every refund with all of its columns, as the FROM of a query."""

TABLES = ("refund_instructions", "frozen_requests", "refund_states", "first_releases", "refund_attempts")
"""The tables with rows of single refunds, in ``refund_ledger``."""

TRAIL = ("refund_events", "event_seals")
"""The tables of the audit trail."""

LISTS = ("terminals", "foreign_refunds")
"""The tables of what Payroc's lists showed."""
