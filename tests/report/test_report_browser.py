"""The page in headless Chromium: no error on its console, and what is to be clicked, hovered and typed works."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_rows import HOSTILE, WELLS, make_embeddings
from synthetic_plate import draw_field, write_plate

from cellvim.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
selenium = pytest.importorskip("selenium", reason="the page is looked at with selenium: pip install 'cellvim[test]'")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="no Chromium and ChromeDriver here (apt-get install chromium chromium-driver): pages are not looked at",
)
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--force-device-scale-factor=1",
    ),
)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    plate = write_plate(
        folder / "plate.zarr", {well: [draw_field(i, 6)] for i, well in enumerate(WELLS)}, ["DNA", "GFP"]
    )
    write_report(make_embeddings(plate), folder / "report.html")
    shutil.rmtree(plate)  # the page needs nothing but itself
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page_path):
    """The page, freshly loaded at 1200 x 900 and ready; its console has to be silent in the end."""
    return load(browser, page_path)


def load(browser, path: Path, *, width: int = 1200, dark: bool = False):
    from selenium.webdriver.support.ui import WebDriverWait

    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(path.as_uri())
    WebDriverWait(browser, 120).until(lambda d: d.execute_script("return document.documentElement.dataset.ready"))
    return browser


@pytest.fixture(autouse=True)
def silent_console(browser):
    browser.get_log("browser")
    yield
    messages = [entry["message"] for entry in browser.get_log("browser")]
    assert not messages


def canvas_pixels(browser, selector: str) -> np.ndarray:
    from PIL import Image

    script = "return document.querySelector(arguments[0]).toDataURL('image/png')"
    data = browser.execute_script(script, selector).split(",")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def center(browser, selector: str):
    element = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    return element


def move(browser, element, x: int = 0, y: int = 0, *, click: bool = False) -> None:
    from selenium.webdriver import ActionChains

    chain = ActionChains(browser).move_to_element_with_offset(element, x, y)
    (chain.click() if click else chain).perform()


def point_at_a_cell(browser, *, click: bool = False, which: int = 0):
    """Move the pointer to the cell of a crop, as the page itself places it; return that crop's name."""
    canvas = center(browser, "#cells")
    x, y, name = browser.execute_script(
        "const point = cells.cropped[arguments[0]]; const box = cells.canvas.getBoundingClientRect();"
        "const [x, y] = place(point, box.width, box.height);"
        "return [x - box.width / 2, y - box.height / 2, DATA.crops.names[cells.cropOf.get(point)]]",
        which,
    )
    move(browser, canvas, round(x), round(y), click=click)
    return name


def test_the_page_is_drawn(opened):
    from PIL import Image

    picture = np.asarray(Image.open(io.BytesIO(opened.get_screenshot_as_png())).convert("RGB"))
    assert picture.shape[1] >= 1180 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 200
    assert (picture.std(axis=(0, 1)) > 5).all()
    assert len(opened.find_elements("css selector", "#platemaps svg .well")) >= 4 * len(WELLS)
    assert (canvas_pixels(opened, "#cells")[..., 3] > 0).mean() > 0.001


@pytest.mark.parametrize(("width", "dark"), [(1200, True), (420, False)])
def test_any_width_and_theme(browser, page_path, width, dark):
    load(browser, page_path, width=width, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways"
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.strip("rgb()").split(","))) < 150) == dark
    assert (canvas_pixels(browser, "#cells")[..., 3] > 0).any()


def test_the_theme_can_be_chosen(opened):
    paper = "return getComputedStyle(document.body).backgroundColor"
    seen = [opened.execute_script(paper)]
    for _ in range(2):
        opened.find_element("id", "theme").click()
        seen.append(opened.execute_script(paper))
    assert seen[0] == seen[1] != seen[2]  # system (light), light, dark


def test_hovering_a_cell_shows_its_crop(opened):
    point_at_a_cell(opened)
    tip = opened.find_element("id", "tip")
    assert tip.is_displayed()
    crop = canvas_pixels(opened, "#tip canvas")
    assert crop.shape == (32, 32, 4) and crop[..., :3].std() > 5
    well = next(iter(WELLS))
    assert f"Well {well}" in tip.text and "ObjectNumber 1" in tip.text
    move(opened, center(opened, "h1"))
    assert not tip.is_displayed()


def test_the_crop_is_that_cell_in_the_plate(browser, page_path):
    """Green is GFP and blue DNA; a nucleus is where the drawn field has one."""
    adata = make_embeddings()
    load(browser, page_path)
    image = draw_field(0, 6).astype(float)  # of A01
    x, y = adata.obsm["spatial"][0] / 0.5
    top, left = int(np.floor(y + 0.5)) - 16, int(np.floor(x + 0.5)) - 16
    padded = np.pad(image, ((0, 0), (32, 32), (32, 32)))[:, top + 32 : top + 64, left + 32 : left + 64]
    name = point_at_a_cell(browser, which=0)
    assert name == "plate A01 site 0 object 1"
    crop = canvas_pixels(browser, "#tip canvas")[..., :3].astype(float)
    expected = ((padded - 150) / 1150).clip(0, 1) ** 0.7
    assert np.corrcoef(crop[..., 2].ravel(), expected[0].ravel())[0, 1] > 0.95  # blue: DNA
    assert np.corrcoef(crop[..., 1].ravel(), (expected[1] + expected[0] * 0x60 / 255).clip(0, 1).ravel())[0, 1] > 0.95


