-- Writes what became of one refund into your table. This is the other file to edit for your own tables. It may run more
-- than once with the same values, and must not replace what is newer: hence the last condition. Parameters: source_ref, status (a status of the ledger, or 'invalid'),
-- payroc_refund_id, payroc_status, reason (a sentence for people, no bank data), updated_at (when the ledger changed).
UPDATE refund_requests
SET status           = :status,
    payroc_refund_id = :payroc_refund_id,
    payroc_status    = :payroc_status,
    reason           = :reason,
    updated_at       = :updated_at
WHERE source_ref = :source_ref
  AND (updated_at IS NULL OR updated_at <= :updated_at)
