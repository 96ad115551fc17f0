import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slicevit.evaluation.charts import main_widths, training_views
from slicevit.evaluation.frontier import RunRecord
from slicevit.evaluation.report import write_report

MakeRun = Callable[..., RunRecord]
EVIL = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """The tags of a page, its visible text and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside != "style":
            self.text += data

    @property
    def charts(self) -> dict[str, list[dict[str, Any]]]:
        return json.loads(self.scripts[1])


@pytest.fixture
def written(make_run: MakeRun, tmp_path: Path) -> tuple[list[RunRecord], Page, Path]:
    evil = make_run("evil", gain=-4, untrained=("5/16",))
    evil = dataclasses.replace(
        evil,
        name=EVIL,
        config={"note": EVIL},
        results=[dataclasses.replace(row, model=EVIL, method=EVIL) for row in evil.results],
    )
    runs = [make_run("first"), evil, make_run("x4", step="1/4")]
    out = tmp_path / "out" / "report.html"
    write_report(runs, out)
    return runs, Page(out), out


def test_nothing_is_loaded_from_anywhere(written: tuple[list[RunRecord], Page, Path]) -> None:
    _, page, out = written
    loading = {"src", "href", "srcset", "data", "action", "poster", "background"}
    assert [(tag, attrs) for tag, attrs in page.tags if loading & set(attrs)] == []
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in page.tags}
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    style = re.search(r"<style>(.*?)</style>", out.read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert out.stat().st_size < 6_000_000
    assert sum("plotly.js v" in script for script in page.scripts) == 1


def test_names_are_text_wherever_they_are_shown(written: tuple[list[RunRecord], Page, Path]) -> None:
    _, page, out = written
    assert len(page.scripts) == 3  # plotly, the data, the page's own
    assert "alert(1)" not in page.scripts[0] + page.scripts[2]
    assert EVIL not in out.read_text(encoding="utf-8")
    assert page.text.count(EVIL) >= 5  # heading, legend, comparison, section, facts
    assert json.dumps({"note": EVIL}, indent=2) in page.text
    hover = page.charts["frontier"][0]["data"][2]["text"][0]
    assert hover.startswith("<b>&lt;script&gt;alert(1)&lt;/script&gt;&amp;\"'</b><br>")


def test_the_first_run_may_have_any_name_too(written: tuple[list[RunRecord], Page, Path], tmp_path: Path) -> None:
    write_report(written[0][1:], tmp_path / "evil.html")
    page = Page(tmp_path / "evil.html")
    assert len(page.scripts) == 3
    assert page.text.count(EVIL) >= 8  # title, notes and the summary's heading besides
    assert EVIL not in (tmp_path / "evil.html").read_text(encoding="utf-8")


def test_the_facts_and_figures_are_there(written: tuple[list[RunRecord], Page, Path]) -> None:
    runs, page, _ = written
    for text in (
        "first",
        "scala",
        "vit_small_patch16_224",
        "1/4 to 1 in steps of 1/8",
        "imagenet-1k",
        "50,000",
    ):
        assert text in page.text
    for run in runs:
        for row in run.results:
            assert f"{row.top1:.2f}" in page.text
    assert "5/16 (not trained)" in page.text
    assert "−4.00" in page.text


def test_frontier_data_are_the_results(written: tuple[list[RunRecord], Page, Path]) -> None:
    runs, page, _ = written
    views = page.charts["frontier"]
    assert [view["name"] for view in views] == ["GMACs", "Latency", "Parameters"]
    _, first, second, hollow, third = views[0]["data"]
    assert first["x"] == pytest.approx([row.gmacs for row in runs[0].results])
    assert first["y"] == pytest.approx([row.top1 for row in runs[0].results])
    assert [trace["legendgroup"] for trace in (first, second, hollow, third)] == ["0", "1", "1", "2"]
    assert hollow["meta"]["hollow"]
    assert hollow["y"] == [views[0]["layout"]["yaxis"]["range"][0]]  # at the edge
    assert "top-1 1.81 %" in hollow["text"][0]  # and the true value on hovering


def test_every_chart_has_its_place_and_every_line_its_button(
    written: tuple[list[RunRecord], Page, Path],
) -> None:
    _, page, _ = written
    places = [attrs["data-chart"] for _, attrs in page.tags if "data-chart" in attrs]
    assert sorted(str(place) for place in places) == sorted(page.charts)
    buttons = {(attrs["data-group"], attrs["data-line"]) for tag, attrs in page.tags if tag == "button"}
    lines = {
        ("frontier" if name == "frontier" else name.rpartition("-")[0], trace["legendgroup"])
        for name, views in page.charts.items()
        for trace in views[0]["data"]
    }
    assert buttons == lines


def test_training_curves(make_run: MakeRun) -> None:
    run = make_run("a", step="1/4", epochs=3)
    accuracy, loss = training_views(run)
    assert [trace["name"] for trace in accuracy["data"]] == ["width 1/4", "width 1/2", "width 3/4", "width 1"]
    logged = [row["train_loss"] for row in run.metrics if row["width"] == "1/2"]
    assert loss["data"][1]["y"] == logged
    assert loss["data"][1]["x"] == [1, 2, 3]
    blind = [row | {"top1": None} for row in run.metrics]
    assert [view["name"] for view in training_views(dataclasses.replace(run, metrics=blind))] == ["Training loss"]


def test_many_widths_start_with_the_simple_ones(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", step="1/32", epochs=2)
    write_report([run], tmp_path / "a.html")
    page = Page(tmp_path / "a.html")
    states = [a["aria-pressed"] for _, a in page.tags if str(a.get("data-group")).startswith("training")]
    assert (states.count("true"), states.count("false")) == (7, 18)
    assert main_widths(["1/4", "3/8", "1"]) == {"1/4", "3/8", "1"}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"slicevit": {"data": "fashion"}}, "fashion"),
        ({"slicevit": {"training": {"data": {"dataset": "fashion", "workers": 2}}}}, "fashion"),
        ({"dataset": "hfds/food101"}, "hfds/food101"),
        ({"slicevit": 3}, "–"),
    ],
)
def test_the_data_are_named_from_the_config(
    make_run: MakeRun, tmp_path: Path, config: dict[str, Any], name: str
) -> None:
    write_report([dataclasses.replace(make_run("a", epochs=1), config=config)], tmp_path / "a.html")
    assert f"Data{name}" in Page(tmp_path / "a.html").text


def test_a_run_without_curves_or_results_beside_the_first(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a")
    other = RunRecord("unfinished", run.folder, {}, [], [])
    write_report([dataclasses.replace(run, metrics=[]), other], tmp_path / "a.html")
    page = Page(tmp_path / "a.html")
    assert list(page.charts) == ["frontier"]
    assert "Not evaluated yet." in page.text
    with pytest.raises(ValueError, match="needs a run with results"):
        write_report([other], tmp_path / "b.html")
    assert not (tmp_path / "b.html").exists()
