"""The report: what it says, its figures, and the page in a real browser."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path

import pytest
from small_study import make, untuned

from stillhouse.cli.main import main
from stillhouse.study.analysis import Cost, Difference, Row, analyse
from stillhouse.study.plan import Plan
from stillhouse.study.report import page, text, words
from stillhouse.study.schema import read
from stillhouse.study.statistics import mean_interval


@pytest.fixture(scope="module")
def plan(finished) -> Plan:
    return finished[1].plan


def row(finished, scores, **changes):
    made = Row(finished[1].plan.entry("kd", "digits"), "KD", dict(enumerate(scores)))
    made.interval = mean_interval(scores)
    for key, value in changes.items():
        setattr(made, key, value)
    return made


class TestSentences:
    def test_a_claim_has_its_interval_and_its_p(self, finished, plan):
        gap = mean_interval([0.1, 0.11, 0.12])
        better = row(finished, [0.7, 0.71, 0.72], difference=Difference(gap, p_holm=0.004, verdict="better"))
        assert words.sentence(plan, better) == (
            "KD scores 0.710 ± 0.025, better than Hard labels (+0.110 ± 0.025, paired by seed; p = 0.004 after Holm)."
        )

    def test_no_claim_says_how_many_seeds_it_would_take(self, finished, plan):
        gap = mean_interval([-0.1, 0.11, 0.12])
        one = Difference(gap, p_holm=0.6, verdict="open", effect=0.35, needed=67)
        said = words.sentence(plan, row(finished, [0.7, 0.71, 0.72], difference=one))
        assert "no difference to Hard labels is shown" in said
        assert said.endswith("one of this size would need about 67 seeds.")

    def test_fewer_than_three_seeds_have_no_interval_and_a_remark(self, tmp_path):
        analysis, _ = make(untuned(seeds={"fresh": [0, 1]}), tmp_path / "s")
        kd = analysis.rows["digits"][1]
        assert (kd.interval.half, kd.bca, kd.difference.p, kd.difference.verdict) == (None, None, None, None)
        assert "2 seeds: intervals and tests are withheld; 3 or more give them" in analysis.remarks
        assert "±" not in text.markdown(analysis).partition("## How")[0]
        assert "fewer than 3 seeds show nothing" in text.markdown(analysis)
        assert "intervals and tests are withheld" in page.page(analysis)


class TestForms:
    def test_the_tables_hold_every_cell_and_no_time(self, finished):
        folder, analysis, _ = finished
        rows = list(csv.DictReader(io.StringIO((folder / "scores.csv").read_text())))
        assert len(rows) == len(analysis.provenance) == 15
        assert {one["status"] for one in rows} == {"done"}
        assert all((one["test"] == "") == (one["phase"] == "tuning") for one in rows)
        for name in ("scores.csv", "statistics.csv", "report.tex"):
            assert "seconds" not in (folder / name).read_text()
        assert "seconds" in (folder / "costs.csv").read_text()

    def test_latex_escapes_what_it_must(self, finished):
        assert text._tex("50 % of a_b & c ± d") == r"50 \% of a\_b \& c $\pm$ d"
        tex = (finished[0] / "report.tex").read_text()
        assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == 2
        assert re.search(r"^KD & not applicable( & --){6} \\\\$", tex, re.MULTILINE)

    def test_a_report_is_made_again_byte_for_byte(self, finished, tmp_path):
        folder, _, _ = finished
        assert main(["report", str(folder), "--out", str(tmp_path)]) == 0
        for name in ("report.html", "report.md", "report.tex", "scores.csv", "statistics.csv", "costs.csv"):
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name

    def test_an_unfinished_study_has_a_report_that_says_so(self, finished):
        _, analysis, _ = finished
        some = {one.digest: found for one, found in analysis.provenance if one.phase == "tuning"}
        partial = analyse(analysis.plan, some)
        assert not partial.complete
        assert "Not finished" in text.markdown(partial)
        assert "Not finished" in page.page(partial)
        assert {one.status for one in partial.rows["digits"]} == {"not run"}

    def test_a_directory_without_a_study_is_told(self, tmp_path, capsys):
        assert main(["report", str(tmp_path)]) == 2
        assert "holds no study" in capsys.readouterr().err

    def test_costs_count_the_updates_to_the_baselines_score(self, finished):
        _, analysis, _ = finished
        hard = analysis.rows["digits"][0]
        assert isinstance(hard.cost, Cost)
        assert 1 <= hard.cost.reached <= 3, "the best of the baseline's own seeds reach their mean"
        assert 10 <= hard.cost.updates_to_target <= 30


class TestPage:
    def test_nothing_is_fetched_and_nothing_runs_that_a_study_says(self, finished):
        _, analysis, _ = finished
        made = page.page(analysis)
        assert not re.search(r"""(src|href)\s*=\s*["']?(?!#)[a-z]+:""", made.replace("http://www.w3.org", ""))
        assert "@import" not in made
        evil = analysis.plan.model_copy(
            update={"question": "<script>alert(1)</script>?", "titles": {"hard": "<b>x", "kd": "&y"}}
        )
        made = page.page(analyse(evil, {one.digest: found for one, found in analysis.provenance}))
        assert "<script>alert" not in made
        assert "<b>x" not in made

    def test_provenance_names_versions_fingerprints_seeds_and_both_settings(self, finished):
        made = (finished[0] / "report.html").read_text()
        facts = finished[1].plan.entry("kd", "digits").facts
        for told in (
            "Settings passed",
            "Settings in force",
            "torch: 2",
            facts.teacher,
            facts.data["train"],
            "test opened",
        ):
            assert told in made

    def test_ids_are_those_of_one_figure_each(self, finished):
        made = (finished[0] / "report.html").read_text()
        ids = re.findall(r'\bid="([^"]+)"', made)
        assert len(ids) == len(set(ids))
        for target in re.findall(r'xlink:href="#([^"]+)"', made) + re.findall(r"url\(#([^)]+)\)", made):
            assert target in ids


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser here: install the packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


