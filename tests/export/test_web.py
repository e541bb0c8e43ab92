"""The page in a real browser: text is typed and read, a piece composed, played and saved, a digit drawn."""

import functools
import http.server
import shutil
import threading
from importlib.util import find_spec

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from kru_hf import KRUConfig, KRUForCausalLM, KRUForPianoRoll, KRUForSequenceClassification, build_char_tokenizer
from kru_hf.export.__main__ import main

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (Debian: chromium-driver)"),
    pytest.mark.skipif(find_spec("ziglang") is None, reason="no ziglang"),
]
PATIENCE = 60  # seconds


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind, on a server."""
    root = tmp_path_factory.mktemp("pages")
    tokenizer = build_char_tokenizer("the quick brown fox jumps over the lazy dog")
    save(root / "text-model", KRUForCausalLM(KRUConfig(vocab_size=len(tokenizer), state_size=32)), tokenizer)
    music = {"input_size": 88, "state_size": 32, "block_type": "plain", "frame_head": "chain", "frame_head_size": 8}
    save(root / "music-model", KRUForPianoRoll(KRUConfig(**music)))
    save(root / "digits-model", KRUForSequenceClassification(KRUConfig(input_size=1, num_labels=10, state_size=16)))
    for kind in ("text", "music", "digits"):
        words = ["--model", str(root / f"{kind}-model"), "--format", "web", "--output_dir", str(root / kind)]
        assert main(words) == 0
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "autoplay-policy=no-user-gesture-required"):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, pages):
    def open_page(kind):
        browser.get(f"{pages[1]}/{kind}/index.html")
        body = browser.find_element(By.TAG_NAME, "body")
        until(browser, lambda: body.get_attribute("data-ready"))
        assert body.get_attribute("data-ready") == "yes", browser.find_element(By.ID, "note").text
        return lambda selector: browser.find_element(By.CSS_SELECTOR, selector)

    return open_page


def until(browser, condition):
    WebDriverWait(browser, PATIENCE).until(lambda _: condition())


def test_text(browser, page):
    find = page("text")
    find("#prompt").clear()
    find("#prompt").send_keys("the fox Z")
    find("#go").click()
    until(browser, lambda: len(find("#paper").text) > 200)
    assert find("#paper").text.startswith("the fox Z") and "never seen Z" in find("#note").text
    assert "characters per second" in find("#speed").text
    find("#go").click()
    assert find("#go").text == "Write"


def test_music(browser, page):
    find = page("music")
    assert not find("#play").is_enabled()
    find("#go").click()
    until(browser, lambda: find("#play").is_enabled())
    blob = """
        const done = arguments[0];
        fetch(document.querySelector("#save").href).then((r) => r.arrayBuffer())
            .then((b) => done([...new Uint8Array(b)].slice(0, 18)));
    """
    assert browser.execute_async_script(blob)[:4] == [*b"MThd"]
    find("#play").click()
    until(browser, lambda: find("#play").text == "Stop")
    find("#play").click()
    assert find("#play").text == "Play"


def test_digit(browser, page):
    find = page("digits")
    pad = find("#pad")
    stroke = ActionChains(browser).move_to_element_with_offset(pad, 0, -80).click_and_hold()
    stroke.move_by_offset(10, 80).move_by_offset(-5, 60).release().perform()
    until(browser, lambda: find("#answer").text.isdigit())
    assert "pixels per second" in find("#speed").text


def test_size(pages):
    """Code and page, without the weights: a model of 123K parameters in int8 adds 139 KB."""
    root, _ = pages
    for kind in ("text", "music", "digits"):
        files = [path for path in (root / kind).iterdir() if path.name != "model.kru"]
        assert sum(path.stat().st_size for path in files) < 60_000
