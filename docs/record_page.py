"""Record locust.png, the picture in docs/locust.md of Locust's page: a real run, on the embedded AWS IoT.

usage: pip install -r docs/requirements.txt && python docs/record_page.py; it needs Chromium.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "locust.png"
PORT = 8089
RUN_S = 45


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "ELF_MISC_DIR": directory}
        elf = [sys.executable, str(ROOT / "elf.py")]
        subprocess.run([*elf, "--local", "create", "60"], env=environment, check=True)
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "locustfile.py"), "--processes", "2"]
        command += ["--web-host", "127.0.0.1", "--web-port", str(PORT), "--autostart", "--subscribers", "0.05"]
        locust = subprocess.Popen([*command, "--spawn-rate", "5"], env=environment, stdin=subprocess.DEVNULL)
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 1150, "height": 640}, color_scheme="light")
                while True:
                    try:
                        urllib.request.urlopen(f"http://127.0.0.1:{PORT}").close()
                        break
                    except OSError:
                        page.wait_for_timeout(500)
                page.goto(f"http://127.0.0.1:{PORT}/?tab=charts")
                page.wait_for_timeout(1000 * RUN_S)
                shot = page.screenshot()
                browser.close()
        finally:
            locust.terminate()
            locust.wait()
            subprocess.run([*elf, "clean"], env=environment, check=True)
    Image.open(io.BytesIO(shot)).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(PICTURE, optimize=True)
    print(f"{PICTURE.name}: {PICTURE.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
