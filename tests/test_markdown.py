"""What half a Markdown text needs so that it does not swallow what follows.

What a reader would make of it was checked with another implementation of CommonMark and of HTML;
here stands what came of that, rule by rule.
"""

import pytest
from hypothesis import given, settings, strategies as st

from agentsse.markdown import MAX_DEPTH, MAX_LENGTH, closing

# Pieces that mean something to Markdown or to HTML, alone or beside one another.
PIECES = """
``` ~~~ ```` ```py ` `` \\ > - * 1. 10. 2) # --- === __ a b.c <div> </div> <div <table> <tr> <td>
</td> </table> <details> </details> <summary> <pre> </pre> <script> </script> <style> <textarea>
<b> </b> <br/> <!-- --> -- <? ?> <!X <![CDATA[ ]]> < > / </ = " ' <a title=" <http://a.b>
"""
MARKUP = st.lists(
    st.sampled_from([*PIECES.split(), " ", "  ", "    ", "\t", "\n", "\n", "\n\n", "\r\n", "\r"])
).map("".join)


# In general


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "Plain text, with **bold that is cut",
        "# A heading",
        "A [link](http://exam",
        "- an item\n- another",
        "> a quote\n> goes on",
        "| a | b |\n|---|---|\n| 1 |",
        "a < b and b > a",
        "a & b <",
        "a paragraph\n===\n\n---\n",
    ],
)
def test_where_nothing_is_open_nothing_is_appended(text):
    """Most of Markdown ends with its paragraph, by itself."""
    assert "" == closing(text)


@given(MARKUP)
@settings(max_examples=300, deadline=None)
def test_what_is_closed_stays_closed(text):
    """Whatever the text, it can be closed, and then nothing is open any more."""
    assert "" == closing(text + closing(text))


@given(st.text())
@settings(deadline=None)
def test_any_text_can_be_closed(text):
    """No text is an error."""
    assert "" == closing(text + closing(text))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("```\n" * 100_000, 0),
        ("<b " + "`" * 100_000, 0),
        ("<b " + "".join("`" * (n % 300) + "a" for n in range(2_000)), 0),
        ("- " * 100_000 + "\n" * 100_000, 0),
        (">" * 100_000 + "\n" * 100_000, 0),
        ("a <!-- " * 100_000, 4),
        ("a <? <![CDATA[ <!X " * 100_000, 0),
        ("a <div>" * 100_000 + "</details>" * 100_000, 600_001),
        ("<table>" + "<tr><td>" * 50_000 + "</div>" * 50_000, 500_009),
        ('x <a b="' + "<a b=' " * 100_000, 0),
        ("x <a" + " b" * 100_000, 0),
        ("x <a " + " " * 100_000 + "<a", 0),
        ("<script>" + "</scrip" * 100_000, 10),
        ("> a\n" + "b\n" * 100_000, 0),
        ('<div a="' + "\n<div a='" * 100_000, 10),
    ],
    ids=lambda value: "" if isinstance(value, int) else repr(value[:12]),
)
def test_a_long_text_takes_no_longer_than_its_length(text, size):
    """Each of these would take hours if anything in it were looked at again and again."""
    assert size == len(closing(text, max_length=10_000_000))


@pytest.mark.parametrize("text", ["- ```\n{}\nx", "> - ```\n{}\nx", "- a\n{}\n  ```"])
def test_spaces_alone_are_a_blank_line(text):
    """However many there are; the block that is open goes on, or not, all the same."""
    assert {closing(text.format(""))} == {closing(text.format(" " * n)) for n in range(1, 4)}


def test_a_very_long_text_is_left_as_it_is():
    """To read it all would keep everybody waiting."""
    assert "\n```" == closing("```\n" + "a" * (MAX_LENGTH - 4))
    assert "" == closing("```\n" + "a" * MAX_LENGTH)


# Fences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```", "\n```"),
        ("```py\nprint(1)", "\n```"),
        ("```py\nprint(1)\n", "```"),
        ("~~~\na", "\n~~~"),
        ("````\n```\na", "\n````"),
        ("~~~~~ py ` `\na\n~~~~", "\n~~~~~"),
        ("   ```\na", "\n```"),
        ("```\na\n``", "\n```"),
        ("```\na\n~~~", "\n```"),
        ("```\na\n    ```", "\n```"),
        ("```\na\n``` py", "\n```"),
        ("```\na\n```\n\n```\nb", "\n```"),
        ("a\n```\nb", "\n```"),
        ("```\r\na\r```\n\n~~~\r", "~~~"),
    ],
)
def test_an_open_fence_is_closed_with_its_own_mark(text, expected):
    """The same character, as often as it was opened with."""
    assert expected == closing(text)


