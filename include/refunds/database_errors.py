"""
Errors of databases by their meaning: what passes by itself and what does not, on each driver.

A driver's own words may quote a row, a statement, a connection string, or a merchant's trigger. None is
    passed
on. A failure is described by words of ours, by the class and the code of its error, and by the name of a
column, table or constraint.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an error says about the statement that failed."""

    UNAVAILABLE = "unavailable"
    """The server or the connection; passes by itself, and meanwhile no statement works."""
    LOCKED = "locked"
    """Another session is in the way; passes by itself, and may concern one row alone."""
    REFUSED = "refused"
    """A row or a value; stays as it is until the row, its table or a trigger is changed."""
    UNUSABLE = "unusable"
    """The statement, a right or the connection's settings; stays as it is until one of them is changed."""

    @property
    def is_transient(self) -> bool:
        """Whether the same statement may succeed a little later."""
        return self in (Kind.UNAVAILABLE, Kind.LOCKED)


Rule = tuple[Kind, str]

# SQLSTATEs and their classes; the longest entry that fits counts, and a state that fits none is refused.
# https://www.postgresql.org/docs/18/errcodes-appendix.html; other databases use these classes, too.
SQLSTATES: Mapping[str, Rule] = {
    "08": (Kind.UNAVAILABLE, "the connection failed"),
    "0A": (Kind.UNUSABLE, "the database does not support this"),
    "25006": (Kind.UNAVAILABLE, "the server only reads for now, as after a failover"),
    "25P03": (Kind.UNAVAILABLE, "the server ended a session that stood still"),
    "25P04": (Kind.LOCKED, "the transaction took too long"),
    "26": (Kind.UNUSABLE, "a prepared statement is gone, as behind a pooler that shares sessions"),
    "28": (Kind.UNAVAILABLE, "the server refuses the login"),
    "3D": (Kind.UNAVAILABLE, "the database does not exist"),
    "3F": (Kind.UNUSABLE, "a schema does not exist"),
    "40": (Kind.LOCKED, "another transaction was in the way"),
    "40P01": (Kind.LOCKED, "a deadlock with another session"),
    "42": (Kind.UNUSABLE, "the statement is not valid"),
    "42501": (Kind.UNUSABLE, "the login lacks a right"),
    "42703": (Kind.UNUSABLE, "a column does not exist"),
    "42883": (Kind.UNUSABLE, "a function or operator does not exist for these types"),
    "42P01": (Kind.UNUSABLE, "a table does not exist"),
    "42P05": (Kind.UNUSABLE, "a prepared statement exists already, as behind a pooler that shares sessions"),
    "22": (Kind.REFUSED, "a value does not fit"),
    "22001": (Kind.REFUSED, "a value is too long for its column"),
    "23": (Kind.REFUSED, "a constraint refuses the row"),
    "44": (Kind.REFUSED, "the check of a view refuses the row"),
    "53": (Kind.UNAVAILABLE, "the server has no connection, memory or disk space left"),
    "55000": (Kind.UNUSABLE, "the statement does not fit what it is about"),
    "55006": (Kind.LOCKED, "another session uses it"),
    "55P03": (Kind.LOCKED, "another session holds a lock"),
    "57": (Kind.UNAVAILABLE, "the server is shutting down or starting"),
    "57014": (Kind.LOCKED, "the statement took too long and was cancelled"),
    "58": (Kind.UNAVAILABLE, "the server has trouble with its system"),
    "72": (Kind.LOCKED, "the snapshot is too old"),
    "F0": (Kind.UNUSABLE, "the server's configuration is not valid"),
    "HYT": (Kind.LOCKED, "the statement took too long"),
    "P0": (Kind.REFUSED, "a trigger or function refuses the row"),
    "XX000": (Kind.UNAVAILABLE, "an internal error of the server"),
    "XX": (Kind.UNUSABLE, "data or an index of the server is damaged"),
}

_TIMED_OUT: Rule = (Kind.LOCKED, "the statement took too long and was cancelled")
_READ_ONLY: Rule = SQLSTATES["25006"]
_NO_LOGIN: Rule = SQLSTATES["28"]
_NO_RESOURCES: Rule = SQLSTATES["53"]
_SHUT_DOWN: Rule = SQLSTATES["57"]
_LOST: Rule = SQLSTATES["08"]
_NO_RIGHT: Rule = SQLSTATES["42501"]
_INVALID: Rule = SQLSTATES["42"]
_CONSTRAINT: Rule = SQLSTATES["23"]
_TRIGGER: Rule = (Kind.REFUSED, "a trigger refuses the row")

