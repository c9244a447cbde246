"""The report in a real browser: words, overlays, sliders, keyboard, and texts that try to be markup."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from catpo.core.intervals import auroc
from catpo.core.types import SIDES
from catpo.data.pair_folder import write_pairs
from catpo.files.json_files import read_rows
from catpo.reporting.build import report
from catpo.rewards.fusion import Fusion
from catpo.rewards.quality import FINAL, read_scores
from catpo.rewards.store import RewardStore
from catpo.text.words import merge, words
from hostile_cases import TEXTS
from report_fixtures import HOSTILE, make_evaluation, make_pairs, make_run, make_store

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
MARKUP = [
    *TEXTS.values(),
    HOSTILE,
    "<script>window.hacked=10</script>",
    "</textarea></title></style><script>window.hacked=11</script>",
    "--><script>window.hacked=12</script><!--",
    "]]><script>window.hacked=13</script>",
    "<svg onload=window.hacked=14>",
    "<iframe srcdoc='<script>parent.hacked=15</script>'></iframe>",
    "<a href='javascript:window.hacked=16'>dog</a>",
    '"onmouseover="window.hacked=17" \'',
    "<body onload=window.hacked=18><details open ontoggle=window.hacked=19>",
    "\\u003cscript\\u003ewindow.hacked=20\\u003c/script\\u003e &lt;script&gt;window.hacked=21&lt;/script&gt;",
    "{{constructor.constructor('window.hacked=22')()}} {% raw %} {{ 7*7 }} <%= 7*7 %> #{7*7} ${7*7}",
    "`${window.hacked=23}` '-window.hacked=24-' \";window.hacked=25;//",
    "<img src=x onerror=window.hacked=26>" + "dog " * 500,
]
"""Texts of people who try; each would set `window.hacked` if it were run."""
HOSTILE_NAME = "<img src=x onerror=window.hacked=3> {{7*7}}"
OTHER_FUSIONS = [
    {"alpha": 0.0},
    {"alpha": 1.0, "base_weight": 1.3},
    {"scope": "pair"},
    {"normalise": "none", "temperature": 0.4},
    {"normalise": "zscore", "activation": "sigmoid"},
    {"normalise": "mean_calibrated", "shared_prefix": "neutral"},
    {"eos": "scored", "shared_prefix": "neutral", "scope": "pair"},
    {"eos": "zero", "token_fraction": 0.3},
    {"token_fraction": 0.5, "select": "bottom", "unselected": "base"},
    {"token_fraction": 0.0, "unselected": 0.0},
    {"gamma": 0.2, "delta": 0.3},
    {"signals": {"patch_logit": 1.0, "image_contrast": -0.5}},
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program, helper = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not helper:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(helper))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    pairs = make_pairs(folder / "pairs", 3, hostile=True)
    make_store(folder / "rewards", pairs)
    make_run(folder / "runs" / HOSTILE_NAME, objective=HOSTILE)
    for name, wrong in (("base", 0.2), (HOSTILE_NAME, 0.15)):
        make_evaluation(folder / "evaluations" / name, wrong=wrong, seed=len(name))
    report(
        output=folder,
        rewards=folder / "rewards",
        pairs=folder / "pairs",
        runs=[folder / "runs" / HOSTILE_NAME],
        evaluations=[folder / "evaluations" / name for name in ("base", HOSTILE_NAME)],
        title=HOSTILE_NAME,
    )
    return folder


@pytest.fixture(scope="module")
def store(folder):
    return RewardStore.open(folder / "rewards")


@pytest.fixture
def page(browser, folder):
    """The report, freshly opened; fails afterwards if the browser's console has said anything."""
    browser.get_log("browser")
    browser.get((folder / "report.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def find(page, selector):
    return page.find_elements("css selector", selector)


def set_control(page, name, value):
    """As a person does: the control changes, then says so."""
    page.execute_script(
        "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
        "c.dispatchEvent(new Event('input', {bubbles: true}));",
        name,
        str(value),
    )


def wait_for(page, is_true):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 20).until(lambda _: is_true())


def data_of(page, selector, *names):
    """Values of data attributes, per element that is not hidden."""
    script = """
        const shown = [...document.querySelectorAll(arguments[0])].filter(element => !element.hidden);
        return shown.map(element => arguments[1].map(name => element.dataset[name]));
    """
    return page.execute_script(script, selector, names)


def word_values(page, side):
    """Number of each word -> the value that colours it."""
    return {int(word): float(value) for word, value in data_of(page, f"#{side} .word", "word", "value")}


def expected_values(store, pair_id, side, fusion, how="mean", part="weight"):
    row, weights = store.get(pair_id, side), store.weights(pair_id, fusion)
    merged = words(row.pieces, row.is_special)
    values = getattr(weights, side if part == "weight" else f"{side}_relevance")
    pairs = zip(merged, merge(values, merged, how), strict=True)
    return {number: value for number, (word, value) in enumerate(pairs) if word.text or word.is_special}


def overlay(page):
    """Which word it belongs to, its size, its pixels."""
    return page.execute_script(
        "const c = document.querySelector('canvas.overlay'); return [c.dataset.word, c.width, c.height, c.toDataURL()]"
    )


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "base_weight"), [(0.5, 0.5), (0.0, 0.5), (1.0, 0.5), (0.23, 1.35), (0.87, 0.0)])
def test_sliders_give_the_weights_of_fusion(page, store, alpha, base_weight):
    set_control(page, "alpha", alpha)
    set_control(page, "base_weight", base_weight)
    fusion = Fusion(alpha=alpha, base_weight=base_weight)
    for side in SIDES:
        expected = expected_values(store, store.pair_ids[0], side, fusion)
        assert word_values(page, side) == pytest.approx(expected, abs=2e-6)
    assert find(page, "#alpha-value")[0].text == f"{alpha:.2f}"


