"""
Foreign text, made safe to show: on a terminal, in a log, a mail, a chat, in Markdown and in HTML.

Foreign is everything that this project did not write itself: the source's columns, reasons and names that
people typed, Payroc's words, run ids, logins, names of files and columns, and so every text that is read from
the ledger.

The form is the same for all outputs, and shows what it replaces:

- a character that can't be seen, moves the cursor, ends the line or turns the direction of writing is shown
  as ``⟨U+202E⟩``;
- a character that some output takes for markup is shown as one that looks like it (``<!channel>`` as
  ``‹!channel›``).

Where such a look-alike, or ``⟨``, is in the text itself, it is shown as ``⟨U+2039⟩``: so nothing can be forged,
and no two texts are shown alike, short of their cut-off ends.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST = 1000
"""Characters of a text that are shown when the caller does not say otherwise."""

LOOK_ALIKES = {
    "<": "\u2039",  # HTML; <!channel>, <@U123> and <https://…|text> in Slack; <@1> in Discord
    ">": "\u203a",
    "[": "\u27e6",  # rich; links in Markdown
    "]": "\u27e7",
    "`": "\u2035",  # code in Markdown and in our mails
    "*": "\u2217",  # emphasis in Markdown and in chats
    "_": "\uff3f",
    "~": "\u223c",
    "|": "\u00a6",  # tables in Markdown, hidden text in Discord
    "@": "\uff20",  # mentions
    "&": "\uff06",  # character references
    ":": "\u2236",  # addresses, emoji such as :fire:, groups of Airflow's log such as ::group::
    "{": "\u2774",  # Jinja
}
"""What each character of markup is shown as. None of these is made a character of ASCII again by NFC."""

# Some of them are markup only where they stand: an underscore inside a word, the @ of an address or the colon of
# a time is not.
_MARKUP = re.compile(
    r"""[<>\[\]`*~|]
      | \b_+ | _+\b
      | @(?:(?<![\w.+-]@)(?=\w) | (?=(?:everyone|here|channel|all|group|room|team)(?![^\W_])))
      | &(?=\#|\w+;)
      | :(?=// | [a-z+-][\w+-]*:)
      | \{(?=[{%\#])""",
    re.VERBOSE | re.IGNORECASE,
)
# A blank at an end can't be seen, and several in a row could be taken for the gap between two columns.
_BLANK = re.compile(r"^\ |\ (?=\ )|\ $")
# Characters that Python calls printable and nobody sees: they join letters, fill a syllable, choose a glyph.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0e\uffa0\U000e0100-\U000e01ef]"
)
_OF_OURS = re.compile(f"[\u27e8{''.join(LOOK_ALIKES.values())}]")


def printable(value: object, *, limit: int = LONGEST) -> str:
    """
    Return a foreign value as text for any output, in one line and without markup.

    It is for one value, once: what is put around it, such as a sentence of ours, keeps its backticks.

    :param value: the value; ``None`` is shown as nothing.
    :param limit: characters of it that are shown. A longer one ends with how many more there are, as ``⟨12 more⟩``.
    """
    whole = "" if value is None else str(value)
    text = whole[:limit]
    text = _OF_OURS.sub(_escape, text)
    text = _MARKUP.sub(lambda found: "".join(LOOK_ALIKES[char] for char in found[0]), text)
    if text and unicodedata.category(text[0]).startswith("M"):
        # It would change the character before the text, which is ours.
        text = _code(text[0]) + text[1:]
    text = visible(_BLANK.sub(_escape, text))
    return f"{text}\u27e8{len(whole) - limit:,} more\u27e9" if len(whole) > limit else text


def visible(line: str) -> str:
    """
    Return a line with every character that can't be seen, or could end the line, shown as ``⟨U+000A⟩``.

    It is for what is put together already, right before it is shown: it changes no markup, and nothing the
    second time.
    """
    if not line.isprintable():
        line = "".join(char if char.isprintable() else _code(char) for char in line)
    return _UNSEEN.sub(_escape, line)


def _escape(found: re.Match[str]) -> str:
    return "".join(map(_code, found[0]))


def _code(char: str) -> str:
    return f"\u27e8U+{ord(char):04X}\u27e9"
