"""The report: what it says, its figures, and the page in a real browser."""

from __future__ import annotations

import csv
import io
import re
import shutil

import pytest
from invented import done, failed, planned, results
from small_study import make, untuned

from stillhouse.cli.main import main
from stillhouse.study import schema
from stillhouse.study.analysis import Row, analyse
from stillhouse.study.differences import Difference
from stillhouse.study.plan import Plan
from stillhouse.study.report import figures, page, tables, text, words, write
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
        better = row(
            finished, [0.7, 0.71, 0.72], difference=Difference(gap, p=0.002, p_holm=0.004, verdict="better")
        )
        assert words.sentence(plan, better) == (
            "KD scores 0.710 ± 0.025, better than Hard labels (+0.110 ± 0.025, paired by seed; p = 0.004 after Holm)."
        )

    def test_no_claim_says_how_many_seeds_it_would_take(self, finished, plan):
        gap = mean_interval([-0.1, 0.11, 0.12])
        one = Difference(gap, p=0.6, p_holm=0.6, verdict="open", effect=0.35, needed=67)
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
        assert re.search(r"^KD & not applicable( & --){9} \\\\$", tex, re.MULTILINE)

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

    def test_every_form_of_a_table_has_the_same_columns_and_words(self, finished):
        folder, analysis, _ = finished
        markdown, made = (folder / "report.md").read_text(), (folder / "report.html").read_text()
        wanted = [tables.tried(analysis), tables.chosen(analysis)]
        for pair in analysis.rows:
            wanted += [tables.scores(analysis, pair), tables.costs(analysis, pair)]
        for table in wanted:
            head, lines = table.texts()
            assert f"| {' | '.join(head)} |" in markdown
            assert (
                "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in head)
                in made
            )
            for line in lines:
                assert f"| {' | '.join(line)} |" in markdown
        tex = (folder / "report.tex").read_text()
        for pair in analysis.rows:
            for line in tables.scores(analysis, pair).texts()[1]:
                assert " & ".join(map(text._tex, line)) in tex
        rows = list(csv.DictReader(io.StringIO((folder / "statistics.csv").read_text())))
        for one in (row for of_pair in analysis.rows.values() for row in of_pair if row.scores):
            found = next(r for r in rows if (r["pair"], r["method"]) == (one.entry.pair, one.method))
            assert float(found["mean"]) == one.interval.mean, "unrounded"
            assert (found["split"], found["metric"]) == ("test", one.entry.facts.metric)

    def test_all_settings_that_were_tried_are_told(self, finished):
        folder, analysis, _ = finished
        entries = [row.entry for rows in analysis.rows.values() for row in rows if row.scores]
        rates = [trial.settings["optimizer.lr"] for entry in entries for trial in entry.trials[1:]]
        assert len(rates) == 3
        for name in ("report.md", "report.html"):
            told = (folder / name).read_text()
            assert all(f"optimizer.lr = {rate}" in told for rate in rates), name
        assert [one.trial for one in tables.tried(analysis).items] == [0, 1] * 3

    def test_what_failed_is_told_with_its_trial(self):
        plan = planned(2, trials=3)
        made = analyse(plan, results(plan, lambda one: failed(one) if one.trial == 2 else done(one, 0.5)))
        who = ["m0 on digits, trial 2, seed 100", "m1 on digits, trial 2, seed 100"]
        assert [one for one, _ in words.failures(made)] == who
        for form in (text.markdown, text.brief, page.page):
            assert all(one in form(made) for one in who)

    def test_an_error_that_says_nothing_is_told_by_its_type(self):
        plan = planned(2, trials=3)
        made = analyse(plan, results(plan, lambda one: failed(one, "")))
        assert made.rows["digits"][0].reason == "Diverged"
        assert made.rows["digits"][0].lost[1] == "failed: Diverged"
        assert words.failures(made)[0] == ("m0 on digits, trial 0, seed 100", "failed: Diverged")

    def test_what_a_study_says_is_words_in_markdown_and_a_line_in_latex(self):
        """A plan may come from ``compare``, or be edited by hand; errors and warnings say what they like."""
        evil = "<script>alert(1)</script> </p><!-- a | b\n\n# c [d](javascript:e) ![f](http://g) p < 0.05"
        plan = planned(2)
        plan = plan.model_copy(update={"question": evil, "titles": {"m0": "one", "m1": evil}})
        said = {"m0": lambda one: done(one, one.seed, warnings=[evil]), "m1": lambda one: failed(one, evil)}
        made = analyse(plan, results(plan, lambda one: said[one.method](one)))
        page = text.markdown(made)
        assert not re.search(r"<[a-z/!]|\]\(", page)
        assert page.count("&lt;script>alert(1)&lt;/script>") > 6
        assert page.count("p < 0.05") > 6
        assert [line for line in page.splitlines() if line.startswith("# ")] == ["# invented"]
        tables = [line for line in page.splitlines() if line.startswith("|")]
        assert len({line.count("|") - line.count("\\|") for line in tables[:4]}) == 1
        assert r" a \| b # c " in page
        caption = next(line for line in text.latex(made).splitlines() if line.startswith(r"\caption"))
        assert caption.endswith("over 5 seeds.}")


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
            *(
                f"{name}: {digest}"
                for name, digest in finished[1].plan.entry("kd", "digits").origin.code.items()
            ),
            "device and threads:\n  device: cpu\n  threads: 1\n",
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


