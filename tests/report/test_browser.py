"""The report in a browser: tables sort, a phone scrolls no page sideways, dark text can be read, nothing is loaded."""

from collections.abc import Iterator
from typing import Any

import pytest

from cllm.report.benchmark import write_report
from tests.browser import CHROMIUM, DESKTOP, PHONE, chromium
from tests.report.ablations import made_up_ablation
from tests.report.measured import spider_results
from tests.report.test_served import load_document, overhead_document

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

READABLE = 4.5  # contrast of text by WCAG 2.1, AA
CONTRASTS = """() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => {
        const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
        const [r, g, b] = parts(colour).map(x => linear(x / 255));
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const ground = element => {
        const own = getComputedStyle(element).backgroundColor;
        return parts(own)[3] === 0 ? ground(element.parentElement) : own;
    };
    const found = {};
    const texts = "p, li, a, h1, h2, h3, th button, td, abbr, figcaption, svg text";
    for (const element of document.querySelectorAll(texts)) {
        const style = getComputedStyle(element);
        const ink = element instanceof SVGElement ? style.fill : style.color;
        const [a, b] = [light(ink), light(ground(element))].sort((x, y) => y - x);
        found[`${element.tagName} ${ink} on ${ground(element)}`] = (a + .05) / (b + .05);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report in which every section has something to show."""
    served = [load_document(), overhead_document()]
    folder = tmp_path_factory.mktemp("report")
    page, _ = write_report(spider_results(), folder, ablations=[made_up_ablation()], served=served)
    return page.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as library, chromium(library, tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture
def complaints() -> list[str]:
    """What the browser found wrong: errors, and requests for anything but the page itself."""
    return []


@pytest.fixture
def page(browser: Any, url: str, complaints: list[str]) -> Iterator[Any]:
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url != url else None)
    page.set_viewport_size(DESKTOP)
    page.goto(url)
    yield page
    page.close()


def column(page: Any, section: str, head: str) -> tuple[Any, list[str]]:
    """The button of a column's head, and the column's texts."""
    table = page.locator(f"#{section} table").first
    heads = table.locator("th").all_inner_texts()
    index = [text.strip(" ▲▼") for text in heads].index(head) + 1
    return table.locator(f"th:nth-child({index}) button"), table.locator(
        f"tbody td:nth-child({index})"
    ).all_inner_texts()


def test_a_columns_head_sorts_by_its_figures(page: Any, complaints: list[str]) -> None:
    button, before = column(page, "all-cells", "tokens/s")
    button.click()
    _, falling = column(page, "all-cells", "tokens/s")
    button.click()
    _, rising = column(page, "all-cells", "tokens/s")
    medians = [float(text.partition(" ")[0].replace(",", "")) for text in rising]
    assert medians == sorted(medians)
    assert falling == sorted(before, key=lambda text: -float(text.partition(" ")[0].replace(",", "")))
    assert button.locator("..").get_attribute("aria-sort") == "ascending"
    assert complaints == []


def test_what_has_no_figure_sorts_last_and_texts_sort_as_texts(page: Any) -> None:
    button, _ = column(page, "all-cells", "− teacher AR, points")
    for _ in range(2):
        button.click()
        found = column(page, "all-cells", "− teacher AR, points")[1]
        assert "–" in found
        assert "–" not in found[: -found.count("–")]
    button, names = column(page, "all-cells", "method")
    button.focus()
    page.keyboard.press("Enter")
    assert column(page, "all-cells", "method")[1] == sorted(names, key=str.lower)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_tables_scroll_and_the_page_does_not(page: Any, size: dict[str, int], complaints: list[str]) -> None:
    page.set_viewport_size(size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    region = page.locator("#all-cells .scroll")
    assert region.evaluate("region => region.scrollWidth > region.clientWidth")
    region.evaluate("region => { region.scrollLeft = 10000; }")
    # The first column stays where it is, and leaves room for others.
    first = page.locator("#all-cells tbody tr:first-child td:first-child").bounding_box()
    assert first["x"] == pytest.approx(region.bounding_box()["x"], abs=1)
    assert first["width"] < size["width"] / 2
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    found = page.evaluate(CONTRASTS)
    assert len(found) >= 8
    assert {what: ratio for what, ratio in found.items() if ratio < READABLE} == {}


def test_every_link_of_the_contents_leads_to_a_section(page: Any, complaints: list[str]) -> None:
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    page.locator("nav a").last.click()
    assert page.locator("section").last.locator("h2").is_visible()
    assert complaints == []