# Numbers of MySQL and MariaDB; a number that is not listed is refused.
# https://dev.mysql.com/doc/mysql-errors/8.4/en/ and https://mariadb.com/docs/server/reference/error-codes
MYSQL_NUMBERS: Mapping[int, Rule] = {
    1020: (Kind.LOCKED, "another session changed the row"),
    1205: (Kind.LOCKED, "another session holds a lock"),
    1206: (Kind.LOCKED, "the server has no room for more locks"),
    1213: (Kind.LOCKED, "a deadlock with another session"),
    1412: (Kind.LOCKED, "another session changed the table"),
    3572: (Kind.LOCKED, "another session holds a lock"),
    **dict.fromkeys((1317, 1969, 3024), _TIMED_OUT),
    **dict.fromkeys((1290, 1792, 1836), _READ_ONLY),
    **dict.fromkeys((1040, 1203, 1226, 1015, 1021, 1030, 1037, 1038, 1041, 1114, 1135), _NO_RESOURCES),
    **dict.fromkeys((1047, 1053, 1077, 1079, 1180), _SHUT_DOWN),
    **dict.fromkeys((1129, 1152, 1158, 1159, 1160, 1161, 1184, 1927), _LOST),
    **dict.fromkeys((2002, 2003, 2005, 2006, 2012, 2013, 2055), _LOST),
    **dict.fromkeys((1044, 1045, 1130, 1698, 1820), _NO_LOGIN),
    1049: SQLSTATES["3D"],
    1054: SQLSTATES["42703"],
    **dict.fromkeys((1051, 1109, 1146), SQLSTATES["42P01"]),
    **dict.fromkeys((1142, 1143, 1227, 1370), _NO_RIGHT),
    **dict.fromkeys((1046, 1064, 1065, 1149, 1267, 1271, 1295, 1305, 1356, 1449), _INVALID),
    2026: (Kind.UNUSABLE, "the server's certificate or encryption is not accepted"),
    **dict.fromkeys((1048, 1062, 1216, 1217, 1364, 1451, 1452, 3819, 4025), _CONSTRAINT),
    **dict.fromkeys((1264, 1265, 1292, 1366), SQLSTATES["22"]),
    1369: SQLSTATES["44"],
    1406: SQLSTATES["22001"],
    1644: _TRIGGER,
}

# Result codes of SQLite, extended ones first; a code that is not listed is refused.
# https://www.sqlite.org/rescode.html
SQLITE_CODES: Mapping[int, Rule] = {
    1811: _TRIGGER,
    1: _INVALID,
    3: (Kind.UNUSABLE, "the file may not be used"),
    5: (Kind.LOCKED, "another session holds the lock of the database"),
    6: (Kind.LOCKED, "another session holds a lock"),
    7: _NO_RESOURCES,
    8: (Kind.UNUSABLE, "the file or its folder may not be written"),
    9: _TIMED_OUT,
    10: (Kind.UNAVAILABLE, "the file can't be read or written"),
    11: (Kind.UNUSABLE, "the file is damaged"),
    13: _NO_RESOURCES,
    14: (Kind.UNUSABLE, "the file can't be opened"),
    15: (Kind.LOCKED, "another session holds the lock of the database"),
    17: (Kind.LOCKED, "another session changed the table"),
    19: _CONSTRAINT,
    23: _NO_RIGHT,
    26: (Kind.UNUSABLE, "the file is no database of SQLite"),
}

# Errors without a code, and drivers that have none: by the classes of the DB-API (PEP 249) and of Python.
BY_CLASS: Mapping[str, Rule] = {
    "DataError": (Kind.REFUSED, "a value does not fit"),
    "IntegrityError": _CONSTRAINT,
    "ProgrammingError": _INVALID,
    "NotSupportedError": SQLSTATES["0A"],
    "OperationalError": (Kind.UNAVAILABLE, "the database does not answer, or refuses the connection"),
    "InternalError": SQLSTATES["XX000"],
    "InterfaceError": (Kind.UNAVAILABLE, "the driver can't use the connection"),
    "UnicodeError": (Kind.REFUSED, "a value does not fit the encoding of the connection"),
    "OSError": (Kind.UNAVAILABLE, "the database can't be reached"),
    "InternalClientError": (Kind.UNAVAILABLE, "the driver lost the connection"),
}
_OTHER: Rule = (Kind.REFUSED, "the database refuses it")
_CERTIFICATE: Rule = (Kind.UNUSABLE, "the server's certificate is not accepted")

_REMEDIES: Mapping[Kind, str] = {
    Kind.UNAVAILABLE: "when that lasts, check the server and the connection",
    Kind.LOCKED: "it passes by itself; when it lasts, find the session in the way",
    Kind.REFUSED: "correct the row, its table or the trigger",
    Kind.UNUSABLE: "correct the statement, the rights or the connection",
}

