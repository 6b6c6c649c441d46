"""The report in a real browser without a network: opened, clicked through, on a phone and in the dark."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from media import coded_frames, write_video
from PIL import Image
from report_runs import HOSTILE, make_run, rollout_row, small_video

from videor1.config import TemporalConfig, VideoConfig
from videor1.report import write_report

REQUIRED = os.environ.get("VIDEOR1_BROWSER") == "required"  # then nothing here may be skipped
if not REQUIRED:
    pytest.importorskip("selenium", reason='needs selenium: pip install -e ".[test]" (in the clone)')
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update --hide-scrollbars"
SHOTS = os.environ.get("VIDEOR1_SCREENSHOTS")  # a folder to keep screenshots in, to look at


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if program is None or driver is None:
        reason = f"needs a browser and its driver: {' or '.join(BROWSERS)}, and chromedriver; found {program}, {driver}"
        (pytest.fail if REQUIRED else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


class Window:
    """A page that stays open, in a tab of its own."""

    def __init__(self, browser: Any, page: Path, *, phone: bool) -> None:
        self.browser, self.page = browser, page
        browser.switch_to.new_window("tab")
        self.tab = browser.current_window_handle
        metrics = {"width": 375 if phone else 1280, "height": 800, "deviceScaleFactor": 1 + phone, "mobile": phone}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.dark(False)
        self.cdp("Network.enable")
        self.cdp("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        browser.get_log("performance"), browser.get_log("browser")
        browser.get(page.as_uri())
        self.wait_for("document.documentElement.dataset.drawn")
        self.began = self.js("return document.getElementById('pick').selectedIndex")
        assert page.as_uri() in self.requests()

    def again(self) -> Window:
        """Bring the page to the front, light, without filters, and at the rollout that it began with."""
        self.browser.switch_to.window(self.tab)
        self.dark(False)
        self.js(
            "for (const select of document.querySelectorAll('select[id^=filter], #pick')) {"
            "select.selectedIndex = select.id === 'pick' ? arguments[0] : 0;"
            "select.dispatchEvent(new Event('change'))}",
            self.began,
        )
        return self

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.browser.execute_cdp_cmd(command, parameters)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def wait_for(self, condition: str, *arguments: Any) -> None:
        WebDriverWait(self.browser, 60).until(lambda _: self.js(f"return {condition}", *arguments))

    def dark(self, on: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[feature])

    def find(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def click(self, element: Any) -> None:
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def choose(self, selector: str, text: str) -> None:
        Select(self.find(selector)).select_by_visible_text(text)

    def pick(self, index: int) -> None:
        Select(self.find("#pick")).select_by_index(index)

    @property
    def picks(self) -> list[str]:
        """The first words of the rollouts in the list."""
        return self.js("return [...document.getElementById('pick').options].map(o => o.text.split(' · ')[0])")

    @property
    def card(self) -> str:
        return self.find("#rollout").text

    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def clean(self) -> None:
        """Nothing was complained about, nothing asked for beyond the page itself, nothing is wider than the window."""
        assert self.browser.get_log("browser") == []
        assert [url for url in self.requests() if not url.startswith(("data:", "blob:", self.page.as_uri()))] == []
        assert self.js("return window.hit") is None
        assert self.js("return document.documentElement.scrollWidth <= window.innerWidth")

    def picture(self, width: int, height: int) -> Image.Image:
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.cdp("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def shot(self, name: str) -> None:
        """Keep a picture of the whole page, where one asked for it."""
        if SHOTS:
            size = self.js("return [document.documentElement.clientWidth, document.documentElement.scrollHeight]")
            self.picture(*size).save(Path(SHOTS, f"report_{name}.png"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, and the pages ``one.html`` of the first, ``none.html`` of the last, ``two.html`` of the others."""
    folder = tmp_path_factory.mktemp("pages")
    video = small_video(folder / "one.mp4")
    rows = [
        rollout_row(1, video, temporal=0.0, accuracy=[0.0, 0.0]),
        rollout_row(10, video),
        rollout_row(20, video, accuracy=[1.0, 0.25], problem=HOSTILE, options=[HOSTILE, "B. blue"]),
        rollout_row(30, folder / "gone.mp4"),
    ]
    make_run(folder / "first", steps=60, rollouts=rows)
    rows = [rollout_row(5, video, permutation=[1, 0]), rollout_row(6, None)]
    rows.append(rollout_row(7, video, permutation=[2, 0, 1]))
    for step, ms in ((8, 740), (9, 99_960)):  # between two frames
        long = write_video(folder / f"{step}.mp4", coded_frames(16, 96, 160), pts_ms=[ms * i for i in range(16)])
        rows.append(rollout_row(step, long, permutation=list(range(7, -1, -1))))
    pairs = {"temporal": TemporalConfig(shuffle_unit="temporal_patch"), "video": VideoConfig(max_frames=16)}
    make_run(folder / "second", steps=40, rollouts=rows, **pairs)
    unknown = {"shuffled_completions": [], "shuffled_accuracy": [None, None], "temporal": 0.0}
    make_run(folder / "third", steps=0, rollouts=[rollout_row(step, video, **unknown) for step in (1, 2)])
    write_report(folder / "first", folder / "one.html")
    write_report([folder / "first", folder / "second"], folder / "two.html")
    write_report(folder / "third", folder / "none.html")
    return folder


