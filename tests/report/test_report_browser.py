"""The report in a real browser without a network: opened, clicked through, on a phone and in the dark."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
from collections.abc import Iterator
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

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
SHOTS = os.environ.get("VIDEOR1_SCREENSHOTS")  # a folder to keep screenshots in, to look at


def found(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program, driver = found(BROWSERS), found(("chromedriver",))
    if program is None or driver is None:
        reason = f"needs a browser and its driver: {' or '.join(BROWSERS)}, and chromedriver; found {program}, {driver}"
        if REQUIRED:
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


class Window:
    """A page that is open."""

    def __init__(self, browser: Any, page: Path, *, width: int = 1280, phone: bool = False, dark: bool = False) -> None:
        self.browser, self.page = browser, page
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.dark(dark)
        self.cdp("Network.enable")
        self.cdp("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        browser.get_log("performance"), browser.get_log("browser")
        browser.get(page.as_uri())
        WebDriverWait(browser, 60).until(lambda _: self.js("return document.documentElement.dataset.drawn"))

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.browser.execute_cdp_cmd(command, parameters)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

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

    @property
    def card(self) -> str:
        return self.find("#rollout").text

    def clean(self) -> None:
        """Nothing was complained about, nothing asked for beyond the page itself, and nothing is wider than the
        window."""
        assert self.browser.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert self.page.as_uri() in asked
        assert [url for url in asked if not url.startswith(("data:", "blob:", self.page.as_uri()))] == []
        assert self.js("return window.hit") is None
        assert self.js("return document.documentElement.scrollWidth <= window.innerWidth")

    def shot(self, name: str) -> Image.Image:
        """The whole page as it is."""
        size = self.js("return [document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        data = self.cdp("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        if SHOTS:
            Path(SHOTS, f"report_{name}.png").write_bytes(base64.b64decode(data))
        file = Path(self.page.parent, f"{name}.png")
        file.write_bytes(base64.b64decode(data))
        with Image.open(file) as picture:
            return picture.convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, and their pages ``one.html`` and ``two.html``."""
    folder = tmp_path_factory.mktemp("pages")
    video = small_video(folder / "one.mp4")
    rows = [
        rollout_row(1, video, temporal=0.0, accuracy=[0.0, 0.0]),
        rollout_row(10, video),
        rollout_row(20, video, accuracy=[1.0, 0.25], problem=HOSTILE, options=[HOSTILE, "B. blue"]),
        rollout_row(30, folder / "gone.mp4"),
    ]
    make_run(folder / "first", steps=60, rollouts=rows)
    pairs = TemporalConfig(shuffle_unit="temporal_patch")
    other = [
        rollout_row(5, video, permutation=[1, 0]),
        rollout_row(6, None),
        rollout_row(7, video, permutation=[2, 0, 1]),
    ]
    make_run(folder / "second", steps=40, rollouts=other, temporal=pairs)
    write_report(folder / "first", folder / "one.html")
    write_report([folder / "first", folder / "second"], folder / "two.html")
    return folder


@pytest.fixture
def one(browser: Any, folder: Path) -> Window:
    return Window(browser, folder / "one.html")


def test_every_chart_is_drawn(one: Window) -> None:
    charts = one.all(".plot")
    assert len(charts) == 15
    assert one.js("return document.documentElement.dataset.drawn") == "15"
    for chart in charts:
        assert one.js("return arguments[0].querySelectorAll('.scatterlayer path').length", chart) > 0
        assert chart.get_attribute("aria-label")
    one.shot("light")
    one.clean()


def test_a_name_in_a_legend_hides_its_line(one: Window) -> None:
    visible = (
        "return document.getElementById('chart-reward').data.filter(t => t.visible !== 'legendonly').map(t => t.name)"
    )
    before = one.js(visible)
    toggle = one.find("#chart-reward .legendtoggle")
    one.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", toggle)
    ActionChains(one.browser).move_to_element(toggle).click().perform()
    WebDriverWait(one.browser, 10).until(lambda _: one.js(visible) != before)
    assert set(before) - set(one.js(visible)) == {"total", "total, each line"} & set(before)
    assert one.js("return document.querySelector('#chart-reward .scatterlayer').children.length") < len(before)
    one.clean()


def test_the_next_rollout_by_button_key_and_list(one: Window) -> None:
    assert "Step 10 ·" in one.card  # the first with a bonus
    assert one.find("#position").text == "2 of 4"
    one.click(one.find("#previous"))
    assert "Step 1 ·" in one.card
    assert not one.find("#previous").is_enabled()
    one.click(one.find("#next"))
    assert "Step 10 ·" in one.card
    one.find("body").send_keys(Keys.ARROW_RIGHT)
    assert "Step 20 ·" in one.card
    one.find("body").send_keys(Keys.ARROW_LEFT)
    assert "Step 10 ·" in one.card
    Select(one.find("#pick")).select_by_index(3)
    assert "Step 30 ·" in one.card
    assert not one.find("#next").is_enabled()
    one.find("body").send_keys(Keys.ARROW_RIGHT)
    assert "Step 30 ·" in one.card
    assert one.find("#position").text == "4 of 4"
    one.clean()


