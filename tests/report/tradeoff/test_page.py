"""The page in a browser: Debian's Chromium, driven by Playwright. Skipped where one of both is missing."""

from __future__ import annotations

import shutil

import pytest

from lkda.report.training.comparison import compare
from tests.report.conftest import write_run

playwright = pytest.importorskip("playwright.sync_api", reason="there is no Playwright: pip install -e '.[browser]'")
CHROMIUM = shutil.which("chromium")
# The distinct background colours of the charts.
BACKGROUNDS = "[...new Set([...document.querySelectorAll('svg.marks')].map(e => getComputedStyle(e).backgroundColor))]"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def path(bench, tmp_path_factory):
    home = tmp_path_factory.mktemp("page")
    runs = [
        write_run(home / f"{mixer}_{s}", mixer, seed=s, model="tiny") for mixer in ("kda", "softmax") for s in (0, 1)
    ]
    compare(runs, home / "out", title="In a browser", benchmarks=[bench])
    return home / "out" / "report.html"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, path):
    """Opens the page without a network, and fails at the end if it logged an error or asked for anything."""
    opened, said = [], []

    def open_at(width=1440, theme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        opened.append(page)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        charts = page.locator(".chart")
        for n in range(charts.count()):
            charts.nth(n).locator("svg.marks").wait_for()
        return page

    yield open_at
    for page in opened:
        page.close()
    assert said == []


def table(page, heading):
    return page.locator(f"h2:has-text('{heading}') ~ div.scroll table.sortable").first


def column(shown, n):
    return shown.locator(f"tbody tr td:nth-child({n})").all_inner_texts()


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (360, "dark")])
def test_everything_is_drawn_and_nothing_is_wider_than_the_screen(open_page, width, theme):
    page = open_page(width, theme)
    assert page.locator(".chart svg.marks").count() == page.locator(".chart").count() == 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("p.lead").first.inner_text().startswith("With 1.02M training tokens, choose kda")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[theme]
    assert page.evaluate(BACKGROUNDS) == [background]


def test_the_state_is_on_a_laptop_and_a_phone_is_told_that_tables_scroll(open_page):
    hint = "e => getComputedStyle(e.parentElement, '::before').content"
    wide = table(open_page(1440), "Runs")
    assert wide.evaluate("e => e.offsetWidth") < 1440
    head = wide.locator("thead tr").first.locator("th")
    assert [text.strip() for text in head.all_inner_texts()][2:5] == ["seeds", "bits/byte", "state"]
    box = head.nth(4).bounding_box()
    assert box["x"] + box["width"] < 900
    narrow = table(open_page(360), "Runs")
    assert narrow.evaluate("e => e.offsetWidth > e.parentElement.clientWidth")
    answers = open_page(1440).locator("table.sortable").first
    assert answers.evaluate(hint) == "none"
    assert "Scroll sideways" in narrow.evaluate(hint)


def test_a_context_is_found_as_it_is_typed(open_page):
    page = open_page()
    for typed in ("4,096", "4096"):
        page.locator("input[type=search]").first.fill(typed)
        page.wait_for_timeout(500)
        assert column(page.locator("table.sortable").first, 2) == ["4K"]


def test_the_charts_follow_a_change_of_the_theme(open_page):
    page = open_page()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"String({BACKGROUNDS}) === 'rgb(21, 23, 26)'", timeout=10_000)


def test_a_table_is_sorted_by_number(open_page):
    page = open_page()
    shown = table(page, "All measurements")
    heading = shown.locator("thead th", has_text="tokens/s").first
    heading.click()
    page.wait_for_timeout(500)
    rising = [float(text.replace(",", "") or -1) for text in column(shown, 5)]
    heading.click()
    page.wait_for_timeout(500)
    falling = [float(text.replace(",", "") or -1) for text in column(shown, 5)]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert falling[0] >= rising[-1] > rising[0]


