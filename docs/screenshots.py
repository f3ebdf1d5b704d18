"""Take pictures of the MLflow UI and of a report in a real browser.

    make screenshots
    python docs/screenshots.py RUN RUN

Starts `mlflow ui` on loopback with a store that has at least two runs, and headless Chromium, which must be installed
(Debian: `apt-get install chromium`) and is driven by Playwright. The report is opened offline; it is an error if it
logs anything to the console or makes a request.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VIEWPORT = {"width": 1280, "height": 800}
MAX_PNG_BYTES = 200_000
MAX_REPORT_BYTES = 5_000_000


@dataclass(frozen=True)
class PageFacts:
    """Errors and requests of a page in the browser."""

    console: list[str]  # errors and warnings, exceptions too
    requests: list[str]  # except the page itself and data: URIs
    size_bytes: int


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def browser_of(path: str) -> Iterator[Browser]:
    """Start headless Chromium; as root, for instance in a container, without its sandbox, as it requires."""
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*flags, "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened_report(browser: Browser, path: Path, *, dark: bool = False) -> Iterator[tuple[Page, PageFacts]]:
    """Open a report offline; yield the page, and its errors and requests so far."""
    context = browser.new_context(viewport=VIEWPORT, offline=True, color_scheme="dark" if dark else "light")
    page = context.new_page()
    facts = PageFacts([], [], path.stat().st_size)
    page.on("console", lambda said: facts.console.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: facts.console.append(str(error)))
    url = path.resolve().as_uri()
    page.on("request", lambda sent: None if sent.url.startswith((url, "data:")) else facts.requests.append(sent.url))
    try:
        page.goto(url, wait_until="load")
        yield page, facts
    finally:
        context.close()


def hover_over_a_chart(page: Page) -> str:
    """Move the pointer onto the first chart; return the values that the page then shows."""
    chart = page.locator(".chart").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    return page.locator("#readout").inner_text()


def require_clean(facts: PageFacts) -> None:
    """End the program if a page has errors, makes requests, or is too large."""
    if facts.console or facts.requests or facts.size_bytes >= MAX_REPORT_BYTES:
        sys.exit(f"error: the report must be silent, ask for nothing and be under 5 MB, got {facts}")


def shoot_report(browser: Browser, runs: list[Path], folder: Path) -> None:
    """Take pictures of the start of the report, its charts with the pointer on one, and its galleries."""
    from components import report

    with tempfile.TemporaryDirectory() as scratch:
        html = report.run(runs, output=Path(scratch) / "report.html").html
        for name, section, dark in (
            ("report", "question", False),
            ("report_losses", "losses", False),
            ("report_errors", "errors", False),
            ("report_pictures", "pictures", False),
            ("report_dark", "curves", True),
        ):
            with opened_report(browser, html, dark=dark) as (page, facts):
                if section == "losses":
                    hover_over_a_chart(page)
                if section != "question":
                    page.locator(f"#{section}").evaluate("element => element.scrollIntoView()")
                    page.wait_for_timeout(300)
                if section == "losses":
                    hover_over_a_chart(page)
                save(page, folder / f"{name}.png")
                require_clean(facts)


@contextmanager
def mlflow_ui(store: str) -> Iterator[str]:
    """Run an MLflow UI; yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        store,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([*command, "--workers", "1"], start_new_session=True, **quiet)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health", server)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its process group: it and its workers
        server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], timeout_s: float = 180) -> None:
    """Wait until a URL answers; end the program if it does not."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.5)
    sys.exit(f"error: mlflow ui did not answer at {url} in {timeout_s:.0f} s")


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request to MLflow's REST API; return the response."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def shoot_mlflow(browser: Browser, store: str, experiment: str, folder: Path) -> None:
    """Take pictures of the table of runs, two runs compared, the loss charts of a run, and one of its artifacts."""
    with mlflow_ui(store) as url:
        api = f"{url}/api/2.0/mlflow"
        found = ask(f"{api}/experiments/search", {"max_results": 10, "filter": f"name = '{experiment}'"})
        experiment_id = found["experiments"][0]["experiment_id"]
        runs = ask(f"{api}/runs/search", {"experiment_ids": [experiment_id], "max_results": 20}).get("runs", [])
        evaluated = [run["info"]["run_id"] for run in runs if has_scores(run)]
        if len(evaluated) < 2:
            sys.exit(f"error: {store}: {experiment} must hold two evaluated runs, got {len(evaluated)}; train another")
        page = mlflow_page(browser, experiment_id)
        table = f"{url}/#/experiments/{experiment_id}/runs"
        run_page = f"{table}/{evaluated[-1]}"
        pair = f"runs={quote(json.dumps(evaluated[-2:]))}&experiments={quote(json.dumps([experiment_id]))}"
        for name, address, awaited, search in (
            ("mlflow_runs", table, "text=Run Name", ""),
            ("mlflow_compare", f"{table}?compareRunsMode=CHART", ".js-plotly-plot", "loss/"),
            ("mlflow_parameters", f"{url}/#/compare-runs?{pair}", "text=Comparing", ""),
            ("mlflow_losses", f"{run_page}/model-metrics", ".js-plotly-plot", "loss/"),
            ("mlflow_artifact", f"{run_page}/artifacts/{drawing_of(url, evaluated[-1])}", "img", ""),
        ):
            page.goto(address, wait_until="domcontentloaded")
            page.wait_for_selector(awaited, timeout=90_000)
            if search:
                page.get_by_placeholder("Search metric charts").fill(search)
            page.wait_for_timeout(6_000)  # the UI draws in several passes, and gives no sign when it is done
            if name == "mlflow_parameters":
                page.get_by_text("Show diff only").first.click()
                page.wait_for_timeout(1_000)
            save(page, folder / f"{name}.png")


def mlflow_page(browser: Browser, experiment_id: str) -> Page:
    """Open a window with settings for training: no assistant, and columns that distinguish runs.

    Versions of MLflow that do not know a setting ignore it.
    """
    columns = ["metrics.`ap/bbox`", "metrics.`ap/segm`", "params.`model.backbone`", "params.`train.dtype`"]
    stored = {
        "mlflow.assistant.panelOpen_v1": "false",
        "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
        "mlflow.workflowType_v1": json.dumps("machine_learning"),
        f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment_id}"]-ReactComponentState': json.dumps(
            {"selectedColumns": columns}
        ),
    }
    context = browser.new_context(viewport=VIEWPORT)
    entries = json.dumps(list(stored.items()))
    context.add_init_script(
        f"for (const [key, value] of {entries}) if (!localStorage.getItem(key)) localStorage.setItem(key, value);"
    )
    return context.new_page()


def drawing_of(url: str, run_id: str) -> str:
    """Return the artifact path of a run's first drawn prediction."""
    query = f"run_id={run_id}&path={quote('plots/predictions')}"
    with urllib.request.urlopen(f"{url}/api/2.0/mlflow/artifacts/list?{query}", timeout=30) as answer:
        files = json.load(answer).get("files", [])
    if not files:
        sys.exit(f"error: run {run_id} must hold drawings (evaluate.drawn_images > 0), got none")
    return files[0]["path"]