Windows = Callable[[str, bool], Window]


@pytest.fixture(scope="module")
def windows(browser: Any, folder: Path) -> Windows:
    opened: dict[tuple[str, bool], Window] = {}

    def show(page: str, phone: bool) -> Window:
        if (page, phone) not in opened:
            opened[page, phone] = Window(browser, folder / page, phone=phone)
        return opened[page, phone].again()

    return show


@pytest.fixture
def one(windows: Windows) -> Window:
    return windows("one.html", False)


def frame_numbers(strip: Any) -> list[str]:
    return [item.text.split()[0] for item in strip.find_elements(By.TAG_NAME, "li")]


def test_every_chart_is_drawn(one: Window) -> None:
    charts = one.all(".plot")
    assert len(charts) == 17
    assert one.js("return document.documentElement.dataset.drawn") == "17"
    for chart in charts:
        assert one.js("return arguments[0].querySelectorAll('.scatterlayer path').length", chart) > 0
        assert chart.get_attribute("aria-label")
    one.shot("light")
    one.clean()


def test_a_name_in_a_legend_hides_its_line(one: Window) -> None:
    shown = "document.getElementById('chart-reward').data.filter(t => t.visible !== 'legendonly').map(t => t.name)"
    before = one.js(f"return {shown}")
    toggle = one.find("#chart-reward .legendtoggle")
    one.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", toggle)
    ActionChains(one.browser).move_to_element(toggle).click().perform()
    one.wait_for(f"{shown}.length < arguments[0]", len(before))
    assert set(before) - set(one.js(f"return {shown}")) == {"total", "total, each line"} & set(before)
    assert one.js("return document.querySelector('#chart-reward .scatterlayer').children.length") < len(before)
    one.js("return Plotly.restyle('chart-reward', {visible: true})")
    one.clean()


def test_the_next_rollout_by_button_key_and_list(one: Window) -> None:
    def at(step: int) -> None:
        assert f"Step {step} ·" in one.card
        place = [1, 10, 20, 30].index(step) + 1
        assert one.find("#position").text == f"{place} of 4"
        assert one.find("#previous").is_enabled() == (place > 1)
        assert one.find("#next").is_enabled() == (place < 4)

    at(10)  # the first with a bonus
    for button, step in (("#previous", 1), ("#next", 10)):
        one.click(one.find(button))
        at(step)
    for key, step in ((Keys.ARROW_RIGHT, 20), (Keys.ARROW_LEFT, 10)):
        one.find("body").send_keys(key)
        at(step)
    one.pick(3)
    at(30)
    one.find("body").send_keys(Keys.ARROW_RIGHT)
    at(30)
    one.clean()