def test_a_table_is_filtered_by_a_column(open_page):
    page = open_page()
    shown = table(page, "All measurements")
    assert len(set(column(shown, 1))) > 1
    shown.locator("thead .dtcc-button_dropdown").first.click()
    page.locator(".dtcc-list-buttons button", has_text="decode").click()
    page.keyboard.press("Escape")
    page.wait_for_timeout(500)
    assert set(column(shown, 1)) == {"decode"}
    shown.locator("thead input").first.fill("batch 1")
    page.wait_for_timeout(500)
    assert len(column(shown, 1)) == 7


def test_the_keyboard_sorts_a_table_scrolls_it_and_opens_a_command(open_page):
    page = open_page(360)
    region = page.get_by_role("region", name="All measurements")
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(500)
    assert region.evaluate("e => e.scrollLeft") > 0
    shown = table(page, "All measurements")
    before = column(shown, 2)
    shown.locator("thead th", has_text="mixer").first.locator("[tabindex='0']").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    assert column(shown, 2) == sorted(before)
    page.keyboard.press("Tab")
    summary = shown.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert shown.locator("details[open] code").inner_text().startswith("python scripts/benchmark.py task=")


def test_links_lead_to_the_sections(open_page):
    page = open_page()
    page.locator("nav a", has_text="All measurements").click()
    assert page.locator("h2:has-text('All measurements')").evaluate("e => e.getBoundingClientRect().top") < 900


def test_a_tooltip_names_run_seed_and_configuration(open_page):
    page = open_page()
    page.locator("#front_by_state .mark-symbol path").first.hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    text = tooltip.inner_text()
    for word in ("kda", "seed", "configuration", "tiny"):
        assert word in text


