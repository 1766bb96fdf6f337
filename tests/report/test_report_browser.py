"""The page in headless Chromium: no message on its console, and clicking, hovering, selecting and typing work."""

from __future__ import annotations

import base64
import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from report_rows import HOSTILE, WELLS, make_embeddings
from synthetic_plate import draw_field, write_plate

from cellvim.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
selenium = pytest.importorskip("selenium", reason="browser tests need selenium: pip install 'cellvim[test]'")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="no Chromium and ChromeDriver here (apt-get install chromium chromium-driver)",
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
    shutil.rmtree(plate)  # the page is self-contained
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
    """The page, freshly loaded at 1200 x 900 and ready; its console has to stay silent."""
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


def picture(browser, selector: str = "#map-figure") -> np.ndarray:
    """Return an element as it is displayed, (H, W, 3)."""
    from PIL import Image

    point(browser, 3, 3)  # hides the tip
    time.sleep(0.3)  # Bokeh paints in the next frame
    png = center(browser, selector).screenshot_as_png
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def color_pixels(image: np.ndarray) -> int:
    """Return the number of pixels that are not grey."""
    return int((np.ptp(image.astype(int), axis=2) > 40).sum())


def point(browser, x: float, y: float, *, click: bool = False, path: list[tuple[float, float]] | None = None) -> None:
    """Move the pointer within the window; click there, or drag along a path."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(browser, duration=40)
    actions.pointer_action.move_to_location(round(x), round(y))
    if click or path:
        actions.pointer_action.pointer_down()
        for to in path or []:
            actions.pointer_action.move_to_location(round(to[0]), round(to[1]))
        actions.pointer_action.pointer_up()
    actions.perform()


PLACES = """
const [figure, xs, ys] = arguments, view = views[figure], box = view.canvas_view.el.getBoundingClientRect();
return xs.map((x, i) => [box.left + view.frame.x_scale.compute(x), box.top + view.frame.y_scale.compute(ys[i])]);
"""


def places(browser, figure: str, x, y) -> np.ndarray:
    """Return where points of a figure are displayed, (n, 2) in the window."""
    center(browser, f"#{figure}")
    return np.array(browser.execute_script(PLACES, figure, list(map(float, x)), list(map(float, y))))


def cell_places(browser) -> np.ndarray:
    """Return where the cells are displayed on the map, in the order of the rows of the AnnData."""
    x, y = browser.execute_script("return [[...cells.arrays.x], [...cells.arrays.y]]")
    return places(browser, "map-figure", x, y)


def point_at_a_cell(browser, *, click: bool = False, which: int = 0) -> str:
    """Move the pointer to the cell of a crop; return the crop's name."""
    row, name = browser.execute_script(
        "const [row, crop] = [...cells.cropOf][arguments[0]]; return [row, DATA.crops.names[crop]]", which
    )
    point(browser, *cell_places(browser)[row], click=click)
    return name


def point_at_a_well(browser, well: str, *, click: bool = False, figure: str = "plate-map-0") -> None:
    row, column = ord(well[0]) - ord("A") + 1, int(well[1:])
    point(browser, *places(browser, figure, [column], [row])[0], click=click)


def lasso(browser, around: np.ndarray) -> None:
    """Draw a lasso around points, (n, 2) in the window."""
    (left, top), (right, bottom) = around.min(0) - 8, around.max(0) + 8
    corners = [(right, top), (right, bottom), (left, bottom), (left, top + 3)]
    point(browser, left, top, path=corners)


def selected(browser) -> set[int]:
    """Return the selected rows."""
    return set(browser.execute_script("return cells.source.selected.indices.map((place) => cells.order[place])"))


def test_the_page_is_drawn(opened):
    from PIL import Image

    page = np.asarray(Image.open(io.BytesIO(opened.get_screenshot_as_png())).convert("RGB"))
    assert page.shape[1] >= 1180 and len(np.unique(page.reshape(-1, 3), axis=0)) > 200
    assert color_pixels(picture(opened)) > 36 * 30  # dots of the cells
    for figure in ("plate-map-0", "controls-figure", "dose-0", "dose-1"):
        assert color_pixels(picture(opened, f"#{figure}")) > 20, figure