def test_filters(one: Window) -> None:
    def steps() -> list[str]:
        return [option.text.split(" · ")[0] for option in Select(one.find("#pick")).options]

    assert steps() == ["step 1", "step 10", "step 20", "step 30"]
    one.choose("#filter-right", "all correct")
    assert steps() == ["step 20"]
    assert "2 of 2 correct (accuracy above 0.1)" in one.card
    assert "◐ partly correct" in one.card
    one.choose("#filter-right", "none correct")
    assert steps() == ["step 1"]
    one.choose("#filter-bonus", "got it")
    assert steps() == []
    assert "No rollout on this page is like that." in one.card
    assert one.find("#position").text == "none"
    one.choose("#filter-right", "any")
    assert steps() == ["step 10", "step 20", "step 30"]
    one.choose("#filter-step", "20")
    assert steps() == ["step 20"]
    one.clean()


def test_a_rollout(one: Window) -> None:
    for words in (
        "What comes first in 10?",
        "✓ B. blue solution",
        "Frames in order",
        "Frames shuffled",
        "✓ correct",
        "✗ wrong",
        "1 of 2 correct",
        "reward 2.20",
        "advantage +0.71",
        "advantage −0.71",
        "tokens 7 (cut at the limit)",
        "1 of 2 were skipped or stopped",
        "not known",
        "<answer>A</answer>",
    ):
        assert words in one.card
    ordered, shuffled = one.all(".frames")
    numbers = [
        [item.text.split()[0] for item in strip.find_elements(By.TAG_NAME, "li")] for strip in (ordered, shuffled)
    ]
    assert numbers == [["1", "2", "3", "4"], ["4", "1", "3", "2"]]
    pictures = one.all(".frames img")
    assert all(one.js("return arguments[0].complete && arguments[0].naturalWidth", image) == 144 for image in pictures)
    sources = [image.get_attribute("src") for image in pictures]
    assert sources[4:] == [sources[i] for i in (3, 0, 2, 1)]
    assert pictures[4].get_attribute("alt") == "Place 1: frame 4 of 4, at 0.88 seconds"
    one.clean()


@pytest.mark.parametrize("phone", [False, True])
def test_times_of_long_videos_leave_the_rows_even(phone: bool, browser: Any, tmp_path: Path) -> None:
    frames, rows = coded_frames(16, 96, 160), []
    for step, ms in ((1, 740), (2, 99_960)):  # between two frames
        video = write_video(tmp_path / f"{step}.mp4", frames, pts_ms=[ms * i for i in range(16)])
        rows.append(rollout_row(step, video, permutation=list(range(15, -1, -1))))
    run = make_run(tmp_path / "run", rollouts=rows, video=VideoConfig(max_frames=16))
    width = 375 if phone else 1280
    expected = {"1": {"1 0.00 s", "14 9.62 s", "16 11.1 s"}, "2": {"1 0.00 s", "11 999.6 s", "16 1499 s"}}
    window = Window(browser, write_report(run, tmp_path / "page.html"), width=width, phone=phone)
    for step, some in expected.items():
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


def test_shuffled_completions_of_which_none_was_run(browser: Any, tmp_path: Path) -> None:
    """Nor has any prompt a bonus: the first is shown."""
    none = {"shuffled_completions": [], "shuffled_accuracy": [None, None], "temporal": 0.0}
    rows = [rollout_row(step, small_video(tmp_path / "one.mp4"), **none) for step in (1, 2)]
    window = Window(browser, write_report(make_run(tmp_path / "run", rollouts=rows), tmp_path / "page.html"))
    assert "Step 1 ·" in window.card
    assert "Completions from shuffled frames: none was run to its end" in window.card
    assert "2 of 2 were skipped or stopped" in window.card
    assert "0 of 0" not in window.card
    window.clean()


def frame_numbers(strip: Any) -> list[str]:
    return [item.text.split()[0] for item in strip.find_elements(By.TAG_NAME, "li")]


