-- The refunds that are approved and have not ended, one row each. This is one of the two files to edit for your own
-- tables: keep the names on the right of AS, put your columns on the left.
--
-- What each column may hold, and the sentence that refuses it: docs/boundaries.md.
--
-- source_ref              your own reference of the refund; it never changes and is never used for another refund. It has one spelling:
--                         no blanks at an end, a UUID in lower case with hyphens
-- processing_terminal_id  Payroc's terminal that pays
-- order_id                1 to 24 characters, unique per terminal; NULL: one is made
-- description             up to 256 characters; NULL: "Refund <order id>"
-- amount                  integer, in minor units (4999 for USD 49.99); a decimal with decimal places is refused
-- currency                ISO 4217, such as USD
-- name_on_account, routing_number, account_number: the payee's bank account, as text; NULL when secure_token is given
-- secure_token            Payroc's token of the payee's account, the recommended way: then no account number is kept
-- account_type            checking or savings
-- sec_code                ppd for a consumer, ccd for a business; NULL: that of PAYROC_REFUNDS_SEC_CODE. web is refused unless
--                         PAYROC_REFUNDS_ALLOW_SEC_WEB is true, tel always
-- email                   NULL unless Payroc shall notify the payee
-- requested_by, approved_by, approved_at: two different people, and an instant with its time zone (without one: UTC)
--
-- Keep a row in the result until its refund has ended: a row that is missing counts as withdrawn and is not released.
SELECT
    source_ref             AS source_ref,
    processing_terminal_id AS processing_terminal_id,
    order_id               AS order_id,
    description            AS description,
    amount                 AS amount,
    currency               AS currency,
    name_on_account        AS name_on_account,
    account_type           AS account_type,
    sec_code               AS sec_code,
    routing_number         AS routing_number,
    account_number         AS account_number,
    secure_token           AS secure_token,
    email                  AS email,
    requested_by           AS requested_by,
    approved_by            AS approved_by,
    approved_at            AS approved_at
FROM refund_requests
WHERE approved_at IS NOT NULL
  AND withdrawn_at IS NULL
  AND COALESCE(status, 'approved') NOT IN ('accepted', 'settled', 'returned', 'reversed', 'rejected', 'cancelled')
ORDER BY approved_at, source_ref
