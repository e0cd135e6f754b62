"""The page: its script's logic under node, and that the application serves all that it asks for."""

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.serving.running import Server

SCRIPT = Path(__file__).parent / "stream_test.mjs"
PAGE = Path(__file__).parents[2] / "serving" / "page"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_reading_streams_and_counting() -> None:
    done = subprocess.run(["node", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_everything_that_the_page_asks_for_is_there(server: Server) -> None:
    html = httpx.get(server.url).text
    links = [link for link in re.findall(r'(?:href|src)="([^"]+)"', html) if not link.startswith("data:")]
    assert len(links) >= 2
    imported = {
        f"page/{name}" for script in PAGE.glob("*.js") for name in re.findall(r'from "\./(.+)"', script.read_text())
    }
    assert {f"page/{file.name}" for file in PAGE.iterdir()} - {"page/index.html"} == imported | set(links)
    for link in [*links, *imported]:
        answer = httpx.get(f"{server.url}/{link}")
        assert answer.status_code == 200
        assert answer.text == (PAGE / Path(link).name).read_text()


def test_every_element_that_the_script_looks_for_is_in_the_page() -> None:
    names = set(re.findall(r'find\("#([\w-]+)"\)', (PAGE / "page.js").read_text()))
    assert {"form", "prompt", "send"} <= names
    assert names <= set(re.findall(r'id="([\w-]+)"', (PAGE / "index.html").read_text()))