def test_every_fusion_gives_the_weights_of_fusion(page, store):
    for options in OTHER_FUSIONS:
        fusion = Fusion(**options)
        given = {**{name: getattr(fusion, name) for name in vars(fusion)}, "signals": fusion.signals and dict(fusion.signals)}
        for number, pair_id in enumerate(store.pair_ids):
            fused = page.execute_script("return fuse(data.pairs[arguments[0]], arguments[1])", number, given)
            weights = store.weights(pair_id, fusion)
            for side in SIDES:
                np.testing.assert_allclose(fused[side]["weights"], getattr(weights, side), atol=3e-6, err_msg=str(options))
                np.testing.assert_allclose(fused[side]["T"], getattr(weights, f"{side}_relevance"), atol=3e-6)
            assert fused["net"] == pytest.approx(weights.net_shared_coefficient, abs=3e-6)


def test_a_fusion_by_quantiles_gives_the_weights_of_fusion(browser, folder, store):
    fusion = Fusion(normalise="quantile", alpha=0.3)
    browser.get(report(output=folder / "quantile.html", rewards=folder / "rewards", fusion=fusion).as_uri())
    for side in SIDES:
        assert word_values(browser, side) == pytest.approx(expected_values(store, store.pair_ids[0], side, fusion), abs=2e-6)


def test_choices_change_the_weights_and_reset_brings_them_back(page, store):
    before = word_values(page, "chosen")
    set_control(page, "normalise", "zscore")
    set_control(page, "shared_prefix", "neutral")
    fusion = Fusion(normalise="zscore", shared_prefix="neutral")
    assert word_values(page, "chosen") == pytest.approx(expected_values(store, store.pair_ids[0], "chosen", fusion), abs=3e-6)
    assert find(page, "#pair-net")[0].text == "0.000"
    page.execute_script("document.getElementById('reset').click()")
    assert word_values(page, "chosen") == before


def test_words_can_show_t_a_signal_and_the_largest_token(page, store):
    set_control(page, "merge", "max")
    set_control(page, "signal", "T")
    expected = expected_values(store, store.pair_ids[0], "rejected", Fusion(), "max", "T")
    assert word_values(page, "rejected") == pytest.approx(expected, abs=2e-6)
    set_control(page, "signal", "semantic")
    row = store.get(store.pair_ids[0], "rejected")
    expected = merge(row.signals["semantic"], words(row.pieces, row.is_special), "max")
    for word, value in word_values(page, "rejected").items():
        assert value == pytest.approx(expected[word], abs=2e-6)


