"""The pages, looked at in a real browser: wide and narrow, light and dark, by keyboard, on paper, and made of names
that somebody chose badly.
"""

from __future__ import annotations

import copy
import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, launched, tabbed, visited
from runs import make_run
from synthetic import synthetic_report

from obsprune.report import compare_page
from obsprune.report.compare import compare
from obsprune.report.page import make_page
from obsprune.report.runs import read_runs

WINDOWS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)><a href=javascript:alert(3)>]]>{{ 7*7 }}"""
Look = Callable[..., Visit]


def comparison(folder: Path) -> str:
    """Of runs of several sizes, two of which are alike, one of another model, one on other text."""
    runs = [
        make_run(folder / "first", 0.10, 0.5),
        make_run(folder / "alike", 0.10, 0.5),
        make_run(folder / "smaller", 0.25, 0.7),
        make_run(
            folder / "worse-in-every-respect", 0.3, 0.45, {"solver": {"name": "wanda"}}, versions={"torch": "2.0"}
        ),
        make_run(folder / "larger", 0.05, model={"parameters": 20_000, "source": "some/larger-model-than-the-others"}),
        make_run(folder / "elsewhere", seqlen=64, rounds=[{"round": 1, "best": True}]),
    ]
    return compare_page.make_page(compare(read_runs(runs)))


def large(folder: Path) -> str:
    """Of a run on a model of the size of Llama-2-7B: 224 matrices."""
    return make_page(synthetic_report())


def small(folder: Path) -> str:
    """The same of three blocks."""
    return make_page(synthetic_report(3))


PAGES: dict[str, tuple[Callable[[Path], str], int]] = {
    "comparison": (comparison, 1),
    "small": (small, 4),
    "large": (large, 4),
}
"""Its maker, and how many pictures it has at least."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages, by name."""
    made = {}
    for name, (make, _) in PAGES.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder / "page.html"
        made[name].write_text(make(folder), encoding="utf-8")
    return made


