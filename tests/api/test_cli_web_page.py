"""The built-in page: served with a strict policy, nothing from outside, no markup from text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fuseline.api.routes.web import FILES, FOLDER, router


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(router())
    return TestClient(app)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.resources: list[str] = []
        self.inline: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self._open = tag if tag in ("script", "style") else ""
        self.ids += [named["id"]] if "id" in named else []
        self.resources += [named[key] for key in ("src", "href") if named.get(key)]
        self.inline += [key for key in named if key.startswith("on") or key == "style"]

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def test_served_with_a_strict_policy(client: TestClient) -> None:
    for path, (name, media_type) in FILES.items():
        response = client.get(path)
        assert response.status_code == 200 and response.headers["content-type"] == media_type
        assert response.content == (FOLDER / name).read_bytes()
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy


def test_page_fits_the_policy(client: TestClient) -> None:
    page = Page()
    page.feed(client.get("/").text)
    assert page.inline == []
    assert sorted(page.resources) == ["web/app.css", "web/app.js", "web/icon.svg"]
    assert len(page.ids) == len(set(page.ids))
    script = (FOLDER / "app.js").read_text()
    used = set(re.findall(r'\$\("([a-z-]+)"\)', script))
    assert used <= set(page.ids)


def test_no_text_becomes_markup() -> None:
    script = (FOLDER / "app.js").read_text()
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert sink not in script
    for path in Path(FOLDER).iterdir():
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http://" not in text and "https://" not in text
