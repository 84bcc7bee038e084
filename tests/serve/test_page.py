"""The page, as a newcomer uses it, in a headless Chromium."""

import hashlib
import shutil

import pytest
from served import TEXT, TOKENS, client

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
WAIT = 20_000
expect = sync_api.expect
expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Open a page at a URL; no error of its console passes."""
    wrong, pages = [], []

    def at(url, **options):
        page = browser.new_page(**options)
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.on("request", lambda asked: str(url).split("/")[2] in asked.url or wrong.append(
            asked.url) if asked.url.startswith("http") else None)  # fmt: skip
        page.goto(str(url))
        pages.append(page)
        return page

    yield at
    for page in pages:
        page.close()
    assert [text for text in wrong if "401" not in text] == []


def test_a_newcomer_learns_asks_forks_and_rolls_back(tmp_path, opened):
    with client(tmp_path) as asks:
        page = opened(asks.base_url)
        page.fill("#new-name", "mine")
        page.press("#new-name", "Enter")
        expect(page.locator("#text")).to_be_focused()  # the next thing to do
        page.keyboard.type(TEXT)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # Learn
        expect(page.locator("#doing")).to_contain_text("Done, and saved")
        assert page.inner_text("#surprise").replace("\xa0", " ").strip() == TEXT.strip()
        assert page.locator("#surprise span[class]").count() > 10
        for curve, lines in (("moved", 2), ("norm", 2), ("loss", 1)):
            drawn = page.locator(f"#{curve} polyline")
            assert drawn.count() == lines
            assert len(drawn.first.get_attribute("points").split()) >= 8
        assert page.locator("#legend li").all_inner_texts()[0].endswith("level 0, every 8 tokens")

        page.fill("#tokens", "8")
        page.fill("#message", "Where is the key?")
        page.press("#message", "Enter")
        page.wait_for_selector("#send:visible")
        with_it, without = page.locator(".answer").all()
        assert with_it.locator("b").inner_text() == "with mine"
        assert without.locator("b").inner_text() == "without the memory"
        assert with_it.locator("span").inner_text() != without.locator("span").inner_text()

        page.fill("#fork-name", "twin")
        page.press("#fork-name", "Enter")
        expect(page.locator("#memory")).to_have_value("twin")
        page.select_option("#memory", "mine")
        page.get_by_role("button", name="Roll back to: made").click()
        expect(page.locator("#doing")).to_contain_text("Rolled back")
        assert asks.get("/v1/memories/mine").json()["position"] == 0
        assert asks.get("/v1/memories/twin").json()["position"] == len(TEXT)


def test_what_fails_is_said_in_words(tmp_path, opened):
    with client(tmp_path) as asks:
        page = opened(asks.base_url)
        page.fill("#fork-name", "x")
        page.click("#fork button")
        page.wait_for_selector("#trouble:visible")
        assert "Make a memory first" in page.inner_text("#trouble")
        page.fill("#new-name", "mine")
        page.click("#new button")
        expect(page.locator("#memory")).to_have_value("mine")
        page.click("#learn")
        expect(page.locator("#trouble")).to_contain_text("paste a text")


def test_a_user_gives_a_token_and_the_window_is_narrow(tmp_path, opened):
    tokens = {hashlib.sha256(t.encode()).hexdigest(): name for name, t in TOKENS.items()}
    with client(tmp_path, tokens=tokens) as asks:
        size = {"width": 360, "height": 640}
        page = opened(asks.base_url, viewport=size, color_scheme="dark")
        page.wait_for_selector("#login:visible")
        page.fill("#token", TOKENS["bob"])
        page.press("#token", "Enter")
        page.wait_for_selector("#main:visible")
        assert page.inner_text("#user") == "bob"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(21, 23, 27)"