@pytest.mark.parametrize(("width", "dark"), [(1200, True), (420, False)])
def test_any_width_and_theme(browser, page_path, width, dark):
    load(browser, page_path, width=width, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways"
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.strip("rgb()").split(","))) < 150) == dark
    image = picture(browser)
    assert color_pixels(image) > 500 and (image[2, image.shape[1] // 2].sum() < 150) == dark


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
    point(opened, 5, 5)
    assert not tip.is_displayed()


def test_the_crop_matches_the_plate(browser, page_path):
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


def test_clicked_crops_are_kept_and_can_be_removed(opened):
    names = [point_at_a_cell(opened, click=True, which=i) for i in (0, 7, 0)]
    kept = opened.find_elements("css selector", "#kept figure")
    assert len(kept) == 2 and names[0] == names[2] != names[1]
    center(opened, "#kept button").click()
    assert len(opened.find_elements("css selector", "#kept figure")) == 1


def test_another_column_colours_the_map(opened):
    from selenium.webdriver.support.ui import Select

    choice = Select(opened.find_element("id", "color-by"))
    images = []
    for name in ("compound", "dose", "Metadata_Well"):
        choice.select_by_visible_text(name)
        images.append(picture(opened))
        assert opened.find_element("css selector", "#legend h3").text == name
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()


def test_a_category_can_be_selected(opened):
    from selenium.webdriver.support.ui import Select

    Select(opened.find_element("id", "color-by")).select_by_visible_text("compound")
    before = color_pixels(picture(opened))
    buttons = opened.find_elements("css selector", "#legend button")
    button = next(button for button in buttons if button.text.startswith("DMSO"))
    button.click()
    assert selected(opened) == set(np.flatnonzero(make_embeddings().obs["compound"] == "DMSO"))
    assert color_pixels(picture(opened)) < before
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert not selected(opened) and button.get_attribute("aria-pressed") == "false"
    assert color_pixels(picture(opened)) == before


def test_the_map_zooms_and_resets(opened):
    before = cell_places(opened)
    canvas = center(opened, "#map-figure")
    canvas.send_keys("+")
    assert np.ptp(cell_places(opened), axis=0) == pytest.approx(1.5 * np.ptp(before, axis=0), rel=0.01)
    canvas.send_keys("0")
    np.testing.assert_allclose(cell_places(opened), before, atol=1)


def test_the_map_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    canvas = center(opened, "#map-figure")
    canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ENTER)
    assert len(opened.find_elements("css selector", "#kept figure")) == 1
    assert "Kept plate" in opened.find_element("id", "live").get_attribute("textContent")
    canvas.send_keys(Keys.ESCAPE)
    assert not opened.find_element("id", "tip").is_displayed()


def test_a_well_is_selected_everywhere(opened):
    point_at_a_well(opened, "C01", click=True)
    tip = opened.find_element("id", "tip")
    assert tip.is_displayed() and "C01" in tip.text and HOSTILE[0] in tip.text
    well = make_embeddings().obs["Metadata_Well"].astype(str)
    assert selected(opened) == set(np.flatnonzero(well == "C01"))
    assert "C01" in opened.find_element("id", "chosen-well").text
    center(opened, "#clear").click()
    assert not selected(opened) and not opened.find_element("id", "chosen-well").text


def test_a_plate_map_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    figure = center(opened, "#plate-map-1")
    figure.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP)
    tip = opened.find_element("id", "tip").text
    assert tip.startswith("Well ") and "Activity" in tip
    figure.send_keys(Keys.ENTER)
    well = tip.splitlines()[0].removeprefix("Well ")
    assert len(selected(opened)) == 3 and well in opened.find_element("id", "chosen-well").text


