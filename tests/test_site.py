"""The page of all results: complete, self-contained, and it filters and sorts in a real browser (Chromium, where there is one)."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import reproduce
from experiments import site, tables
from tests.test_reproduce import made_up

BROWSER = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser", "chrome"))), None)
AA = {"FGSM-RS": 42.5, "FGSM-SDI": 46.0, "PGD-AT": 47.25}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page with three made-up runs of Table VII, one of them doubted, beside everything published."""
    folder = tmp_path_factory.mktemp("site")
    table, scale = tables.find("VII"), tables.SCALES["full"]
    for row in table.rows:
        if row.name in AA:
            job = table.job(row, 0, scale, Path(), folder / "results" / "tables")
            made_up(job, 0, {"clean": 80.0, "aa": AA[row.method]}, warnings=("gradients are masked",), card=row.method != "FGSM-RS")
            run = json.loads(job.result.read_text())
            run["run"]["config"] = {"select_on": "val"}
            run["log"] = [{"val_clean": 10.0 * epoch, "val_pgd10": 5.0 * epoch} for epoch in range(1, 5)]
            job.result.write_text(json.dumps(run))
    (folder / "results" / "figures" / "full").mkdir(parents=True)
    shutil.copy(reproduce.RESULTS / "demo-digits" / "curves.png", folder / "results" / "figures" / "full" / "curves.png")
    reproduce.main(["site", "--results", str(folder / "results" / "tables"), "--page", str(folder / "index.html")])
    return folder / "index.html"


def test_it_holds_everything_and_asks_for_nothing(page):
    text = page.read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert sum(row["source"] == "published" for row in data["rows"]) == len({(name, t.dataset, row.name, checkpoint) for name, several in tables.TABLES.items()
                                                                            for t in several for row in t.rows for checkpoint in t.checkpoints if t.published(row, checkpoint)})
    assert {(row["method"], row["aa"]) for row in data["rows"] if row["source"] == "ours"} == set(AA.items())
    assert {row["doubt"] for row in data["rows"] if row["source"] == "ours" and row["method"] == "FGSM-RS"} == {"gradients are masked"}
    assert data["curves"][0]["panels"].keys() == {"clean", "pgd10"} and data["figures"][0]["source"].startswith("data:image/png;base64,")
    assert not re.search(r'(src|href)="(?!data:)|@import|url\(', text) and "fetch(" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")


def test_text_in_the_data_cannot_end_the_script(page, monkeypatch):
    monkeypatch.setattr(site, "_rows", lambda *_: [{"source": "ours", "method": "</script><b>"}])
    text = site.page(page.parent / "results" / "tables")
    assert "</script><b>" not in text and text.count("</script>") == page.read_text().count("</script>")


class Rows(HTMLParser):
    """The texts of the cells of #results, row by row, its headings, and the classes of its rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.classes: list[str] = []
        self.sorted: dict[str, str] = {}
        self.pictures = self.lines = 0
        self.inside = self.cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.inside |= tag == "table" and attrs.get("id") == "results"
        self.pictures += tag == "img"
        self.lines += tag == "polyline"
        if self.inside and tag == "th" and "aria-sort" in attrs:
            self.sorted[attrs["data-column"]] = attrs["aria-sort"]
        if self.inside and tag == "tr":
            self.rows.append([])
            self.classes.append(attrs.get("class") or "")
        if self.inside and tag == "td":
            self.cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.cell &= tag != "td"
        self.inside &= tag != "table"

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> None:
    """Skips where no browser shows a page: there is none, or it may not see this folder, as Ubuntu's may not."""
    page = tmp_path_factory.mktemp("browser") / "index.html"
    page.write_text("<html><body><table id='results'><tr><td>seen</td></tr></table></body></html>")
    try:
        seen = BROWSER and rendered(page).rows
    except subprocess.SubprocessError:
        seen = None
    if seen != [["seen"]]:
        pytest.skip("there is no Chromium here that shows pages (make browser installs it on Debian)")


def rendered(page: Path, fragment: str = "", click: str = "") -> Rows:
    """The page as Chromium shows it, after a script has clicked."""
    shown = page.with_name("clicked.html")
    shown.write_text(page.read_text().replace("</body>", f"<script>{click}</script></body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={page.parent / 'profile'}",
               "--virtual-time-budget=3000", "--dump-dom", f"{shown.as_uri()}#{fragment}"]
    return Rows(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


KEYS = [column["key"] for column in site.COLUMNS]


def column(found: Rows, key: str) -> list[str]:
    return [row[KEYS.index(key)] for row in found.rows if row]


def test_it_renders_and_sorts_by_what_is_clicked(page, browser):
    assert set(column(rendered(page), "dataset")) == {"cifar10"}, "accuracies on several data sets say nothing beside each other"
    found = rendered(page, "sort=-aa")
    aa = [float(value) for value in column(found, "aa") if value]
    assert len(aa) > 150 and aa == sorted(aa, reverse=True) and found.sorted == {"aa": "descending"}
    assert column(found, "aa").index("") == len(aa), "empty cells stay below"
    assert found.pictures >= 1 and found.lines == 6, "two panels with three runs"
    click = "document.querySelector('th[data-column=clean] button').click();"
    clean = [float(value) for value in column(rendered(page, "sort=-aa", click), "clean") if value]
    assert clean == sorted(clean, reverse=True) and clean != sorted(clean)
    again = rendered(page, "sort=-aa", 2 * click)
    values = [float(value) for value in column(again, "clean") if value]
    assert values == sorted(values) and again.sorted == {"clean": "ascending"}
    methods = column(rendered(page, click="document.querySelector('th[data-column=method] button').click();"), "method")
    assert methods[0] == min(methods, key=str.lower)


def test_it_filters_by_what_is_chosen_and_by_the_address(page, browser):
    found = rendered(page, "table=VII&dataset=cifar10&source=ours&checkpoint=best&sort=-aa")
    assert list(zip(column(found, "method"), column(found, "aa"))) == [("PGD-AT", "47.25"), ("FGSM-SDI", "46.00"), ("FGSM-RS", "42.50")]
    assert [cls for cls in found.classes if cls] == ["ours", "ours", "ours doubted"]
    typed = "const box = document.getElementById('text'); box.value = 'fgsm-sdi vii'; box.dispatchEvent(new Event('input'));"
    assert set(column(rendered(page, "source=ours", typed), "method")) == {"FGSM-SDI"}
    assert column(rendered(page, "text=nothing%20like%20this"), "method") == []