@pytest.fixture(params=["comparison", "small", pytest.param("large", marks=pytest.mark.slow)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=WINDOWS, ids=lambda window: f"{window[0]}-{window[1]}")
def visit(request: pytest.FixtureRequest, browser: Any, files: dict[str, Path], name: str) -> Iterator[Visit]:
    with visited(browser, files[name], *request.param) as found:
        yield found


def test_a_page_looks_as_it_should(visit: Visit, name: str) -> None:
    assert visit.look("pictures") == []
    visit.look("open")
    for what in ("contrast", "width", "pictures", "overlaps", "dangers"):
        assert visit.look(what) == [], what
    assert visit.page.locator("svg").count() >= PAGES[name][1]
    dark = visit.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert visit.look("paper") < 0.03 if dark else visit.look("paper") > 0.9
    assert visit.said == [] and visit.asked == []


def test_the_keyboard_reaches_everything_and_is_seen(visit: Visit) -> None:
    visit.look("open")
    stops, reached = visit.look("stops"), tabbed(visit)
    assert len(stops) > 5
    assert [where for where, _ in reached] == stops
    assert [where for where, clear in reached if not clear] == []


def test_nothing_is_missing_without_scripts(browser: Any, files: dict[str, Path], name: str) -> None:
    with visited(browser, files[name], scripts=False) as visit:
        assert visit.page.locator("svg").count() >= PAGES[name][1]
        assert all(box.is_visible() for box in visit.page.locator("svg, h2, table").all() if not _folded(box))
        assert visit.said == [] and visit.asked == []


def _folded(box: Any) -> bool:
    return bool(box.locator("xpath=ancestor::details").count())


def test_on_paper_everything_is_there_and_dark_on_light(browser: Any, files: dict[str, Path], name: str) -> None:
    from pypdf import PdfReader

    with visited(browser, files[name], scheme="dark") as visit:
        headings = visit.look("headings")
        visit.page.emulate_media(media="print", color_scheme="dark")
        assert visit.look("paper") > 0.9 and visit.look("contrast") == []
        printed = PdfReader(io.BytesIO(visit.page.pdf(format="A4")))
    text = _letters(" ".join(page.extract_text() for page in printed.pages))
    assert len(headings) > 3 and [title for title in headings if _letters(title) not in text] == []
    blank = [number for number, page in enumerate(printed.pages) if not page.extract_text().strip()]
    assert blank == []


def test_a_large_report_opens_in_a_second(browser: Any, files: dict[str, Path]) -> None:
    assert files["large"].stat().st_size < 2_000_000
    times = []
    for _ in range(3):  # the best of them: other work on the machine is not the page's
        with visited(browser, files["large"]) as visit:
            times.append(visit.times())
    for what in ("loaded", "painted"):
        assert min(time[what] for time in times) < 1000, times


def _letters(text: str) -> str:
    """Without spaces and ligatures, which a printed page has more or fewer of."""
    return "".join(unicodedata.normalize("NFKC", text).split())


# ---------------------------------------------------------------------------------------------- badly chosen names


def hostile(tree: Any, told: str = HOSTILE) -> Any:
    """Plain values whose texts, and keys that are no words of ours, all end in what would run if it were markup."""
    if isinstance(tree, dict):
        return {key: hostile(value, told) for key, value in tree.items()}
    if isinstance(tree, list):
        return [hostile(value, told) for value in tree]
    return f"{tree}{told}" if isinstance(tree, str) else tree


def spoilt(path: Path) -> Path:
    """A run whose report is hostile wherever a text may be any."""
    file = path / "report.json"
    report = json.loads(file.read_text())
    kept = copy.deepcopy(report)
    report = hostile(report)
    report["recipe"]["solver"]["name"] = HOSTILE
    report["sparsity"]["pattern"] = HOSTILE
    report["evaluation"] = {
        f"text={HOSTILE}": {
            who: {**hostile(entry), "metric": entry["metric"]} for who, entry in kept["evaluation"]["heldout"].items()
        }
    }
    file.write_text(json.dumps(report))
    return path


def hostile_comparison(folder: Path) -> str:
    """Directories may be called anything but have no slash in their names."""
    names = [f"{place}{HOSTILE.replace('/', '')}" for place in "ab"]
    return compare_page.make_page(compare(read_runs([spoilt(make_run(folder / name)) for name in names])))


def hostile_run(folder: Path) -> str:
    return make_page(json.loads((spoilt(make_run(folder)) / "report.json").read_text()))


HOSTILE_PAGES: dict[str, Callable[[Path], str]] = {"comparison": hostile_comparison, "run": hostile_run}


@pytest.mark.parametrize("kind", HOSTILE_PAGES)
def test_names_are_never_markup(browser: Any, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "page.html"
    file.write_text(HOSTILE_PAGES[kind](tmp_path / "runs"), encoding="utf-8")
    with visited(browser, file, 400) as visit:
        visit.look("open")
        assert visit.look("dangers") == [] and visit.look("width") == []
        assert visit.said == [] and visit.asked == []
        text = visit.page.evaluate("document.body.textContent")
        assert text.count("<script>alert(1)") > 5 and "onerror=alert(2)" in text and "{{ 7*7 }}" in text


# ------------------------------------------------------------------------------------------- the checks can fail

SPOILT = {
    "contrast": '<p style="color: #999; background: #fff">pale</p>',
    "contrast in a picture": '<svg role="img" width="300" height="90"><rect width="300" height="90" fill="#222"/>'
    '<text x="9" y="40" fill="#333">dark on dark</text></svg>',
    "width": '<div style="width: 3000px">wide</div>',
    "width of a box": '<div style="overflow-x: auto; width: 90px"><div style="width: 900px">no name</div></div>',
    "pictures": '<svg width="300" height="90"><rect width="9" height="9"/><rect y="20" width="9" height="9"/></svg>',
    "pictures that are empty": '<svg role="img" width="300" height="90" aria-labelledby="n"></svg><p id="n">n</p>',
    "overlaps": '<svg width="300" height="90"><text x="9" y="40">one</text><text x="12" y="42">another</text></svg>',
    "dangers": "<p onclick=alert(1)>handler</p>",
    "dangers of addresses": '<a href="javascript:alert(1)">link</a>',
    "dangers of scripts": "<script>1</script>",
}


@pytest.mark.parametrize("fault", SPOILT)
def test_the_checks_see_faults(browser: Any, tmp_path: Path, fault: str) -> None:
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><title>x</title><body>{SPOILT[fault]}</body>")
    with visited(browser, file) as visit:
        complaints = {what: visit.look(what) for what in ("contrast", "width", "pictures", "overlaps", "dangers")}
    assert len(complaints[fault.partition(" ")[0]]) >= 1


def test_the_harness_hears_and_counts(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    links = '<a href="#a">seen</a><a href="#b" style="outline: none">unseen</a>'
    loads = '<img src="http://example.invalid/x.png"><script>console.log("said"); alert("dialog"); undefined.x</script>'
    file.write_text(f"<!doctype html><title>x</title><body>{links}{loads}</body>")
    with visited(browser, file) as visit:
        assert visit.asked == ["http://example.invalid/x.png"]
        assert {"said", "dialog"} <= set(visit.said) and any("undefined" in text for text in visit.said)
        assert [clear for _, clear in tabbed(visit)][1] is False