ROOT = Path(__file__).parents[3]
REPORTS = {
    "docs": ROOT / "docs" / "reports" / "study-mnist1d.html",
    "make study": ROOT / "runs" / "study-mnist1d-quick" / "report.html",
}
"""Of the shipped study: as it was run for the docs, and what ``make study`` left, where it ran."""


class TestOfTheShippedStudy:
    @pytest.fixture(params=REPORTS)
    def opened(self, browser, request):
        if not REPORTS[request.param].is_file():
            pytest.skip("make study makes it")
        browser.set_window_size(1280, 1000)
        browser.get(REPORTS[request.param].as_uri())
        assert browser.get_log("browser") == []
        return browser

    def test_every_method_has_its_row_and_its_place_in_every_figure(self, opened):
        methods = len(read("mnist1d").methods)
        for pair in ("pair0", "pair1"):
            rows = opened.find_elements("css selector", f"#{pair} table.scores tbody tr")
            assert len(rows) == methods
            scores = [row.find_elements("css selector", "td, th")[1].text for row in rows]
            found = sum(bool(re.match(r"0\.\d+", score)) for score in scores)
            assert found + scores.count("not applicable") == methods
            assert found >= 15
            marks = "return new Set([...document.querySelectorAll('#%s svg [class*=m]')].flatMap(m => [...m.classList]).filter(c => /^m\\d+$/.test(c))).size"
            assert opened.execute_script(marks % pair) == found

    def test_it_sorts_and_a_phone_can_read_it(self, opened):
        head = opened.find_elements("css selector", "#pair1 table.scores th button")[1]
        opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", head)
        head.click()
        cells = "return [...document.querySelectorAll('#pair1 table.scores tbody tr')].map(r => parseFloat(r.cells[1].innerText))"
        scores = [score for score in opened.execute_script(cells) if score is not None and score == score]
        assert scores == sorted(scores)
        phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        try:
            assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
        finally:
            opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


class TestBrowser:
    @pytest.fixture
    def opened(self, browser, finished):
        browser.set_window_size(1280, 1000)
        browser.get((finished[0] / "report.html").as_uri())
        assert browser.get_log("browser") == []
        return browser

    def column(self, browser, place: int) -> list[str]:
        script = "return [...document.querySelectorAll('#pair0 table.scores tbody tr')].map(r => r.cells[arguments[0]].innerText)"
        return browser.execute_script(script, place)

    def test_a_click_on_a_heading_sorts_and_another_turns_it_round(self, opened):
        heads = opened.find_elements("css selector", "#pair0 table.scores th button")
        before = self.column(opened, 0)
        heads[1].click()
        scores = [float(cell.split()[0]) for cell in self.column(opened, 1)]
        assert scores == sorted(scores)
        assert opened.find_element("css selector", "#pair0 th[aria-sort=ascending]").text.startswith(
            "test accuracy"
        )
        heads[1].click()
        assert [float(cell.split()[0]) for cell in self.column(opened, 1)] == scores[::-1]
        heads[4].click()
        heads[4].click()
        assert self.column(opened, 0)[-1] == "Hard labels", "what has no value stays last"
        heads[0].click()
        assert self.column(opened, 0) == sorted(before)

    def test_a_click_on_a_method_shows_it_alone(self, opened):
        chip = opened.find_element("css selector", "#pair0 .legend button[data-method=m1]")
        seen = (
            "return [...document.querySelectorAll('#pair0 svg .m%d')].map(m => +getComputedStyle(m).opacity)"
        )
        chip.click()
        opened.execute_script("for (const a of document.getAnimations()) a.finish()")
        assert set(opened.execute_script(seen % 1)) == {1}
        assert max(opened.execute_script(seen % 0)) < 0.2
        chip.click()
        opened.execute_script("for (const a of document.getAnimations()) a.finish()")
        assert set(opened.execute_script(seen % 0)) == {1}

    def test_light_and_dark_are_seen(self, opened, tmp_path):
        ground = "return getComputedStyle(document.body).backgroundColor"
        brightness = lambda: sum(map(int, re.findall(r"\d+", opened.execute_script(ground))[:3]))
        first = brightness()
        opened.find_element("id", "theme").click()
        assert abs(brightness() - first) > 400
        ink = opened.execute_script("return getComputedStyle(document.querySelector('#pair0 svg text')).fill")
        assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 400) == (brightness() < 400), "figures follow"
        assert opened.save_screenshot(str(tmp_path / "page.png"))
        from PIL import Image

        assert len(Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 24)) > 100

    def test_a_phone_scrolls_tables_and_never_the_page(self, opened):
        opened.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True},
        )
        try:
            assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
            wide = "const s = document.querySelector('#pair0 .scroll'); return s.scrollWidth > s.clientWidth"
            assert opened.execute_script(wide)
        finally:
            opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_it_prints(self, opened):
        import base64

        printed = base64.b64decode(opened.print_page())
        assert printed.startswith(b"%PDF")
        assert len(printed) > 30_000