def test_a_channel_can_be_switched_off(opened):
    point_at_a_cell(opened, click=True)
    before = canvas_pixels(opened, "#kept canvas")
    center(opened, "#map .channels input[data-channel='0']").click()
    after = canvas_pixels(opened, "#kept canvas")
    assert before[..., 2].max() > after[..., 2].max() == 0  # DNA was all that was blue
    boxes = opened.find_elements("css selector", "input[data-channel='0']")
    assert len(boxes) == 2 and not any(box.is_selected() for box in boxes)


def test_clicked_cells_are_kept_and_can_be_removed(opened):
    names = [point_at_a_cell(opened, click=True, which=i) for i in (0, 7, 0)]
    kept = opened.find_elements("css selector", "#kept figure")
    assert len(kept) == 2 and names[0] == names[2] != names[1]
    center(opened, "#kept button").click()
    assert len(opened.find_elements("css selector", "#kept figure")) == 1


def test_another_column_colours_the_map(opened):
    from selenium.webdriver.support.ui import Select

    choice = Select(opened.find_element("id", "color-by"))
    pictures = []
    for name in ("compound", "dose", "Metadata_Well"):
        choice.select_by_visible_text(name)
        pictures.append(canvas_pixels(opened, "#cells"))
        assert opened.find_element("css selector", "#legend h3").text == name
    assert all((a != b).any() for a, b in ((pictures[0], pictures[1]), (pictures[1], pictures[2])))
    choice.select_by_visible_text("compound")
    before = canvas_pixels(opened, "#cells")
    center(opened, "#legend button").click()  # only this category in colour
    assert (canvas_pixels(opened, "#cells") != before).any()
    assert opened.find_element("css selector", "#legend button").get_attribute("aria-pressed") == "true"


def test_the_map_zooms(opened):
    before = canvas_pixels(opened, "#cells")
    center(opened, "#zoom-in").click()
    assert (canvas_pixels(opened, "#cells") != before).any()
    opened.find_element("id", "zoom-reset").click()
    assert (canvas_pixels(opened, "#cells") == before).all()


def test_the_map_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    canvas = center(opened, "#cells")
    canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ENTER)
    assert len(opened.find_elements("css selector", "#kept figure")) == 1
    assert "Kept plate" in opened.find_element("id", "live").get_attribute("textContent")
    canvas.send_keys(Keys.ESCAPE)
    assert not opened.find_element("id", "tip").is_displayed()


def test_a_well_is_highlighted_everywhere(opened):
    before = canvas_pixels(opened, "#cells")
    well = center(opened, "#platemaps .well[data-well='C01']")
    move(opened, well, click=True)
    assert "Well C01 is highlighted" in opened.find_element("id", "chosen-well").text
    panels = len(opened.find_elements("css selector", "#platemaps svg"))
    assert len(opened.find_elements("css selector", ".well.selected[data-well='C01']")) == panels > 3
    assert (canvas_pixels(opened, "#cells") != before).any()
    tip = opened.find_element("id", "tip")
    assert tip.is_displayed() and "C01" in tip.text and HOSTILE[0] in tip.text
    opened.find_element("css selector", "#chosen-well button").click()
    assert (canvas_pixels(opened, "#cells") == before).all()


def test_tables_are_sorted_and_searched(opened):
    def column(i: int) -> list[str]:
        rows = opened.find_elements("css selector", "#dose-table tbody tr")
        return [row.find_elements("css selector", "td")[i].text for row in rows if row.is_displayed()]

    heading = center(opened, "#dose-table th:nth-child(2) button")
    heading.click()
    assert opened.find_element("css selector", "#dose-table th:nth-child(2)").get_attribute("aria-sort") == "descending"
    down = column(1)
    heading.click()
    assert down == sorted(down, key=float, reverse=True) and column(1) == sorted(down, key=float)
    assert len(set(down)) > 1


def test_nearest_perturbations_have_crops(opened):
    from selenium.webdriver.support.ui import Select

    choice = Select(center(opened, "#perturbation"))
    assert {option.text for option in choice.options} >= {"DMSO", HOSTILE[0], HOSTILE[1]}
    choice.select_by_visible_text(HOSTILE[0])
    rows = opened.find_elements("css selector", ".neighbour")
    assert len(rows) == 4 and rows[0].find_element("css selector", ".name").text == HOSTILE[0]
    assert "cosine similarity" in rows[1].text
    crop = canvas_pixels(opened, ".neighbour canvas")
    assert crop[..., :3].std() > 3


def test_no_name_has_run(opened):
    from selenium.webdriver.support.ui import Select

    choice = Select(opened.find_element("id", "color-by"))
    for option in [o.text for o in choice.options]:
        choice.select_by_visible_text(option)
    point_at_a_cell(opened)
    assert opened.execute_script("return window.pwned === undefined && document.images.length === 0")
    assert len(opened.find_elements("css selector", "script")) == 2


@pytest.mark.slow
def test_a_hundred_thousand_cells_are_shaded(browser, tmp_path):
    """Nothing but the map of many: each pixel has the mean colour of its cells, and hovering still finds one."""
    import anndata

    n = 100_000
    rng = np.random.default_rng(0)
    obs = {"Metadata_Plate": ["p"] * n, "Metadata_Well": [f"A{1 + i % 12:02d}" for i in range(n)]}
    adata = anndata.AnnData(np.zeros((n, 2), np.float32), obs, obsm={"X_umap": rng.normal(size=(n, 2))})
    summary = write_report(adata, tmp_path / "many.html")
    assert summary.n_shown == n and summary.n_bytes < 8e6
    load(browser, tmp_path / "many.html")
    assert "each pixel shows the mean colour" in browser.find_element("id", "map").text
    pixels = canvas_pixels(browser, "#cells")
    assert (pixels[..., 3] > 0).mean() > 0.05
    move(browser, center(browser, "#cells"))
    assert "Well A" in browser.find_element("id", "tip").text