@pytest.mark.parametrize("tool", ["lasso", "well"])
def test_selected_cells_are_exported_as_csv(browser, page_path, tmp_path, tool):
    import pandas as pd

    load(browser, page_path)
    adata = make_embeddings()
    where = cell_places(browser)
    if tool == "lasso":
        lasso(browser, where[[3, 9]])
        inside = ((where > where[[3, 9]].min(0) - 8) & (where < where[[3, 9]].max(0) + 8)).all(1)
        expected = set(np.flatnonzero(inside))
        assert {3, 9} <= expected and len(expected) < len(where)
    else:
        point_at_a_well(browser, "A12", click=True)
        expected = set(np.flatnonzero(adata.obs["Metadata_Well"] == "A12"))
    assert selected(browser) == expected
    assert f"{len(expected)} of {adata.n_obs} selected" in browser.find_element("id", "selection").text
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    center(browser, "#download").click()
    deadline = time.monotonic() + 20
    while not (tmp_path / "selected_cells.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    table = pd.read_csv(tmp_path / "selected_cells.csv", index_col="obs_name", dtype={"Metadata_Well": str})
    rows = adata[sorted(expected)]
    assert list(table.index) == list(rows.obs_names)
    for name in ("Metadata_Plate", "Metadata_Well", "Metadata_Site", "Metadata_ObjectNumber"):
        assert list(table[name]) == list(rows.obs[name])
    np.testing.assert_allclose(table[["field_x_um", "field_y_um"]], rows.obsm["spatial"], rtol=1e-6)
    shown = np.array(browser.execute_script("return [[...cells.arrays.x], [...cells.arrays.y]]")).T[sorted(expected)]
    np.testing.assert_allclose(table[["PCA1", "PCA2"]], shown, rtol=1e-5)


def test_names_are_quoted_in_the_csv(browser, tmp_path):
    import csv

    adata = make_embeddings()[:5].copy()
    names = ['a,b"c', "new\nline", "</script><img src=x>", "=1+1", "ü"]
    adata.obs_names = names
    write_report(adata, tmp_path / "names.html")
    load(browser, tmp_path / "names.html")
    browser.execute_script("selectCells(() => true)")
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    center(browser, "#download").click()
    deadline = time.monotonic() + 20
    while not (tmp_path / "selected_cells.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with open(tmp_path / "selected_cells.csv", newline="", encoding="utf-8") as file:
        assert [row["obs_name"] for row in csv.DictReader(file)] == names


def test_several_plates_can_be_shown(browser, tmp_path):
    import anndata
    from selenium.webdriver.support.ui import Select

    first, second = make_embeddings(), make_embeddings(seed=1)
    second = second[second.obs["Metadata_Well"].isin(["A01", "A12", "C01", "C02"])].copy()
    second.obs["Metadata_Plate"] = "other"
    second.obs["qc_focus"] = np.nan
    both = anndata.concat([first, second], index_unique="-")
    write_report(both, tmp_path / "two.html")
    load(browser, tmp_path / "two.html")
    Select(center(browser, "#plate")).select_by_visible_text("other")
    point_at_a_well(browser, "C02", click=True)
    chosen = (both.obs["Metadata_Plate"] == "other") & (both.obs["Metadata_Well"] == "C02")
    assert selected(browser) == set(np.flatnonzero(chosen))
    assert "Not known for this plate" in browser.find_element("id", "platemaps").text


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
    rows = opened.find_elements("css selector", ".neighbor")
    assert len(rows) == 4 and rows[0].find_element("css selector", ".name").text == HOSTILE[0]
    assert "cosine similarity" in rows[1].text
    crop = canvas_pixels(opened, ".neighbor canvas")
    assert crop[..., :3].std() > 3


def test_names_are_never_executed(opened):
    from selenium.webdriver.support.ui import Select

    choice = Select(opened.find_element("id", "color-by"))
    for option in [o.text for o in choice.options]:
        choice.select_by_visible_text(option)
    point_at_a_cell(opened)
    assert opened.execute_script("return window.pwned === undefined && document.images.length === 0")
    assert len(opened.find_elements("css selector", "script")) == 4  # with BokehJS, decompressed


@pytest.mark.slow
def test_a_hundred_thousand_cells(browser, tmp_path):
    """The page is of a bounded size, finds the cell under the pointer and selects by lasso."""
    import anndata

    n = 100_000
    rng = np.random.default_rng(0)
    obs = {"Metadata_Plate": ["p"] * n, "Metadata_Well": [f"A{1 + i % 12:02d}" for i in range(n)]}
    adata = anndata.AnnData(np.zeros((n, 2), np.float32), obs, obsm={"X_umap": rng.normal(size=(n, 2))})
    summary = write_report(adata, tmp_path / "many.html")
    assert summary.n_shown == n and summary.n_bytes < 8e6
    load(browser, tmp_path / "many.html")
    assert color_pixels(picture(browser)) > 20_000
    where = cell_places(browser)
    point(browser, *where.mean(0))
    assert "Well A" in browser.find_element("id", "tip").text
    middle = np.add(where.mean(0), [[-60, -60], [60, 60]])
    lasso(browser, middle)
    inside = ((where > middle[0] - 8) & (where < middle[1] + 8)).all(1)
    assert len(selected(browser)) == pytest.approx(inside.sum(), rel=0.02)