@pytest.mark.parametrize(
    "text",
    [
        "```\na\n```",
        "```\na\n  `````   ",
        "~~~\na\n~~~\t",
        "``` a`b\nc",
        "``\na",
        "    ```\na",
        "\t```\na",
        "a\n    ```",
        "Here: ```\na",
        "`a ``` b`",
    ],
)
def test_what_is_no_open_fence_is_left_alone(text):
    """A closed one, code within a line, and what is indented as code."""
    assert "" == closing(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- ```py\n  a", "\n  ```"),
        ("- ```py\n  a\n\n", "  ```"),
        ("1. do\n\n   ```\n   a", "\n   ```"),
        ("10) do\n\n    ```\n    a", "\n    ```"),
        ("- a\n  - b\n\n    ~~~~\n    c", "\n    ~~~~"),
        ("> ```\n> a", "\n> ```"),
        ("> - ```\n>   a\n", ">   ```"),
        ("-\n  ```\n  a", "\n  ```"),
        ("-     code\n  ```\n  a", "\n  ```"),
        ("+ a\n\n    ```\n    code", "\n  ```"),
        ("a\n- ```\n  b", "\n  ```"),
        ("a\n1. ```\n   b", "\n   ```"),
    ],
)
def test_a_fence_within_a_list_or_a_quote_is_closed_within_it(text, expected):
    """At the margin the mark would open a fence of its own."""
    assert expected == closing(text)


@pytest.mark.parametrize(
    "text",
    [
        "- ```py\n  a\nb",
        "> ```\n> a\nb",
        "> ```\n> a\n\n",
        "- ```\n  a\n- b",
        "-\n\n\n    ```",
        "a\n14. ```\nb",
        "a\n-\n    ```\n",
        "- - -\n    ```",
        "***\n    ```",
        "a\n---\n    ```",
        "# a\n    ```",
        "-     ```",
    ],
)
def test_a_fence_ends_with_what_it_stands_in(text):
    """And what begins no item, or comes too deep within one, has begun no fence."""
    assert "" == closing(text)


def test_a_fence_at_the_margin_ends_the_list():
    """Then it is open at the margin."""
    assert "\n```" == closing("1. do\n```\na")


def test_containers_are_followed_to_a_depth():
    """Deeper than anybody looks, they are text."""
    assert "\n" + "> " * MAX_DEPTH + "```" == closing("> " * MAX_DEPTH + "```")
    assert "" == closing("> " * (MAX_DEPTH + 1) + "```")


# HTML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<!-- a", "\n-->"),
        ("<!-- a\n\n```\nb", "\n-->"),
        ("<!--", "\n-->"),
        ("<!-- a --", "\n-->"),
        ("a <!-- b", "\n-->"),
        ("a <!-- b --> c <!-- d", "\n-->"),
        ("<div>\n<!-- a", "\n-->\n</div>"),
        ("<div>\n<!-- a\n\nb", "\n<!---->\n</div>"),
        ("- <!-- a\n\nb\n", "<!---->"),
        ("<?php\n\na", "\n?>"),
        ("<!X a", "\n>"),
        ("<![CDATA[ a >", "\n]]>"),
    ],
)
def test_a_comment_and_its_like_are_closed(text, expected):
    """In a text, where its end would be text as well, by another comment."""
    assert expected == closing(text)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- a -->",
        "<!-->",
        "<!--->",
        "<!-- a\n\nb --> c",
        "a <!-- b\n\nc",
        "a <? b ?> <!X> <![CDATA[ a ]]> c <? d",
        "`<!--` begins a comment",
        "<?php ?>\n",
        "<!X a>",
        "<!-\n\na",
    ],
)
def test_a_comment_that_is_closed_or_none_is_left_alone(text):
    """In a paragraph it is one only if it ends there."""
    assert "" == closing(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<details>\n\na", "\n</details>"),
        ("<details>\n<summary>a", "\n</summary></details>"),
        ("<table><thead><tr><th>a", "\n</th></tr></thead></table>"),
        ("<table>\n<tbody>\n<tr>\n<td>a</td>\n", "</tr></tbody></table>"),
        ("<table><caption>a", "\n</caption></table>"),
        ("<table><tfoot>", "\n</tfoot></table>"),
        ("a <div> b", "\n</div>"),
        ("<DIV CLASS='a'>\nb", "\n</div>"),
        ("<div>\n\n- <div>\n\n  a", "\n</div></div>"),
        ("<pre>\na\n\nb", "\n</pre>"),
        ("<pre>\n```\n", "</pre>"),
        ("<details>\n\n```\na", "\n```\n</details>"),
        ("<details>\n\n- ```\n  a", "\n  ```\n</details>"),
        ("# a <div>", "\n</div>"),
        ("a <div>\n===\nb", "\n</div>"),
        ("<div>\n***\n", "</div>"),
        ("<div>\n\n***\n", "</div>"),
        ("<div>\n\n    code", "\n</div>"),
        ("<div>\n\na\n    b", "\n</div>"),
        ("<div/>", "\n</div>"),
        ("<x-y>\n<div>", "\n</div>"),
        ("<div\n  class='a'\n  id = \"b\">\nc", "\n</div>"),
        ("> <div>\na", "\n</div>"),
    ],
)
def test_open_tags_are_closed_from_the_innermost_on(text, expected):
    """On a line of their own, behind whatever has come since."""
    assert expected == closing(text)