def test_figures_over_all_pairs_follow_the_sliders(page, store):
    set_control(page, "alpha", 0.1)
    fusion = Fusion(alpha=0.1)
    tokens = read_scores(store, fusion)
    is_labelled = tokens.labels >= 0
    expected = auroc(tokens.scores[FINAL][is_labelled], tokens.labels[is_labelled])
    wait_for(page, lambda: find(page, "#all-auroc")[0].text == f"{expected:.3f}")
    net = tokens.net_shared.mean()
    assert float(find(page, "#all-net")[0].text.replace("−", "-")) == pytest.approx(net, abs=6e-4)


# ---- overlays --------------------------------------------------------------------------------------------------------


def test_pointing_at_a_word_shows_where_it_looks(page, store):
    from selenium.webdriver.common.action_chains import ActionChains

    seen = []
    for word in find(page, "#rejected .word")[:3]:
        ActionChains(page).move_to_element(word).perform()
        seen.append(overlay(page))
        assert word.text in find(page, "#readout .word-title")[0].text
    names, widths, heights, pixels = zip(*seen, strict=True)
    assert names == ("rejected 0", "rejected 1", "rejected 2")
    assert set(widths) == set(heights) == {6} and len(set(pixels)) == 3


def test_the_brightest_patch_is_that_of_the_stored_map(page, store):
    first = find(page, "#chosen .word")[1]
    page.execute_script("arguments[0].focus()", first)
    span = page.execute_script("return data.pairs[0].sides.chosen.words[1]")
    attention = store.maps(store.pair_ids[0], "chosen")[span[0] : span[1]].astype(float).mean(0)
    row, column = divmod(int(attention.argmax()), 6)
    assert f"row {row + 1}, column {column + 1} of 6 × 6" in find(page, "#peak")[0].text
    pixels = page.execute_script(
        "return [...document.querySelector('canvas.overlay').getContext('2d').getImageData(0, 0, 6, 6).data]"
    )
    assert int(np.argmax(pixels[3::4])) == int(attention.argmax())  # opacity


def test_the_keyboard_moves_from_word_to_word(page):
    from selenium.webdriver.common.keys import Keys

    first = find(page, "#chosen .word")[0]
    page.execute_script("arguments[0].focus()", first)
    before = overlay(page)
    for key, token in ((Keys.ARROW_RIGHT, "chosen 1"), (Keys.ARROW_RIGHT, "chosen 2"), (Keys.ARROW_LEFT, "chosen 1")):
        page.switch_to.active_element.send_keys(key)
        assert overlay(page)[0] == token
    assert overlay(page)[3] != before[3]
    assert len(find(page, "#chosen .word[tabindex='0']")) == 1
    page.switch_to.active_element.send_keys(Keys.END)
    assert [page.execute_script("return state.word.dataset.word")] == data_of(page, "#chosen .word", "word")[-1]


def test_values_of_a_word_are_those_of_the_store(page, store):
    row = store.get(store.pair_ids[0], "rejected")
    weights = store.weights(store.pair_ids[0])
    merged = words(row.pieces, row.is_special)
    number = next(number for number, word in enumerate(merged) if word.end - word.first == 2)
    page.execute_script("arguments[0].focus()", find(page, f"#rejected .word[data-word='{number}']")[0])
    cells = data_of(page, "#readout td", "name", "exact")
    tokens = slice(merged[number].first, merged[number].end)
    columns = {**row.signals, "weight": weights.rejected, "T": weights.rejected_relevance, "log p": row.logps}
    for name, values in columns.items():
        assert [float(exact) for cell, exact in cells if cell == name] == pytest.approx(values[tokens].tolist(), abs=2e-6)


# ---- the list --------------------------------------------------------------------------------------------------------


def test_pairs_are_found_stepped_through_and_sorted(page, store):
    assert len(find(page, "#pair-list li")) == 3
    set_control(page, "search", store.pair_ids[2])
    assert data_of(page, "#pair-list li", "index") == [["2"]] and find(page, "#pair-count")[0].text == "1 of 3"
    set_control(page, "search", "")
    page.execute_script("document.getElementById('next').click()")
    assert find(page, "#pair-name")[0].text == f"Pair {store.pair_ids[1]}"
    set_control(page, "sort", "net")
    order = [store.pair_ids[int(index)] for (index,) in data_of(page, "#pair-list li", "index")]
    nets = [store.weights(pair_id).net_shared_coefficient for pair_id in order]
    assert nets == sorted(nets)