def has_scores(run: dict[str, Any]) -> bool:
    """Return True if a run, in the form of the REST API, was evaluated."""
    return any(metric["key"] == "ap/segm" for metric in run["data"].get("metrics", []))


def save(page: Page, path: Path) -> None:
    """Save the visible part of the page as a PNG, with fewer colours if it would be too large."""
    page.screenshot(path=path)
    for colors in (256, 128, 64, 32):
        with Image.open(path) as shot:
            small = shot.convert("RGB").quantize(colors, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
        if path.stat().st_size < MAX_PNG_BYTES:
            break
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def shrink(source: Path, target: Path) -> None:
    """Save a picture at half its size."""
    with Image.open(source) as picture:
        picture.reduce(2).save(target, quality=80)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of the runs that the report is about")
    parser.add_argument("--store", default="sqlite:///mlflow.db", help="of MLflow (%(default)s)")
    parser.add_argument("--experiment", default="maskrcnn", help="with at least two evaluated runs (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the pictures (%(default)s)")
    args = parser.parse_args()
    path = find_browser()
    if path is None:
        sys.exit(f"error: no browser: one of {', '.join(BROWSERS)} must be on PATH; Debian: apt-get install chromium")
    args.output.mkdir(parents=True, exist_ok=True)
    with browser_of(path) as browser:
        shoot_report(browser, args.runs, args.output)
        shoot_mlflow(browser, args.store, args.experiment, args.output)
    shrink(args.runs[-1] / "plots" / "before_after.jpg", args.output / "before_after.jpg")


if __name__ == "__main__":
    main()
