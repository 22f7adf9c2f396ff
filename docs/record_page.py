"""Record the pictures of pages: locust.png in docs/locust.md, and report.png in docs/messages.md, of real runs.

usage: pip install -r docs/requirements.txt && python docs/record_page.py [locust | report]; it needs Chromium.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support.networks import Relay  # noqa: E402

ELF = [sys.executable, str(ROOT / "elf.py")]
PORT = 8089
RUN_S = 45
OUTAGE_S = 18.0, 3.0  # when it begins, and how long it lasts


def record_locust(browser: Any, environment: Mapping[str, str]) -> bytes:
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "locustfile.py"), "--processes", "2"]
    command += ["--web-host", "127.0.0.1", "--web-port", str(PORT), "--autostart", "--subscribers", "0.05"]
    locust = subprocess.Popen([*command, "--spawn-rate", "5"], env=environment, stdin=subprocess.DEVNULL)
    try:
        page = browser.new_page(viewport={"width": 1150, "height": 640}, color_scheme="light")
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}").close()
                break
            except OSError:
                page.wait_for_timeout(500)
        page.goto(f"http://127.0.0.1:{PORT}/?tab=charts")
        page.wait_for_timeout(1000 * RUN_S)
        return bytes(page.screenshot())
    finally:
        locust.terminate()
        locust.wait()


def record_report(browser: Any, environment: Mapping[str, str]) -> bytes:
    """Let the network fail for some seconds, and show what the page tells of that."""
    asked = subprocess.run(
        [*ELF, "list", "thing_0", "--output", "json"], env=environment, check=True, capture_output=True, text=True
    )
    relay = Relay(int(json.loads(asked.stdout.splitlines()[0])["broker"].rpartition(":")[2]))
    with tempfile.TemporaryDirectory() as directory:
        send = [*ELF, "send", "--duration", str(RUN_S), "--interval", "0.5", "--report", "run.html"]
        running = subprocess.Popen([*send, "--mqtt-endpoint", f":{relay.port}"], env=environment, cwd=directory)
        while not relay.arrivals:
            time.sleep(0.1)
        time.sleep(OUTAGE_S[0])
        relay.down()
        time.sleep(OUTAGE_S[1])
        relay.up()
        running.wait()
        page = browser.new_page(viewport={"width": 860, "height": 1120}, color_scheme="light")
        page.goto((Path(directory) / "run.html").as_uri())
        return bytes(page.screenshot())


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    pages = {"locust": record_locust, "report": record_report}
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        environment = {**os.environ, "ELF_MISC_DIR": directory}
        subprocess.run([*ELF, "--local", "create", "60"], env=environment, check=True)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            for name in sys.argv[1:] or pages:
                picture = ROOT / "docs" / f"{name}.png"
                shot = Image.open(io.BytesIO(pages[name](browser, environment)))
                shot.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(picture, optimize=True)
                print(f"{picture.name}: {picture.stat().st_size // 1024} KiB")
        finally:
            browser.close()
            subprocess.run([*ELF, "clean"], env=environment, check=True)


if __name__ == "__main__":
    main()
