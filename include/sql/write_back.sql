-- Writes the outcome of one refund into your table. This is the other file to edit for your own tables.
-- Parameters: source_ref, status (a status of the ledger, or 'invalid'), payroc_refund_id, payroc_status,
-- reason (a sentence for people, no bank data), updated_at (when the ledger changed, in whole seconds).
--
-- It may run more than once with the same values, and then has to touch the row again; it must not replace newer values:
-- hence the last two conditions. Find exactly one row: a row that is not found is reported and stays due.
UPDATE refund_requests
SET status           = :status,
    payroc_refund_id = :payroc_refund_id,
    payroc_status    = :payroc_status,
    reason           = :reason,
    updated_at       = :updated_at
WHERE source_ref = :source_ref
  AND (updated_at IS NULL OR updated_at <= :updated_at OR status = :status)
