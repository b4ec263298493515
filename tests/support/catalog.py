"""What Postgres knows of the ledger's schema, as lines that two databases can be compared by."""

from __future__ import annotations

import psycopg

_RIGHT = "CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(a.grantee) END, a.privilege_type, a.is_grantable"
_LEDGER = "'refund_ledger'::regnamespace"
# The order of a table's columns is left out: a later migration can only add one at the end.
_QUERIES = {
    "schema": f"SELECT nspname, pg_get_userbyid(nspowner) FROM pg_namespace WHERE oid = {_LEDGER}",
    "right on schema": f"""
        SELECT nspname, {_RIGHT} FROM pg_namespace, aclexplode(COALESCE(nspacl, acldefault('n', nspowner))) AS a
        WHERE oid = {_LEDGER}""",
    "relation": f"""
        SELECT relname, relkind, pg_get_userbyid(relowner), relpersistence, reloptions::text
        FROM pg_class WHERE relnamespace = {_LEDGER} AND relkind IN ('r', 'v', 'S')""",
    "right on relation": f"""
        SELECT relname, {_RIGHT}
        FROM pg_class, aclexplode(COALESCE(
            relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))) AS a
        WHERE relnamespace = {_LEDGER} AND relkind IN ('r', 'v', 'S')""",
    "column": f"""
        SELECT relname, attname, format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated,
            attcollation::regcollation, pg_get_expr(adbin, adrelid)
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE relnamespace = {_LEDGER} AND relkind IN ('r', 'v') AND attnum > 0 AND NOT attisdropped""",
    "right on column": f"""
        SELECT relname, attname, {_RIGHT}
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid, aclexplode(attacl) AS a
        WHERE relnamespace = {_LEDGER} AND NOT attisdropped""",
    "constraint": f"""
        SELECT conrelid::regclass, conname, pg_get_constraintdef(oid), convalidated
        FROM pg_constraint WHERE connamespace = {_LEDGER}""",
    "index": f"""
        SELECT pg_get_indexdef(indexrelid), indisvalid
        FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE relnamespace = {_LEDGER}""",
    "statistics": f"""
        SELECT pg_get_statisticsobjdef(oid), pg_get_userbyid(stxowner)
        FROM pg_statistic_ext WHERE stxnamespace = {_LEDGER}""",
    "trigger": f"""
        SELECT pg_get_triggerdef(pg_trigger.oid), tgenabled
        FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
        WHERE relnamespace = {_LEDGER} AND NOT tgisinternal""",
    "function": f"""
        SELECT pg_get_functiondef(oid), pg_get_userbyid(proowner) FROM pg_proc WHERE pronamespace = {_LEDGER}""",
    "right on function": f"""
        SELECT oid::regprocedure, {_RIGHT}
        FROM pg_proc, aclexplode(COALESCE(proacl, acldefault('f', proowner))) AS a
        WHERE pronamespace = {_LEDGER}""",
    "view": f"""
        SELECT relname, pg_get_viewdef(oid) FROM pg_class WHERE relnamespace = {_LEDGER} AND relkind = 'v'""",
}


def catalog(connection: psycopg.Connection) -> set[str]:
    """
    Return a line for each object of the schema ``refund_ledger``, and for each right on one.

    :param connection: to the ledger's database.
    """
    connection.execute("SET search_path = ''")
    return {
        " | ".join((kind, *map(str, row)))
        for kind, query in _QUERIES.items()
        for row in connection.execute(query)
    }
