"""The HTML page: what it shows, in a browser, and that it needs nothing from outside."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

from flipguard_onnx import guard, scan
from flipguard_onnx.reports.html import guard_html, scan_html
from flipguard_onnx.reports.scan import (
    Alignment,
    Budget,
    Scan,
    ScannedTensor,
    Skipped,
    SkipReason,
    Verdict,
)
from flipguard_onnx.reports.svg import SHADES, bars, heat_map, skipped_section
from flipguard_onnx.reports.words import percent
from tests.helpers.attacked import FOLDER
from tests.helpers.command import call, one_line
from tests.helpers.samples import matmul, save, weights

MADE_UP = ("int8 channel", "int8 tensor", "int4", "nf4", "fp4")
EVIL = "</script><img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


def alignment(grid, weights, peak=0.0):
    histogram = np.full(20, (1 - peak) / 20)
    histogram[0] += peak
    shares = tuple(histogram.tolist())
    even = (0.05,) * 20
    budget = Budget(9.0, 0.0, 2.0, 100.0)
    return Alignment(
        grid,
        weights,
        weights,
        shares,
        even,
        peak,
        peak,
        peak,
        0.025,
        peak,
        0.1,
        1.2,
        0,
        0,
        0,
        budget,
    )


def a_scan(count, attacked=()):
    """A made-up result: tensor number i has i + 100 weights, those of `attacked` peaks at int4."""
    aligned = Verdict("aligned", "many weights stand on boundaries of int4", ("int4",), 0.3)
    clean = Verdict("clean", "the weights are spread evenly")
    tensors = tuple(
        ScannedTensor(
            f"{EVIL}.layer.{i}",
            "MatMul",
            (i + 100, 1),
            i + 100,
            aligned if i in attacked else clean,
            tuple(alignment(g, i + 100, 0.3 * (i in attacked and g == "int4")) for g in MADE_UP),
        )
        for i in range(count)
    )
    skipped = (
        Skipped("bias", (8,), SkipReason.ONE_AXIS),
        Skipped(f"{EVIL}.pos", (1, 8, 8), SkipReason.NO_OPERATOR, "Add"),
    )
    pooled = tuple(alignment(g, 9999, 0.3 * bool(attacked and g == "int4")) for g in MADE_UP)
    verdict = aligned if attacked else clean
    return Scan("0", f"{EVIL}.onnx", "ab" * 32, {}, 10**6, verdict, pooled, tensors, skipped, 1.0)


def test_one_file_that_names_no_address():
    html = scan_html(a_scan(3))
    assert not re.search(r"(?:https?:)?//\w", html.replace("</script>", ""))
    assert not re.search(r"<link|@import|url\(|\ssrc=(?!x )", html)


def test_names_are_data():
    html = scan_html(a_scan(3))
    assert "<img" not in html
    shown = (
        "the title",
        "the heading",
        *3 * ["a layer, in a picture", "in the table"],
        "a skipped tensor",
    )
    assert html.count("&lt;/script&gt;&lt;img src=x") == len(shown)


def test_names_are_shown_in_the_order_in_which_they_are_written(tmp_path):
    turned = "w\u202ecba\x1b[1m"
    proto = matmul((64, 64))
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = turned
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights((2, 2, 2)), turned + "2"))
    proto.graph.node.append(onnx.helper.make_node("Add\u202e", ["y", turned + "2"], ["z"]))
    source = save(proto, tmp_path)
    options = {"output": tmp_path / "out.onnx", "validate": False, "preserve": "off"}
    for html in (scan_html(scan(source)), guard_html(guard(source, **options))):
        assert all(line.isprintable() for line in html.split("\n"))
        assert "w\\u202ecba\\x1b[1m" in html


def test_300_tensors_stay_below_500_kb():
    assert len(scan_html(a_scan(300, attacked=range(0, 300, 7))).encode()) < 500_000


def test_the_verdict_and_the_histograms_are_there():
    html = scan_html(a_scan(3, attacked=[1]))
    assert '<div class="verdict bad"><b>aligned, int4</b> many weights stand on boundaries' in html
    assert "on int4</h2>" in html  # the heat map is of the grid that stands out
    embedded = re.search(r'id="histograms">(.*?)</script>', html)[1]
    histograms = json.loads(embedded)
    assert [grid for grid, _ in histograms[1]] == list(MADE_UP)
    assert histograms[1][2][1] == [3350, *[350] * 19]
    assert histograms[0][2][1] == [500] * 20


def test_heat_map_shades_cells_by_their_share():
    svg = heat_map([("a", [0.75, 0.25, 0.0, 0.0])])
    runs = re.findall(r'<path class="h(\d)" d="M([\d.]+) 0h([\d.]+)', svg)
    quarter = (800 - 260) / 4
    assert {(int(s), float(x), float(w)) for s, x, w in runs} == {
        (sum(edge <= 3.0 for edge in SHADES), 260, quarter),
        (sum(edge <= 1.0 for edge in SHADES), 260 + quarter, quarter),
        (0, 260 + 2 * quarter, 2 * quarter),
    }


def test_bars_show_their_names_and_values():
    svg = bars([(EVIL, 0.5, 1e-6), ("b", 0.25, 0.125)], ("before", "after"), percent)
    assert "<img" not in svg
    assert re.findall(r"h([\d.e-]+)v", svg) == ["480", "240", "0.00096", "120"]
    texts = [t for t in re.findall(r">([^<>]*)</text>", svg) if "%" in t]
    assert texts == ["&lt;0.01%", "12.50%", "50.00%"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """The page of a guard, as the command line writes it."""
    folder = tmp_path_factory.mktemp("guarded")
    source = FOLDER / "mlp-standard-int4.onnx"
    options = ("--scheme", "int4", "--seed", 1, "-o", folder / "out.onnx")
    result = call(source, *options, "--html", folder / "p")
    assert result.exit_code == 0, result.output
    return (folder / "p").read_text(), result.stdout


def test_the_page_of_a_guard(guarded):
    html, text = guarded
    assert html.startswith("<!doctype html>")
    assert '<div class="verdict good"><b>guarded</b> 84,480 weights in 3 tensors at int4' in html
    assert '<div class="verdict bad"><b>input aligned, int4</b> in 3 of 3 tensors' in html
    drift = re.search(r"the outputs drift from the original's by ([\d.]+)", text)[1]
    assert f"drift from the original&#39;s by {float(drift):.4f} (relative L2)" in html
    embedded = json.loads(re.search(r'id="histograms">(.*?)</script>', html)[1])
    assert [grid for grid, _ in embedded[0]] == list(MADE_UP)
    flipped = re.search(r"Gemm +int4 +3 +84,480 +([\d.]+%)", text)[1]
    assert f"{flipped} of them moved across a boundary" in html


def test_the_drift_table_has_the_runs_of_an_output_one_below_the_other(tmp_path):
    report = guard(FOLDER / "mlp-clean.onnx", emit="both", output=tmp_path / "o.onnx", seed=1)
    validation = report.validation
    runs = ("plain_default", "guarded_default", "moved")
    two = {run: tuple(replace(getattr(validation, run)[0], output=o) for o in "pq") for run in runs}
    html = guard_html(replace(report, validation=replace(validation, **two)))
    table = html[html.index("Drift of the outputs") :]
    rows = re.findall(r"<tr><td>([pq])</td><td class=\"number\">([a-z ]+)</td>", table)
    assert rows == [(o, run) for o in "pq" for run in ("nearest", "guarded", "moved float")]


def test_html_is_for_one_model(tmp_path):
    models = [FOLDER / f"mlp-{name}.onnx" for name in ("clean", "standard-int4")]
    message = one_line(call("guard", *models, "--html", tmp_path / "p"))
    assert message == ("flipguard-onnx: --html is for one model; --report has all of them\n")


def test_a_scan_from_the_command_line(tmp_path):
    command = ("scan", FOLDER / "mlp-clean.onnx", "--format", "html")
    result = call(*command, "--report", tmp_path / "p.html")
    assert result.exit_code == 0
    assert '<div class="verdict good"><b>clean</b>' in (tmp_path / "p.html").read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("chromium and chromedriver are not installed (apt: chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1200,1000",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


def shown(browser, column=0):
    """The texts of one column of the layers that are visible."""
    cells = browser.find_elements("css selector", f"#layers tr > td:nth-child({column + 1})")
    return [cell.text for cell in cells if cell.is_displayed()]


def opened(browser, file):
    """Load the page; afterwards `requests` has all that it asked for."""
    browser.get("about:blank")
    for log in ("performance", "browser"):  # the browser's own first page is not ours
        browser.get_log(log)
    browser.get(file.as_uri())


def requests(browser):
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def test_in_a_browser(browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(scan_html(a_scan(30, attacked=[4])))
    opened(browser, file)
    weights = [f"{i + 100}" for i in range(30)]
    assert shown(browser, 3) == weights
    heading = browser.find_element("css selector", "#layers th:nth-child(4)")
    button = heading.find_element("css selector", "button")
    button.click()
    assert shown(browser, 3) == weights[::-1]
    assert heading.get_attribute("aria-sort") == "descending"
    button.click()
    assert shown(browser, 3) == weights

    browser.find_element("css selector", "button[data-layer='4']").click()
    details = browser.find_elements("css selector", "tr.details figure")
    assert [figure.text for figure in details] == list(MADE_UP)
    assert len(details[2].find_elements("css selector", "rect.bar")) == 20
    browser.find_element("css selector", "button[data-layer='4']").click()
    assert not browser.find_elements("css selector", "tr.details")

    browser.find_element("id", "filter").send_keys("LAYER.2")
    assert len(shown(browser)) == 11  # 2 and 20 to 29

    assert requests(browser) == [file.as_uri()]
    assert browser.get_log("browser") == []


def test_the_table_of_a_guard_fits_on_a_small_laptop(browser, tmp_path):
    """With the longest of what usually stands in its columns, at 1300 pixels."""
    report = guard(FOLDER / "cnn-clean.onnx", output=tmp_path / "out.onnx", seed=1, validate=False)
    alarming = replace(report.scan.tensors[0].verdict, level="suspicious", strength=0.1234)
    tensor = replace(
        report.tensors[0],
        name="/encoder/layers.11/self_attention/out_proj/weight_fused_with_batch_norm",
        op="ConvTranspose",
        shape=(1024, 1024, 3, 3),
        weights=123_456_789,
        flips=55_555_555,
        furthest=12,
        gain=0.123,
    )
    scanned = replace(report.scan.tensors[0], name=tensor.name, verdict=alarming)
    file = tmp_path / "page.html"
    wide = replace(report, tensors=(tensor,), scan=replace(report.scan, tensors=(scanned,)))
    file.write_text(guard_html(wide))
    before = browser.get_window_size()
    browser.set_window_size(1300, 1000)
    opened(browser, file)
    heads = browser.find_elements("css selector", "#layers th button")
    heads[-1].click()  # the mark of the sorting takes room
    table = browser.find_element("id", "layers")
    widths = browser.execute_script(
        "const t = arguments[0]; return [t.scrollWidth, t.parentNode.clientWidth]", table
    )
    browser.set_window_size(before["width"], before["height"])
    assert widths[0] <= widths[1]


def test_the_page_of_a_guard_in_a_browser(browser, guarded, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(guarded[0])
    opened(browser, file)
    assert shown(browser, 1) == ["Gemm"] * 3
    browser.find_element("css selector", "button[data-layer='1']").click()
    assert len(browser.find_elements("css selector", "tr.details figure")) == len(MADE_UP)
    assert len(browser.find_elements("css selector", "section > figure > svg")) == 3
    assert requests(browser) == [file.as_uri()]
    assert browser.get_log("browser") == []


def test_nothing_is_said_of_the_size_of_what_is_computed():
    made = [Skipped("v", (), SkipReason.NOT_CONSTANT, "Gemm"), Skipped("b", (8,), SkipReason.BIAS)]
    rows = skipped_section(made).rows
    assert ("not constant (weight of Gemm)", "1", "") in rows
    assert ("— v", "", "") in rows
    assert ("bias of ", "1", "8") in rows