class TestColours:
    def test_every_method_of_a_shipped_study_has_a_colour_of_its_own_in_light_and_dark(self):
        names = schema.shipped()
        assert "mnist1d" in names
        assert max(len(read(name).methods) for name in names) <= figures.COLOURS
        light, dark = page._asset("style.css").split(':root[data-theme="dark"]')[:2]
        for theme in (light, dark):
            found = re.findall(r"--m(\d+): (#[0-9a-f]{6});", theme)
            assert [int(n) for n, _ in found] == list(range(figures.COLOURS))
            assert len({colour for _, colour in found}) == figures.COLOURS


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """18 methods on two pairs, the last of them not applicable on the second; steadily apart, so that ranks differ."""
    plan = planned(18, ["one", "two"], seeds=4, trials=2)
    facts = {(entry.method, entry.pair): entry.facts for entry in plan.entries}
    facts["m17", "two"] = facts["m17", "two"].model_copy(update={"refused": "has no meaning there"})
    plan = plan.with_facts(facts)
    value = lambda one: 0.5 + 0.02 * int(one.method[1:]) + 0.001 * (one.seed * 7 % 5) + 0.01 * one.trial
    curve = lambda one: [{"step": step, "accuracy": value(one) - 1 / step} for step in (20, 40, 60)]
    folder = tmp_path_factory.mktemp("big")
    write(analyse(plan, results(plan, lambda one: done(one, value(one), curve=curve(one)))), folder)
    return folder / "report.html"


class TestOfAStudyAsBigAsTheShippedOne:
    @pytest.fixture
    def opened(self, browser, rendered):
        browser.set_window_size(1280, 1000)
        browser.get(rendered.as_uri())
        assert browser.get_log("browser") == []
        return browser

    def test_every_method_has_its_row_and_its_place_in_every_figure(self, opened):
        for pair, found in (("pair0", 18), ("pair1", 17)):
            rows = opened.find_elements("css selector", f"#{pair} table.scores tbody tr")
            assert len(rows) == 18
            scores = [row.find_elements("css selector", "td, th")[1].text for row in rows]
            assert sum(bool(re.match(r"0\.\d+ ± 0\.\d+", score)) for score in scores) == found
            assert scores.count("not applicable") == 18 - found
            for figure in range(4):
                marks = "return new Set([...document.querySelectorAll('#%s figure:nth-of-type(%d) svg [class*=m]')].flatMap(m => [...m.classList]).filter(c => /^m\\d+$/.test(c))).size"
                assert opened.execute_script(marks % (pair, figure + 1)) == found, figure
        fills = "return new Set([...document.querySelectorAll('#pair0 .legend i')].map(i => getComputedStyle(i).backgroundColor)).size"
        assert opened.execute_script(fills) == 18

    def test_ranks_are_drawn_for_each_pair_with_who_is_left_out(self, opened):
        assert len(opened.find_elements("css selector", "#ranks figure svg")) == 2
        assert "Not ranked: M17: not applicable." in opened.find_element("id", "ranks").text
        firsts = opened.find_elements("css selector", "#ranks table tbody tr:first-child td:first-child")
        assert [first.text for first in firsts] == ["M17", "M16"]

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
