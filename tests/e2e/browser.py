"""A headless Chromium for tests of pages: opens one, reads what it logged and asked for, sets its window."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "no chromium and chromedriver in PATH" if CHROMIUM is None or DRIVER is None else ""
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Browser:
    """One window. ``downloads``: the folder that files come to."""

    driver: webdriver.Chrome
    downloads: Path

    def open(self, url: str) -> None:
        """A fresh load; what was logged before is forgotten."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(url)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """As a person sees it."""
        return self.one(selector).text

    def until(self, condition: Callable[[], Result], seconds: float = 10) -> Result:
        return WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(lambda _: condition())

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def hold(self, held: str, key: str) -> None:
        """A key while another is held."""
        webdriver.ActionChains(self.driver).key_down(held).send_keys(key).key_up(held).perform()

    def box(self, selector: str) -> dict[str, float]:
        """Edges of an element in the window, in CSS pixels: left, right, top, bottom."""
        return self.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)

    def tab_to(self, selector: str, most: int = 40) -> None:
        """Tab from where the focus is to an element, as a person without a mouse goes there."""
        wanted = self.one(selector)
        for _ in range(most):
            if self.driver.switch_to.active_element == wanted:
                return
            self.press(Keys.TAB)
        raise AssertionError(f"{selector} is not reached by {most} tabs")

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def record(self, selector: str) -> None:
        """Begin to keep what elements show, joined by |, each time that anything in the page changes."""
        self.run(
            "window.recorded = []; new MutationObserver(() => window.recorded.push("
            "[...document.querySelectorAll(arguments[0])].map((one) => one.textContent).join('|')"
            ")).observe(document.body, {subtree: true, childList: true, characterData: true});",
            selector,
        )

    def recorded(self) -> list[str]:
        """What ``record`` kept, each once."""
        return list(dict.fromkeys(self.run("return window.recorded")))

    def window(self, width: int, height: int, *, scale: float = 1, dark: bool = False) -> None:
        """Size of the page in CSS pixels, picture pixels for each, and the scheme that the person prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def errors(self) -> list[str]:
        """Warnings and errors of the console since the page was opened, each once told."""
        return [row["message"] for row in self.driver.get_log("browser") if row["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """URLs asked for over the network since the page was opened, each once told."""
        rows = [json.loads(row["message"])["message"] for row in self.driver.get_log("performance")]
        sent = [row["params"]["request"]["url"] for row in rows if row["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("blob:")]


@contextlib.contextmanager
def chromium(downloads: Path) -> Iterator[Browser]:
    """A browser while the block runs. Call it where MISSING is empty."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield Browser(driver, downloads)
    finally:
        driver.quit()