def test_tokens(one: Window) -> None:
    """Their colours, what they say when pointed at and when tapped, and the switch."""
    tokens = one.find(".tokens").find_elements(By.CSS_SELECTOR, "[data-token]")
    levels = [token.get_attribute("class") for token in tokens]
    assert levels == ["t0", "t1", "t2", "t3", "t4", "tx", "t0", "t0", "t1", "t0", "t0"]
    assert (
        one.find(".tokens").text.replace("▯", "").replace("↵", "")
        == "<think>café it</think>\n<answer>B</answer><|im_end|>"
    )
    assert tokens[3].get_attribute("title") == '"é": log-prob −3.1000, p 0.0450'
    assert tokens[2].get_attribute("title").startswith("part of a character: log-prob")
    assert tokens[5].get_attribute("title") == '"</think>": log-prob not known'
    one.click(tokens[4])
    assert one.find(".token-info").text == 'Token 5 of 11, " it": log-prob −7.2500, p 0.000710'
    colour = "return getComputedStyle(arguments[0]).backgroundColor"
    colours = [one.js(colour, token) for token in tokens[:5]]
    assert len(set(colours)) == 5
    one.click(one.find("#coloured"))
    assert len({one.js(colour, token) for token in tokens}) == 1
    one.clean()


def test_hostile_text_is_shown_as_it_is(one: Window) -> None:
    one.choose("#filter-step", "20")
    assert "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>" in one.card
    assert "[U+202E]right to left[U+202C] [U+0000][U+0007]" in one.card
    assert one.all("#rollout script") == []
    assert [image for image in one.all("img") if not image.get_attribute("src").startswith("data:image/jpeg")] == []
    one.clean()


def test_media_that_are_gone(one: Window) -> None:
    one.choose("#filter-step", "30")
    assert "No frames of gone.mp4: " in one.card
    assert "[missing_file]" in one.card
    one.clean()


def test_the_dark(browser: Any, folder: Path) -> None:
    """Also where the light goes out while the page is open, and in the charts."""
    window = Window(browser, folder / "one.html")
    grid = "return document.getElementById('chart-reward').layout.xaxis.gridcolor"
    colours = []
    for dark in (False, True):
        window.dark(dark)
        expected = "#2a303a" if dark else "#e6e9ee"
        WebDriverWait(browser, 10).until(lambda _, expected=expected: window.js(grid) == expected)
        shot = window.shot("dark" if dark else "back_to_light")
        colours.append(shot.getpixel((3, 3)))
        for text, back in (
            ("--text", "--card"),
            ("--quiet", "--card"),
            ("--quiet", "--page"),
            ("--accent", "--page"),
            ("--good", "--good-back"),
            ("--bad", "--bad-back"),
            ("--warn", "--warn-back"),
            *(("--token-text", f"--t{i}") for i in (1, 2, 3, 4)),
        ):
            assert contrast(window, text, back) >= 4.5, (dark, text, back)
    assert sum(colours[0]) > 600
    assert sum(colours[1]) < 120
    window.clean()


def contrast(window: Window, one: str, other: str) -> float:
    """The ratio of WCAG of two of the page's colours."""

    def luminance(name: str) -> float:
        code = window.js(
            "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()", name
        )
        parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["one.html", "two.html"])
def test_a_phone(name: str, browser: Any, folder: Path) -> None:
    window = Window(browser, folder / name, width=375, phone=True)
    assert window.js("return window.innerWidth") == 375
    for button in window.all("button"):
        assert button.size["height"] >= 36
        assert button.size["width"] >= 44
    Select(window.find("#pick")).select_by_index(0)
    for _ in Select(window.find("#pick")).options:
        assert window.js("return document.documentElement.scrollWidth") <= 375
        window.js("document.getElementById('next').click()")
    window.clean()
    window.shot(f"phone_{name.partition('.')[0]}")


def test_several_runs(browser: Any, folder: Path) -> None:
    window = Window(browser, folder / "two.html")
    names = window.js("return [...document.querySelectorAll('#chart-kl .legendtext')].map(e => e.textContent)")
    assert names == ["first", "second"]
    window.shot("runs")
    window.choose("#filter-run", "second")
    options = [option.text for option in Select(window.find("#pick")).options]
    assert [option.partition(" · ")[0] for option in options] == ["second"] * 3
    assert "Frames shuffled, in pairs" in window.card
    assert frame_numbers(window.all(".frames")[1]) == ["3", "4", "1", "2"]
    window.click(window.find("#next"))
    assert "Completions from the text: 1 of 2 correct" in window.card
    window.click(window.find("#next"))
    assert "The run shuffled 6 frames, but the file gives 4 now" in window.card
    window.clean()


def test_by_keyboard_alone(one: Window) -> None:
    """The first stop leads past the head, and whatever has the focus shows it."""
    one.js("document.activeElement.blur()")
    one.find("body").send_keys(Keys.TAB)
    assert one.js("return document.activeElement.textContent") == "To the charts"
    seen = []
    for _ in range(40):
        ActionChains(one.browser).send_keys(Keys.TAB).perform()
        seen.append(one.js("return document.activeElement.id || document.activeElement.textContent"))
        if one.js("return document.activeElement === document.body"):
            break  # past the last
        assert one.js("return getComputedStyle(document.activeElement).outlineStyle") != "none", seen[-1]
    assert {"Rollouts", "filter-step", "pick", "next"} <= set(seen)
    headings = one.js("return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert headings[0] == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(headings))
    one.clean()