def test_filters(one: Window) -> None:
    def choose(name: str, value: str) -> list[str]:
        one.choose(f"#filter-{name}", value)
        return [words.removeprefix("step ") for words in one.picks]

    assert choose("right", "all correct") == ["20"]
    assert "2 of 2 correct (accuracy above 0.1)" in one.card
    assert "◐ partly correct" in one.card
    assert choose("right", "none correct") == ["1"]
    assert choose("bonus", "got it") == []
    assert "No rollout on this page is like that." in one.card
    assert one.find("#position").text == "none"
    assert choose("right", "any") == ["10", "20", "30"]
    assert choose("step", "20") == ["20"]
    one.clean()


def test_a_rollout(one: Window) -> None:
    for words in (
        "What comes first in 10?", "✓ B. blue solution", "Frames in order", "Frames shuffled", "✓ correct", "✗ wrong",
        "1 of 2 correct", "reward 2.20", "advantage +0.71", "advantage −0.71", "tokens 7 (cut at the limit)",
        "1 of 2 were skipped or stopped", "not known", "<answer>A</answer>",
    ):  # fmt: skip
        assert words in one.card
    assert [frame_numbers(strip) for strip in one.all(".frames")] == [["1", "2", "3", "4"], ["4", "1", "3", "2"]]
    pictures = one.all(".frames img")
    assert all(one.js("return arguments[0].complete && arguments[0].naturalWidth", image) == 144 for image in pictures)
    sources = [image.get_attribute("src") for image in pictures]
    assert sources[4:] == [sources[i] for i in (3, 0, 2, 1)]
    assert pictures[4].get_attribute("alt") == "Place 1: frame 4 of 4, at 0.88 seconds"
    one.clean()


def test_tokens(one: Window) -> None:
    """Their colours, what they say when pointed at and when tapped, and the switch."""
    tokens = one.find(".tokens").find_elements(By.CSS_SELECTOR, "[data-token]")
    levels = [token.get_attribute("class") for token in tokens]
    assert levels == ["t0", "t1", "t2", "t3", "t4", "tx", "t0", "t0", "t1", "t0", "t0"]
    text = one.find(".tokens").text.replace("▯", "").replace("↵", "")
    assert text == "<think>café it</think>\n<answer>B</answer><|im_end|>"
    assert tokens[3].get_attribute("title") == '"é": log-prob −3.1000, p 0.0450'
    assert tokens[2].get_attribute("title").startswith("part of a character: log-prob")
    assert tokens[5].get_attribute("title") == '"</think>": log-prob not known'
    one.click(tokens[4])
    assert one.find(".token-info").text == 'Token 5 of 11, " it": log-prob −7.2500, p 0.000710'
    colour = "return getComputedStyle(arguments[0]).backgroundColor"
    assert len({one.js(colour, token) for token in tokens[:5]}) == 5
    one.click(one.find("#coloured"))
    assert len({one.js(colour, token) for token in tokens}) == 1
    one.click(one.find("#coloured"))
    one.clean()


def test_hostile_text_and_media_that_are_gone(one: Window) -> None:
    one.choose("#filter-step", "20")
    assert "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>" in one.card
    assert "[U+202E]right to left[U+202C] [U+0000][U+0007]" in one.card
    assert one.all("#rollout script") == []
    assert [image for image in one.all("img") if not image.get_attribute("src").startswith("data:image/jpeg")] == []
    one.choose("#filter-step", "30")
    assert "No frames of gone.mp4: " in one.card
    assert "[missing_file]" in one.card
    one.clean()


PAIRS = (("--text", "--card"), ("--quiet", "--card"), ("--quiet", "--page"), ("--accent", "--page"))
PAIRS += (("--good", "--good-back"), ("--bad", "--bad-back"), ("--warn", "--warn-back"))
PAIRS += tuple(("--token-text", f"--t{i}") for i in (1, 2, 3, 4))


