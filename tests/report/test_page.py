"""A report's parts as HTML and as Markdown."""

from cllm.report.page import Plot, Plots, Section, Table, Value, as_html, as_markdown
from tests.report.reading import read

TABLE = Table(("x|y",), ((Value("1|2<3", 1.0),), (Value("4", 4.0, noise=True),)), frozenset({"x|y"}))
PLOTS = Plots("Curves", ("a", "b"), (Plot("one", "<svg></svg>"),))


def test_texts_are_escaped():
    sections = [Section("<b>", ("a & b",), (TABLE,), ("c < d",))]
    page, markdown = as_html("<t>", ["e > f"], sections), as_markdown("<t>", ["e > f"], sections)
    assert "1|2&lt;3" in page
    assert "<b>" not in page
    assert "1\\|2<3" in markdown
    assert read(page).tables == [[["x|y"], ["1|2<3"], ["4 ≈"]]]
    assert "| 4 ≈ |" in markdown


def test_figures_sort_by_their_value_from_a_button():
    attributes = read(as_html("t", [], [Section("s", (), (TABLE,))])).attributes
    assert [values.get("data-order") for tag, values in attributes if tag == "td"] == ["1", "4"]
    assert ("button", {"type": "button"}) in attributes  # reached and pressed from the keyboard
    assert [values["tabindex"] for tag, values in attributes if values.get("role") == "region"] == ["0"]


def test_markdown_has_no_plots_and_no_section_of_plots_alone():
    markdown = as_markdown(
        "t", [], [Section("alone", (), (PLOTS,), ("of a plot",)), Section("both", (), (TABLE, PLOTS))]
    )
    assert "alone" not in markdown
    assert "of a plot" not in markdown
    assert "## both" in markdown
    assert "svg" not in markdown


def test_a_legend_names_the_lines_of_several():
    page = as_html("t", [], [Section("s", (), (PLOTS, Plots("Curve", ("alone",), PLOTS.plots)))])
    assert page.count('class="legend"') == 1
    assert "alone" not in page