def test_on_a_phone_a_tap_shows_a_tooltip_and_a_finger_on_a_chart_scrolls_the_page(browser, path):
    context = browser.new_context(viewport={"width": 360, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(path.as_uri())
    marks = page.locator("#front_by_state .role-mark.mark-symbol path")
    marks.last.wait_for()
    page.evaluate("document.querySelector('#front_by_state').scrollIntoView({block: 'center'})")
    marks.last.tap(force=True)
    page.locator("#vg-tooltip-element.visible").wait_for()
    labels, before = page.locator("#front_by_state .role-axis-label").all_text_contents(), page.evaluate("scrollY")
    box = page.locator("#front_by_state svg.marks").bounding_box()
    finger = {"x": box["x"] + 150, "y": box["y"] + 200}
    touch = context.new_cdp_session(page)
    for kind, moved in [("touchStart", 0), *(("touchMove", 15 * n) for n in range(1, 10))]:
        points = [{"x": finger["x"], "y": finger["y"] - moved}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait_for_timeout(16)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_timeout(300)
    assert page.evaluate("scrollY") > before + 50
    assert page.locator("#front_by_state .role-axis-label").all_text_contents() == labels
    context.close()


def test_the_wheel_zooms_with_ctrl_alone_and_two_clicks_go_back(open_page):
    page = open_page()
    chart = page.locator("#front_by_state svg.marks")
    chart.scroll_into_view_if_needed()

    def ticks(action=lambda: None):
        box = chart.bounding_box()
        page.mouse.move(box["x"] + 250, box["y"] + 150)
        action()
        page.wait_for_timeout(400)
        return set(page.locator("#front_by_state .role-axis-label text").all_text_contents())

    def zoom():
        page.keyboard.down("Control")
        page.mouse.wheel(0, -300)
        page.keyboard.up("Control")

    at_first = ticks()
    assert ticks(lambda: page.mouse.wheel(0, -100)) == at_first
    assert ticks(zoom) != at_first
    box = chart.bounding_box()
    assert ticks(lambda: page.mouse.dblclick(box["x"] + 251, box["y"] + 151)) == at_first


def test_the_menu_changes_the_chart(open_page):
    page = open_page()
    marks = page.locator("#front_by_speed .mark-symbol path")
    before = [marks.nth(n).get_attribute("transform") for n in range(marks.count())]
    page.locator("#front_by_speed select").select_option(index=2)
    page.wait_for_timeout(300)
    assert [marks.nth(n).get_attribute("transform") for n in range(marks.count())] != before


def filtered(page, shown, heading, condition, typed):
    """The cells of a column after its filter."""
    names = [text.strip() for text in shown.locator("thead tr").first.locator("th").all_inner_texts()]
    n = names.index(heading)
    control = shown.locator("thead tr").nth(1).locator("td").nth(n)
    control.locator("select").select_option(condition)
    control.locator("input").fill(typed)
    page.wait_for_timeout(300)
    cells = [] if shown.locator("td.dt-empty").count() else column(shown, n + 1)
    control.locator("input").fill("")
    page.wait_for_timeout(300)
    return cells


def test_numbers_are_filtered_by_their_value_whatever_their_cells_say(open_page):
    page = open_page()
    runs = table(page, "Runs")
    assert filtered(page, runs, "seeds", "equal", "2") == ["2", "2"]
    assert filtered(page, runs, "seeds", "less", "2") == []
    accuracies = filtered(page, runs, "bits/byte", "less", "100")
    assert len(accuracies) == 2
    assert all(" ± " in cell for cell in accuracies)
    assert filtered(page, runs, "bits/byte", "equal", accuracies[0].split()[0]) == accuracies[:1]
    assert filtered(page, runs, "state", "less", "1 MiB") == ["146 KiB"]
    assert filtered(page, runs, "state", "greaterOrEqual", "1048576") == ["1 MiB"]
    assert filtered(page, runs, "params", "equal", "1.19M") == ["1.19M", "1.19M"]
    assert filtered(page, runs, "params", "equal", "a word") == []
    crossing = table(page, "Where one mixer overtakes another")
    assert filtered(page, crossing, "longest context", "equal", "4K") == ["4K"]
    assert filtered(page, crossing, "from context", "less", "1M") == ["7.8K"]  # empty cells are not less
    measured = table(page, "All measurements")
    assert "" not in filtered(page, measured, "tokens/s", "less", "1e12")
    assert "" not in filtered(page, measured, "tokens/s", "notEqual", "50")
    assert set(filtered(page, measured, "tokens/s", "lessOrEqual", "50")) == {"50"}


def test_a_command_opens_without_moving_the_other_columns(open_page):
    page = open_page()
    for heading in ("Runs", "All measurements"):
        shown = table(page, heading)
        first = shown.locator("tbody tr").first.locator("td").first
        before = first.bounding_box()["width"]
        shown.locator("summary").first.click()
        assert shown.locator("details[open] code").is_visible()
        assert shown.evaluate("e => e.offsetWidth <= e.parentElement.clientWidth")
        assert before - 20 < first.bounding_box()["width"]


def test_a_tooltip_is_within_a_phone_and_shows_the_whole_command(browser, path):
    context = browser.new_context(viewport={"width": 360, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(path.as_uri())
    for name in ("front_by_state", "decode_time"):
        marks = page.locator(f"#{name} .role-mark.mark-symbol path")
        marks.last.wait_for()
        page.evaluate(f"document.querySelector('#{name}').scrollIntoView({{block: 'center'}})")
        for n in (0, marks.count() - 1):
            marks.nth(n).tap(force=True)
            box = page.locator("#vg-tooltip-element.visible").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
            cut = "e => [...e.querySelectorAll('td')].some(c => c.scrollWidth > c.clientWidth + 1)"
            assert not page.locator("#vg-tooltip-element").evaluate(cut)
    context.close()


def test_an_answer_is_wholly_on_a_phone(open_page):
    page = open_page(360, "light")
    cells = page.locator("table.sortable").first.locator("tbody tr").first.locator("td")
    for cell in cells.all():
        box = cell.bounding_box()
        assert box is None or box["x"] + box["width"] <= 360


def test_the_words_of_the_page_are_explained_under_its_title(open_page):
    page = open_page()
    page.locator("details.terms summary").click()
    assert page.locator("details.terms dt").first.inner_text() == "mixer"
    assert "Kimi Delta Attention" in page.locator("details.terms").inner_text()
