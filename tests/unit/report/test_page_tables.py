"""Tables of the page as files: read back as they are shown."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from fedsgcg.server.report.page_tables import page_tables

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12).map(
    lambda text: " ".join(text.split())
)


def page(heads, rows):
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f'<table data-file="t"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


@given(st.lists(TEXT, min_size=2, max_size=2), st.lists(st.lists(TEXT, min_size=2, max_size=2)))
def test_law_a_table_is_read_back_and_no_cell_becomes_a_formula(heads, rows):
    (table,) = page_tables(page(heads, rows))
    assert (table.heads, table.rows) == (heads, rows)
    found = list(csv.reader(io.StringIO(table.csv().decode(), newline="")))
    assert len(found) == 1 + len(rows)
    for shown, row in zip(found, [heads, *rows], strict=True):
        assert [text.removeprefix("'") for text in shown] == [t.removeprefix("'") for t in row]
        assert not any(text.startswith(("=", "@")) for text in shown)


def test_groups_small_print_and_what_is_only_on_the_page():
    html = """<p>x</p><table><tr><td>without files</td></tr></table>
    <table data-file="claims"><caption>A
    caption</caption><thead><tr><th>Who<small>12 cases</small></th><th>p</th></tr></thead>
    <tbody><tr class="group"><th colspan="2">Dice</th></tr>
    <tr><th><svg><text>no</text></svg>HK <small data-page-only>Case <b>07</b></small></th>
    <td><div><span class="value"><b>0.9</b> ± 0.1</span><small>0.8 to 1</small></div></td></tr>
    </tbody></table>"""
    (table,) = page_tables(html)
    assert table.caption == "A caption"
    assert table.csv().decode() == ("Group,Who (12 cases),p\nDice,HK,0.9 ± 0.1 (0.8 to 1)\n")
    latex = table.latex().decode()
    assert r"\multicolumn{2}{l}{Dice} \\" in latex
    assert r"HK & 0.9 $\pm$ 0.1 (0.8 to 1) \\" in latex
