"""The web page in a real browser: upload, look at the motion, generate, cancel, look at past runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from diffsynth import VideoData, save_video

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
pytest.importorskip("gradio", reason="needs gradio, the extra ui")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds until a test that waits gives up


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder of its videos, address for its owner) of a page with the nano model."""
    folder = tmp_path_factory.mktemp("page")
    options = ["--model", "nano", "--port", "0", "-o", folder / "videos", "--json"]
    command = [sys.executable, "-m", "diffsynth.cli.main", "ui", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        told = json.loads(process.stdout.readline())
        yield told["address"], folder / "videos", told["owner"]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) in (0, 130)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run")
    profile = tmp_path_factory.mktemp("profile")
    # Colours are converted as on a GPU: without, Chromium rounds BT.709's blue coarsely, by up to 12 levels.
    gpu = ("use-gl=angle", "use-angle=swiftshader", "enable-unsafe-swiftshader")
    for name in ("headless=new", "no-sandbox", "disable-dev-shm-usage", *gpu, *quiet):
        options.add_argument(f"--{name}")
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("--window-size=1500,1300")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def until(browser, what):
    """The first true answer of what(browser)."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, PATIENCE, 0.2, ignored_exceptions=[StaleElementReferenceException])
    return wait.until(what)


def find(browser, selector):
    return until(browser, lambda b: next(iter(b.find_elements("css selector", selector)), None))


def panel_says(browser, pattern):
    def text(b):
        return b.find_element("css selector", "#panel").get_property("innerHTML")

    return until(browser, lambda b: re.search(pattern, text(b)))


def fill(browser, selector, text):
    field = find(browser, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
    field.clear()
    field.send_keys(text)


def click(browser, selector):
    button = find(browser, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()


@pytest.fixture(scope="module")
def page(server, browser):
    """The page with a reference uploaded and a prompt written."""
    browser.get("about:blank")
    browser.get_log("browser")  # forgotten: the requests of earlier pages that leaving them broke off
    browser.get(server[0])
    clip = ROOT / "examples" / "data" / "circle.mp4"
    find(browser, "#reference input[type=file]").send_keys(str(clip))
    find(browser, "#reference video")
    fill(browser, "#prompt textarea", "a blue star on a yellow background")
    fill(browser, "#seed input", "7")
    more = browser.find_element("xpath", "//button[contains(., 'More')]")
    browser.execute_script("arguments[0].click()", more)
    return browser


def test_an_example_fills_reference_and_prompt_and_empty_boxes_are_hidden(server, browser):
    browser.get(server[0])
    click(browser, "#examples tbody tr:nth-child(2)")
    find(browser, "#reference video")
    until(browser, lambda b: b.find_element("css selector", "#prompt textarea").get_property("value"))
    seed = browser.find_element("css selector", "#seed input")
    until(browser, lambda _: seed.get_property("value") == "")
    assert seed.get_attribute("placeholder") == "a new one"
    boxes = [browser.find_element("css selector", name) for name in ("#result", "#motion", "#files")]
    assert [box.is_displayed() for box in boxes] == [False] * 3
    for name in ("#prompt", "#go"):
        place = browser.find_element("css selector", name).rect
        assert place["y"] + place["height"] < 800


def test_another_model_brings_its_defaults_and_the_field_for_a_picture(server, browser):
    browser.get(server[0])
    find(browser, "#examples")
    assert not browser.find_elements("css selector", "#picture")
    click(browser, "#model input")
    named = "//*[@id='model']//li[contains(., 'TI2V')]"
    until(browser, lambda b: next(iter(b.find_elements("xpath", named)), None)).click()
    find(browser, "#picture")
    until(browser, lambda b: "knows 84 words" in b.find_element("css selector", "#model").text)
    click(browser, "#examples tbody tr:nth-child(1)")  # the examples are others now, and work
    find(browser, "#reference video")
    until(browser, lambda b: b.find_element("css selector", "#prompt textarea").get_property("value"))
    place = browser.find_element("css selector", "#go").rect
    assert place["y"] + place["height"] < 800


def test_the_status_of_a_run_is_seen_without_a_scroll_on_a_phone(server, browser):
    size = browser.get_window_size()
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(server[0])
    go, panel = (find(browser, name).rect for name in ("#go", "#panel"))
    assert go["y"] < panel["y"] < 844 - 100
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.set_window_size(size["width"], size["height"])


def test_the_motion_of_an_uploaded_reference_is_shown(page):
    click(page, "#look")
    panel_says(page, "where it moves")
    video = find(page, "#motion video")
    until(page, lambda _: page.execute_script("return arguments[0].readyState >= 2", video))


def test_a_video_is_made_shown_and_written_with_its_record(page, server):
    fill(page, "#steps input", "4")
    click(page, "#go")
    panel_says(page, "fv-stages")
    panel_says(page, "fv-result")
    for name in ("#result", "#motion"):
        video = find(page, f"{name} video")
        until(page, lambda _, v=video: page.execute_script("return arguments[0].readyState >= 2", v))
    assert "the reference's" in page.find_element("css selector", "#motion").text
    (path,) = server[1].glob("*.mp4")
    record = json.loads(path.with_suffix(".mp4.json").read_text())
    assert record["prompt"] == "a blue star on a yellow background"
    assert record["options"]["seed"] == 7
    with VideoData(path) as made:
        assert (len(made), made.shape()) == (17, (64, 64))
    script = "return fetch(arguments[0]).then(r => r.blob()).then(b => b.size)"
    find(page, "#files a")
    links = {link.get_attribute("href") for link in page.find_elements("css selector", "#files a")}
    sizes = {page.execute_script(script, link) for link in links}
    assert sizes == {file.stat().st_size for file in (path, path.with_suffix(".mp4.json"))}


def test_the_time_of_the_next_run_is_told_before_the_click(page):
    fill(page, "#steps input", "8")
    click(page, "#prompt textarea")
    find(page, "#expected")
    until(
        page, lambda b: re.search(r"takes about [0-9]+ s", b.find_element("css selector", "#expected").text)
    )


def test_a_run_that_is_cancelled_writes_nothing(page, server):
    before = set(server[1].iterdir())
    fill(page, "#steps input", "50")
    click(page, "#go")
    panel_says(page, "guided [1-9]")
    click(page, "#cancel")
    panel_says(page, "Cancelled; nothing was written")
    assert set(server[1].iterdir()) == before


def test_who_runs_the_page_cancels_the_run_of_another(page, server):
    visitor = page.current_window_handle
    assert not page.find_elements("css selector", "#runs")
    click(page, "#go")
    panel_says(page, "guided [1-9]")
    page.switch_to.new_window("tab")
    page.get(server[2])
    click(page, "#again")
    click(page, "#runs input")
    click(page, "#runs ul li")
    click(page, "#end")
    panel_says(page, "Stopping after this step")
    page.close()
    page.switch_to.window(visitor)
    panel_says(page, "Cancelled; nothing was written")


def test_a_past_run_is_shown_again(page):
    click(page, "#past button img")
    panel_says(page, "fv-result")


def test_the_settings_of_a_past_run_fill_the_fields(page):
    fill(page, "#prompt textarea", "another prompt")
    click(page, "#use")
    panel_says(page, "settings of that run")
    values = [
        ("#prompt textarea", "a blue star on a yellow background"),
        ("#seed input", "7"),
        ("#steps input", "4"),
    ]
    for name, value in values:
        until(page, lambda b, n=name, v=value: find(b, n).get_property("value") == v)


def test_two_clicks_are_two_runs_and_words_and_losses_are_told(page, server):
    before = len(list(server[1].glob("*.mp4")))
    click(page, "#go")
    panel_says(page, "motion loss [-+][0-9]+%")
    click(page, "#go")
    panel_says(page, "1 run of yours after this one")
    until(page, lambda _: len(list(server[1].glob("*.mp4.json"))) == before + 2)
    panel_says(page, "fv-result")


def test_what_is_wrong_is_said_and_goes_when_the_prompt_changes(page):
    fill(page, "#prompt textarea", " ")
    click(page, "#go")
    panel_says(page, "prompt is empty")
    fill(page, "#prompt textarea", "a red square")
    until(page, lambda b: "fv-error" not in find(b, "#panel").get_property("innerHTML"))


def test_what_is_wrong_is_said_and_nothing_was_wrong_in_the_browser(page):
    fill(page, "#steps input", "1000")
    click(page, "#go")
    panel_says(page, "num_inference_steps must be a whole number from 1 to 200; got 1000")
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if "favicon" not in message] == []


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (220, 150, 120), (128, 128, 128), (30, 30, 30)]
READ_CANVAS = """
const [points, done] = arguments;
const video = document.querySelector("video");
video.muted = true;
video.onseeked = () => {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  const context = canvas.getContext("2d", {colorSpace: "srgb"});
  context.drawImage(video, 0, 0);
  done(points.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3)));
};
video.currentTime = 0.1;
"""


@pytest.mark.parametrize(("height", "width"), [(480, 832), (832, 480), (720, 1280)])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_the_browser_shows_saved_colours_within_three_levels(browser, tmp_path, height, width, suffix):
    frame = np.zeros((height, width, 3), np.uint8)
    side = width // len(COLOURS)
    for index, colour in enumerate(COLOURS):
        frame[:, index * side : (index + 1) * side] = colour
    save_video([frame] * 5, tmp_path / f"colours{suffix}", fps=10, quality=9)
    (tmp_path / "page.html").write_text(f'<video src="colours{suffix}" preload="auto"></video>')
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{files.server_port}/page.html")
        points = [[index * side + side // 2, height // 2] for index in range(len(COLOURS))]
        shown = browser.execute_async_script(READ_CANVAS, points)
        files.shutdown()
    assert np.abs(np.array(shown) - np.array(COLOURS)).max() <= 3