_MYSQL_DRIVERS = ("MySQLdb", "pymysql", "mysql", "mariadb")
_NAME = r"[A-Za-z_][\w$]{0,62}"
# What servers say in English about names. Anything that looks otherwise names nothing.
_NAMES = tuple(
    re.compile(pattern.replace("NAME", rf"({_NAME})"))
    for pattern in (
        r'(?:column|relation|schema|type) "?(?:\w+\.)*NAME"? (?:of relation "[^"]*" )?does not exist',
        r"permission denied for \w+ NAME$",
        r"no such (?:column|table|function): (?:\w+\.)*NAME$",
        "CHECK constraint failed: NAME$",
        r"Unknown column '(?:\w+\.)*NAME' in ",
        r"Table '\w+\.NAME' doesn't exist$",
        r".{1,20} command denied to user .* for table (?:`\w+`\.)?[`']NAME[`']$",
        "(?:Data (?:too long|truncated)|Out of range value) for column 'NAME' at row",
        "Column 'NAME' cannot be null$",
        "CONSTRAINT `NAME` failed for",
        "Check constraint 'NAME' is violated",
    )
)


@dataclass(frozen=True, slots=True)
class Failure:
    """
    An error of a database, described without a word of its own.

    :param kind: what it says about the statement.
    :param error: class of the driver's error and its code, such as ``UndefinedColumn, SQLSTATE 42703``.
    :param meaning: what is wrong, in words of ours.
    """

    kind: Kind
    error: str
    meaning: str

    @property
    def remedy(self) -> str:
        """What to do."""
        return _REMEDIES[self.kind]

    def __str__(self) -> str:
        return f"{self.meaning} ({self.error})"


def describe(error: BaseException) -> Failure:
    """
    Return what an error of a database means.

    :param error: an error of psycopg, psycopg2, asyncpg, a driver of MySQL, ``sqlite3`` or another driver of
        the DB-API, the error of SQLAlchemy around it, or an error of the network.
    """
    driver = getattr(error, "orig", None) or error
    rule, code = _rule(driver)
    if rule is None:
        lost = getattr(error, "connection_invalidated", False)
        rule = _LOST if lost else _by_class(driver)
    kind, meaning = rule
    name = _name(driver) if rule is not _TRIGGER else None
    return Failure(
        kind,
        f"{type(driver).__name__}{f', {code}' if code else ''}",
        f"{meaning}{f': {name}' if name else ''}",
    )


def _rule(error: BaseException) -> tuple[Rule | None, str]:
    """Return the rule for an error's code and how the code is written; none for an error without a code."""
    family = type(error).__module__.partition(".")[0]
    first = error.args[0] if error.args else None
    if family in _MYSQL_DRIVERS:
        number = getattr(error, "errno", first)
        if isinstance(number, int) and number > 0:
            return MYSQL_NUMBERS.get(number, _OTHER), f"error {number}"
    elif isinstance(code := getattr(error, "sqlite_errorcode", None), int):
        rule = SQLITE_CODES.get(code) or SQLITE_CODES.get(code & 0xFF, _OTHER)
        return rule, str(getattr(error, "sqlite_errorname", code))
    else:
        # psycopg and asyncpg, psycopg2, and drivers of ODBC.
        for state in (getattr(error, "sqlstate", None), getattr(error, "pgcode", None), first):
            if isinstance(state, str) and re.fullmatch("[0-9A-Z]{5}", state):
                prefixes = (state[:length] for length in (5, 3, 2))
                rule = next((SQLSTATES[prefix] for prefix in prefixes if prefix in SQLSTATES), _OTHER)
                return rule, f"SQLSTATE {state}"
    return None, ""


def _by_class(error: BaseException) -> Rule:
    names = [kind.__name__ for kind in type(error).__mro__]
    # libpq has no code for a connection that failed, and OpenSSL's words about certificates are English only.
    if isinstance(error, ssl.SSLCertVerificationError) or (
        "OperationalError" in names and "certificate" in str(error)
    ):
        return _CERTIFICATE
    return next((BY_CLASS[name] for name in names if name in BY_CLASS), _OTHER)


def _name(error: BaseException) -> str | None:
    """Return the column, table or constraint that an error names, unless a trigger may have worded it."""
    about = getattr(error, "diag", None) or error
    function = getattr(about, "source_function", None) or getattr(about, "server_source_function", None)
    if function == "exec_stmt_raise":
        return None
    for attribute in ("constraint_name", "column_name"):
        value = getattr(about, attribute, None)
        if isinstance(value, str) and re.fullmatch(_NAME, value):
            return value
    if getattr(about, "context", None):
        return None
    line = str(error.args[-1] if error.args else error).partition("\n")[0]
    return next((found[1] for pattern in _NAMES if (found := pattern.match(line))), None)