def test_changed_answers_are_filtered(page):
    def count(way):
        return len(data_of(page, f".changed-item{way}"))

    everything, fixed = count(""), count("[data-way=fixed]")
    assert 0 < fixed < everything
    set_control(page, "changed-way", "fixed")
    assert count("") == fixed
    set_control(page, "changed-category", "scenes/captions")
    assert count("") == fixed  # these evaluations changed in captions only
    set_control(page, "changed-search", "no such words")
    assert count("") == 0
    sizes = page.execute_script("return [...document.querySelectorAll('img[data-image]')].map(i => i.naturalWidth)")
    assert sizes and all(sizes)


# ---- safety and looks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_of_markup(tmp_path_factory):
    """A report in which every text that anybody can give tries to be markup; a pair per text."""
    folder = tmp_path_factory.mktemp("markup")
    unlabelled = dict.fromkeys(SIDES, ())
    pairs = [
        replace(pair, prompt=text, chosen=f"{text} Yes.", rejected=f"{text} No.", labels=unlabelled, meta={"note": text})
        for pair, text in zip(make_pairs(folder / "drawn", len(MARKUP)), MARKUP, strict=True)
    ]
    write_pairs(folder / "pairs", pairs, {"method": MARKUP[0], "data": MARKUP[1], "model": MARKUP[2]})
    make_store(folder / "rewards", pairs, labels=False)
    make_run(folder / "run", objective=MARKUP[3])
    for number, name in enumerate(("base", "other")):
        make_evaluation(folder / name, wrong=0.2, seed=number)
        rows = read_rows(folder / name / "answers.jsonl")
        changed = [{**row, "answer": f"{row['answer']} {MARKUP[number % len(MARKUP)]}"} for number, row in enumerate(rows)]
        (folder / name / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    evaluations = [folder / name for name in ("base", "other")]
    report(output=folder, rewards=folder / "rewards", pairs=folder / "pairs", runs=[folder / "run"], evaluations=evaluations,
           title=MARKUP[4])  # fmt: skip
    return folder


def test_no_text_of_any_pair_answer_or_file_is_run(browser, full_of_markup):
    browser.get_log("browser")
    browser.get((full_of_markup / "report.html").as_uri())
    seen = {part: set() for part in ("prompt", "chosen")}
    for _ in MARKUP:
        for part, texts in seen.items():
            texts.add(_visible(browser.execute_script(f"return document.getElementById('{part}').textContent")))
        browser.execute_script("document.getElementById('next').click()")
    assert {_visible(text) for text in MARKUP} <= seen["prompt"]
    assert {_visible(f"{text} Yes.") for text in MARKUP} <= seen["chosen"]
    assert _visible(find(browser, "h1")[0].text) == _visible(MARKUP[4])
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.execute_script("return window.hacked") is None
    active = """
        const all = [...document.querySelectorAll('main *')];
        const acts = each => /^(script|iframe|object|embed|form|base)$/i.test(each.localName)
            || [...each.attributes].some(a => /^on/i.test(a.name) || /^ *javascript:/i.test(a.value));
        return all.filter(acts).map(each => each.outerHTML);
    """
    assert browser.execute_script(active) == []
    loaded = "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
    assert browser.execute_script(loaded) == 0
    assert "49" not in browser.title
    assert browser.get_log("browser") == []


def _visible(text):
    return "".join(sign for sign in text if sign.isprintable() and sign not in " ⏎")


def test_a_script_put_into_the_page_does_not_run(browser, folder):
    """The content policy, not only the escaping, keeps foreign scripts out."""
    browser.get((folder / "report.html").as_uri())
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 4'; document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=5\">');"
    )
    wait_for(browser, lambda: any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser")))
    assert browser.execute_script("return window.hacked") is None


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_can_be_read_in_both_schemes(page, width, scheme):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    colours = page.execute_script("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    assert contrast(*colours) > 7
    drawing = page.execute_script("const t = document.querySelector('svg.plot text'); return getComputedStyle(t).fill")
    assert drawing == colours[0]
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(*colours):
    """Contrast ratio of WCAG 2."""

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(", ")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return math.fsum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)