@pytest.mark.parametrize(
    "text",
    [
        "<details>\n\na\n\n</details>",
        "<div><div>a</div></div>",
        "<details><div>a</details>",
        "<b>a <p>b <x-y>",
        "a </div> b",
        "<tr><td>a table's part without a table",
        "`<div>` and ``a ` <div>`` and \\<div>",
        "`a\n<span> <div>`",
        "```\n<div>\n```",
        "    <div>",
        "a <div b <div cla",
        "<http://a.b/?<div",
        "<di",
        "<p>\n<\n</ a>\n<3",
        "<br/>\n\n</div >",
        "<div a=1 b>c</div\n>",
    ],
)
def test_tags_that_are_closed_or_none_are_left_alone(text):
    """Code, escapes, half tags in a paragraph, and tags that swallow nothing."""
    assert "" == closing(text)


def test_an_end_tag_in_a_cell_ends_nothing_around_the_table():
    """HTML keeps a cell to itself."""
    assert "\n</td></tr></table></div>" == closing("<div><table><tr><td></div>")
    assert "\n</table></div>" == closing("<div><table><tr><td><div>a</tr></div>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<div cla", "\n>\n</div>"),
        ('<div class="a', '\n">\n</div>'),
        ("<div class='a' id=", "\n>\n</div>"),
        ("<div>\n<spa", "\n>\n</div>"),
        ("<div>\na</div", "\n>"),
        ("<div>\n</", "\n>\n</div>"),
        ("- <div\n", "  >\n</div>"),
        ("<div\n\na", "\n</div>"),
        ("<div\n\n", "<!---->\n</div>"),
        ('<div a="\n\nb', '\n<!--"-->\n</div>'),
        ("<div>\n<!x\n\na", "\n</div>"),
        ("<div a=b'c>", "\n</div>"),
        ("<pre a", "\n>\n</pre>"),
    ],
)
def test_a_half_tag_is_completed(text, expected):
    """In a block of HTML, where it would take what follows for its attributes."""
    assert expected == closing(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<script>\nlet a", "\n</script>"),
        ("<script>\nlet a\n\nlet b\n", "</script>"),
        ("<STYLE>\n<div>", "\n</style>"),
        ("<textarea>\n```", "\n</textarea>"),
        ("<script src='a", "\n'></script>"),
        ("<script>\n</scrip", "\n</script>"),
        ("<script>\na</script", "\n>\n</pre>"),
        ("<script></style>", "\n</script>"),
        ("<div>\n<script>\na\n\nb", "\n</script>\n</div>"),
        ("Put it into a <script> tag:\n\n```js\na", "\n```\n</script>"),
    ],
)
def test_a_script_and_its_like_are_closed(text, expected):
    """What stands in them is neither Markdown nor HTML."""
    assert expected == closing(text)


@pytest.mark.parametrize(
    "text",
    [
        "<script>a</script>",
        "<style>\na\n</STYLE >\n</style>",
        "<pre>a</pre>\n",
        "<script>a\n</script>\n\nb",
    ],
)
def test_a_script_that_is_closed_is_left_alone(text):
    """Its block ends with it."""
    assert "" == closing(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("<pre></pre >", "\n</pre>"), ("<script></script >\na", "\n</pre>")]
)
def test_a_block_that_its_end_tag_has_not_ended_is_ended(text, expected):
    """Markdown looks for the end tag without a space in it."""
    assert expected == closing(text)
