"""The page of a run, --report: its numbers, its look in a browser, and when there is none."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.aws import AwsService
from support.failures import Explained
from support.machine import PATIENCE_S
from support.networks import Relay
from support.shell import InProcess, Pair

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def summary_of(out: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(out.splitlines()[-1])
    return summary


def assert_has(page: Path, summary: dict[str, Any]) -> None:
    """The page has the numbers of the JSON summary, and no others."""
    shown = {key: float(value) for key, value in re.findall(r'id="(\w+)" data-value="(.+?)"', page.read_text())}
    told = {key: value for key, value in summary.items() if type(value) in (int, float) and key != "exitStatus"}
    assert shown == {key: told[key] for key in shown}
    assert not any(told[key] for key in told.keys() - shown)
    for name in ("latencyMs", "latencyFromDueMs"):
        row = re.findall(rf'id="{name}"><td>.*?</td>(.*)</tr>', page.read_text())
        cells = [float(cell.replace(",", "")) for cell in re.findall("<td>(.+?)</td>", "".join(row))]
        assert cells == [*summary.get(name, {}).values()]


def test_the_pages_of_two_runs_have_the_numbers_of_their_summaries(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path
) -> None:
    sent, received = tmp_path / "sent.html", tmp_path / "received.html"
    window = pair.subscribe("--count", 8, "--report", received, "--output", "json")
    pace = ("--count", 2, "--interval", 0.6)
    result = main_of_pair("send", *pair.to_broker, *pace, "--report", sent, "--output", "json", "<b>hello</b>")
    summary = summary_of(result.out)
    assert (summary["sent"], summary["acknowledged"]) == (4, 4)
    assert_has(sent, summary)
    page = sent.read_text()
    assert "&lt;b&gt;hello" in page
    assert re.search(r"<tr><td>thing_0</td><td>2</td><td>2</td><td>[0-9.]+</td></tr>", page)
    assert pair.environment["AWS_SECRET_ACCESS_KEY"] not in page
    summary = summary_of(window.end().out)
    assert summary["received"] == 8
    assert_has(received, summary)


def test_a_page_that_could_not_be_written_is_refused_before_anything_is_sent(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, explained: Explained
) -> None:
    file = tmp_path / "missing" / "run.html"
    result = main_of_pair("send", *pair.to_broker, "--report", file, status=2)
    explained(result, "ReportUnwritable", file)
    assert "posting" not in result.err


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_the_page_of_a_run_with_an_outage_that_ctrl_c_ends_in_a_browser(
    pair: Pair, service: AwsService, relay: Relay, tmp_path: Path
) -> None:
    from playwright.sync_api import sync_playwright

    file = tmp_path / "run.html"
    window = pair.start("send", *relay.to_broker(service), "--duration", 0, "--interval", 0.1, "--report", file)
    window.await_line("posting message")
    relay.down()
    window.await_line("lost its connection")
    relay.up()
    for name in pair.recorded():
        window.await_line(f"{name} reconnected")
    assert not file.exists()
    window.signal(signal.SIGINT)
    window.end(130)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        papers = set()
        for scheme, width in (("light", 400), ("dark", 1000)):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.set_default_timeout(1000 * PATIENCE_S)
            asked, said = list[str](), list[str]()
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.goto(file.as_uri())
            papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            boxes = [band.bounding_box() for band in page.locator("rect.band").all()]
            assert len(boxes) >= 2
            assert all(box and box["width"] > 1 for box in boxes)
            assert page.locator("#outages").inner_text().endswith("of 2 things offline")
            assert page.get_by_text("Ended with exit status 130").is_visible()
            assert (asked, said) == ([file.as_uri()], [])
        assert len(papers) == 2
        browser.close()