def test_the_dark(one: Window) -> None:
    """Also where the light goes out while the page is open, and in the charts."""
    grid = "document.getElementById('chart-reward').layout.xaxis.gridcolor"
    colours = []
    for dark in (False, True):
        one.dark(dark)
        one.wait_for(f"{grid} === arguments[0]", "#2a303a" if dark else "#e6e9ee")
        colours.append(sum(one.picture(4, 4).getpixel((3, 3))))
        one.shot("dark" if dark else "back_to_light")
        for text, back in PAIRS:
            assert contrast(one, text, back) >= 4.5, (dark, text, back)
    assert colours[0] > 600
    assert colours[1] < 120
    one.clean()


def contrast(window: Window, one: str, other: str) -> float:
    def luminance(name: str) -> float:
        get = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()"
        code = window.js(get, name)
        parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_phone(windows: Windows) -> None:
    window = windows("two.html", True)
    assert window.js("return window.innerWidth") == 375
    for button in window.all("button"):
        assert button.size["height"] >= 36
        assert button.size["width"] >= 44
    window.pick(0)
    for _ in window.picks:
        assert window.js("return document.documentElement.scrollWidth") <= 375
        window.js("document.getElementById('next').click()")
    window.clean()
    window.shot("phone_two")


def test_shuffled_completions_of_which_none_was_run(windows: Windows) -> None:
    """Nor has any prompt a bonus: the first is shown."""
    window = windows("none.html", True)
    assert "Step 1 ·" in window.card
    assert "Completions from shuffled frames: none was run to its end" in window.card
    assert "2 of 2 were skipped or stopped" in window.card
    assert "0 of 0" not in window.card
    window.clean()
    window.shot("phone_none")


@pytest.mark.parametrize("phone", [False, True])
def test_times_of_long_videos_leave_the_rows_even(windows: Windows, phone: bool) -> None:
    window = windows("two.html", phone)
    for step, some in (("8", {"1 0.00 s", "14 9.62 s", "16 11.1 s"}), ("9", {"1 0.00 s", "11 999.6 s", "16 1499 s"})):
        window.choose("#filter-step", step)
        labels = window.js(
            "return [...document.querySelectorAll('.frames li > span')].map(e => "
            "[e.innerText.replace(/\\s+/g, ' '), e.clientHeight, e.scrollWidth - e.clientWidth])"
        )
        assert len(labels) == 32
        assert some <= {text for text, _, _ in labels}
        assert len({height for _, height, _ in labels}) == 1
        assert max(beyond for _, _, beyond in labels) == 0, labels
        window.shot(f"long_video_{step}_{'phone' if phone else 'wide'}")
    window.clean()


def test_several_runs(windows: Windows) -> None:
    window = windows("two.html", False)
    names = window.js("return [...document.querySelectorAll('#chart-kl .legendtext')].map(e => e.textContent)")
    assert names == ["first", "second"]
    window.shot("runs")
    window.choose("#filter-run", "second")
    assert window.picks == ["second"] * 5
    assert "Frames shuffled, in pairs" in window.card
    assert frame_numbers(window.all(".frames")[1]) == ["3", "4", "1", "2"]
    window.click(window.find("#next"))
    assert "Completions from the text: 1 of 2 correct" in window.card
    window.click(window.find("#next"))
    assert "The run shuffled 6 frames, but the file gives 4 now" in window.card
    window.clean()


def test_by_keyboard_alone(one: Window) -> None:
    """The first stop leads past the head, and whatever has the focus shows it."""
    # What has the focus last is where the next stop is looked for.
    one.js("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")
    seen = []
    for _ in range(40):
        ActionChains(one.browser).send_keys(Keys.TAB).perform()
        if one.js("return document.activeElement === document.body"):
            break  # past the last
        seen.append(one.js("return document.activeElement.id || document.activeElement.textContent"))
        assert one.js("return getComputedStyle(document.activeElement).outlineStyle") != "none", seen[-1]
    assert seen[0] == "To the charts"
    assert {"Rollouts", "filter-step", "pick", "next"} <= set(seen)
    headings = one.js("return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert headings[0] == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(headings))
    one.clean()
