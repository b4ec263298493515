"""Any text, as people see it: one line, no markup of any output, nothing forged, and ordinary text as it is."""

from __future__ import annotations

import io
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from rich.errors import MarkupError

from include.refunds import printable as module
from include.refunds.message import environment
from include.refunds.printable import LOOK_ALIKES, printable, visible

# Any code point, and often something that an output could take for more than text.
TEXTS = st.lists(
    st.one_of(
        st.characters(exclude_categories=()),
        st.sampled_from(
            "<>[]()`*_~|@&;:{}%#!/\\\x1b\n\r\t\0 \u2028\u2029\u202e\u200b\ufeff\ud83d\u0301\u3164\u27e8\u2039"
        ),
        st.sampled_from(
            [
                "[/bold]",
                "[red]",
                "[a](https://x.example)",
                "<!channel>",
                "<@U123>",
                "<b>",
                "@here",
                "@everyone",
                "&lt;",
                "&#8238;",
                ":fire:",
                "::group::",
                "\r\nBcc: x@example.com",
                "\nTotals:",
                "{{ 1 }}",
                "**",
                "``",
                "  ",
            ]
        ),
        st.sampled_from("ab1 "),
    ),
    max_size=20,
).map("".join)
ORDINARY = st.lists(
    st.text(
        st.sampled_from("abcXYZäéßñøçŁ李明あ한שaبгДηकఅ0123456789'’.,-&/()!?+=%😀👍🏽€"),
        min_size=1,
        max_size=12,
    ),
    min_size=1,
    max_size=5,
).map(" ".join)


def is_safe(text: str) -> None:
    """The property: whatever the text is, what is shown of it is safe in every output."""
    shown = printable(text)
    assert all(char.isprintable() and unicodedata.category(char) != "Cf" for char in shown), shown
    assert len(f"a{shown}b".splitlines()) == 1
    assert not re.search(r"  |^ | $|[\u115f\u3164\ufe00]", shown)
    # Nobody sees the same for two texts.
    assert original_of(shown) == text
    assert visible(shown) == shown
    assert terminal(shown) == shown
    assert html(shown) == ([], shown)
    assert html(environment().filters["code"](f"`{shown}`")) == (["code"], shown)
    for around in ("{} is x", "x {} y", "x `y` {}"):
        assert markdown(around.format(shown)) <= {"text", "code_inline"}
    # What chats, Airflow's log and templates would take for more than text.
    assert not re.search(
        r"[<*~|]|\b_|_\b|@(everyone|here|channel)\b|(?<![\w.+-])@\w|://|:[a-z]+:|\{[{%#]|&(#|\w+;)",
        shown,
        re.IGNORECASE,
    )


def test_a_long_text_is_cut_off_and_says_how_much_is_missing() -> None:
    assert printable("x" * 5000, limit=3) == "xxx\u27e84,997 more\u27e9"
    assert printable("xxx\u27e84,997 more\u27e9") == "xxx\u27e8U+27E8\u27e94,997 more\u27e9"
    assert len(printable("\x1b" * 5000)) < 10_000


def original_of(shown: str) -> str:
    """Read back what a text was."""
    ours = {look: char for char, look in LOOK_ALIKES.items()}
    plain = re.sub(f"[{''.join(ours)}]", lambda found: ours[found[0]], shown)
    return re.sub("\u27e8U\\+([0-9A-F]{4,6})\u27e9", lambda found: chr(int(found[1], 16)), plain)


def terminal(shown: str) -> str:
    """Print as rich's markup, though our own commands do not."""
    console = Console(
        file=io.StringIO(), width=10_000, highlight=False, color_system="truecolor", force_terminal=True
    )
    console.print(shown, soft_wrap=True, end="")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def html(text: str) -> tuple[list[str], str]:
    """Return the tags that a browser finds in a text that one of our templates shows, and its text."""
    tags: list[str] = []
    texts: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.handle_data = texts.append  # type: ignore[method-assign]
    parser.feed(environment().from_string("{{ text }}").render(text=text))
    parser.close()
    return tags, "".join(texts)


def markdown(text: str) -> set[str]:
    """Return which kinds of inline elements Markdown, with tables and strikethrough, finds in a line."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["strikethrough", "table"])
    (inline,) = [token for token in reader.parse(text) if token.type == "inline"]
    return {child.type for child in inline.children or ()}


@given(TEXTS)
@example("\x1b[2K\rPaid 12.00")
@example("[/bold]")
@example("a\nTotals:\n…")
@example("<!channel>")
def test_any_text_is_shown_in_one_line_without_markup(text: str) -> None:
    is_safe(text)


@given(ORDINARY)
@example("O'Brien & Söhne")
@example("SO-104_283 scheduled__2026-11-30T17:04:00+00:00")
@example("ann.lee+1@example.com")
@example("José Łukasz שלום 👍🏽 ❤️ 1️⃣")
@example("CORP\\ann")
def test_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text


NEVER = re.compile("(?!)")
# A rule of the module that is left out.
MISTAKES = {
    "control characters": ("visible", lambda line: line.replace("\n", " ").replace("\r", " ")),
    "unseen letters": ("_UNSEEN", NEVER),
    "blanks": ("_BLANK", NEVER),
    "all markup": ("_MARKUP", NEVER),
    "rich and links": ("_MARKUP", re.compile(r"[<>`*_~|@&:{]")),
    "HTML and chats": ("_MARKUP", re.compile(r"[\[\]`*_~|@&:{]")),
    "mentions": ("_MARKUP", re.compile(r"[<>\[\]`*_~|&:{]")),
    "code": ("_MARKUP", re.compile(r"[<>\[\]*_~|@&:{]")),
    "emphasis": ("_MARKUP", re.compile(r"[<>\[\]`|@&:{]")),
    "character references": ("_MARKUP", re.compile(r"[<>\[\]`*_~|@:{]")),
    "addresses and emoji": ("_MARKUP", re.compile(r"[<>\[\]`*_~|@&{]")),
    "templates": ("_MARKUP", re.compile(r"[<>\[\]`*_~|@&:]")),
    "forged look-alikes": ("_OF_OURS", NEVER),
}


@pytest.mark.parametrize("rule", MISTAKES)
def test_the_property_finds_a_planted_mistake(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, mistake = MISTAKES[rule]
    monkeypatch.setattr(module, name, mistake)
    property_of_texts = settings(phases=[Phase.generate])(given(TEXTS)(is_safe))
    with pytest.raises((AssertionError, MarkupError)):
        property_of_texts()
