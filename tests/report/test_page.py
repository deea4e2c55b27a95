"""The report page: it shows the results of the runs, is self-contained, and a browser shows it without errors."""

import html.parser
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st

from relvit_d2.cli.report import check_page
from relvit_d2.evaluation.coco import coco_ground_truth, ground_truth_file
from relvit_d2.report.comparison import Point, write_comparison
from relvit_d2.report.curves import MAX_POINTS, Line, chart, thinned
from relvit_d2.report.detection_sections import detection_sections
from relvit_d2.report.detections import MIN_IOU, analyze_detections, match
from relvit_d2.report.page import _curves, write_report
from relvit_d2.report.results import class_rows, result_rows, seed_rows, summary
from relvit_d2.report.run_summary import end_run, summary_table
from relvit_d2.report.runs import Run, read_runs
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import printable
from tests.support.scripts import command, fails, run


@pytest.fixture(scope="module")
def runs(root: Path) -> Iterator[dict[str, Path]]:
    """A pre-training and two detectors of different seeds."""
    made = {"ssl": root / "ssl", "a": root / "a", "b": root / "b"}
    run(root, *command("pretrain_ssl.py", made["ssl"]))
    for seed, name in enumerate("ab"):
        run(root, *command("train_net.py", made[name], "SEED", seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        yield made


class Page(html.parser.HTMLParser):
    """What a page loads and shows."""

    VOID = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.pictures: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [values[key] or "" for key in ("src", "href") if key in values]
        if tag == "img":
            self.pictures.append(values.get("alt") or "")
        if tag == "svg" and values.get("class") == "chart":
            self.pictures.append(values.get("aria-label") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize("names", [pytest.param(("ssl",), marks=pytest.mark.slow), ("a",), ("a", "b", "ssl")])
def test_a_page_is_sound_and_holds_all_it_shows(runs: dict[str, Path], names: tuple[str, ...], tmp_path: Path) -> None:
    write_report([runs[name] for name in names], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("#", "data:image/")) for address in page.loads)
    assert "<script" not in text and "@import" not in text
    assert page.pictures and all(page.pictures)
    for name in names:
        results = json.loads((runs[name] / "inference/results.json").read_text())
        figures = next(iter(results.values()))
        value = figures["bbox"]["AP50"] if "bbox" in figures else figures["accuracy_relation"]
        assert f"{value:.4g}" in page.words
        info = json.loads((runs[name] / "run.json").read_text())
        assert info["versions"] in page.words and info["command"] in page.words
        assert info["next"] in page.words
        if "bbox" in figures:
            training = json.loads((runs[name] / "inference/training_images/results.json").read_text())
            assert f"{training['images']} training images bbox AP50" in page.words
            assert f"Box AP is {figures['bbox']['AP']:.1f}; with other images" in page.words
            assert "of these images are in the training set too" not in page.words
    if len(names) > 1:
        assert "The runs of an arm have the same config except for the seed" in page.words


def test_a_comparison_has_a_page_with_a_curve_for_each_metric(tmp_path: Path) -> None:
    curves: dict[str, dict[str, list[Point]]] = {
        "AP": {"scratch": [Point(10, 20, 3), Point(100, 40, None)], "a<b": [Point(10, 99, 5)]},
        "AP50": {"a<b": []},
    }
    table = ("AP <1>", ["labels", "arm"], [["10 %", "a<b"]])
    write_comparison("scratch & a<b", ["It is better."], curves, [table], ["a note"], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == [] and page.pictures == ["AP: scratch ends at 40; a<b ends at 99"]
    assert all(word in page.words for word in ("scratch & a<b", "It is better.", "AP <1>", "10 %", "a note"))


def test_every_script_leaves_its_page(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        assert "Set-up" in (folder / "report.html").read_text()


def test_the_command_compares_runs_and_refuses_what_is_not_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "both.html"
    run(tmp_path, "relvit-d2", "report", runs["a"], runs["b"], "--output", output)
    assert output.is_file()
    check_page(output)  # may be replaced
    output.write_text("<html>my notes</html>")
    sentence = fails(tmp_path, "relvit-d2", "report", runs["a"], "--output", output)
    assert "both.html' exists and is not a report of relvit-d2: choose another --output" in sentence
    assert output.read_text() == "<html>my notes</html>"
    with pytest.raises(UserError, match=r"no config\.yaml"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="given twice"):
        read_runs([runs["a"], runs["a"]])
    broken = tmp_path / "broken"
    shutil.copytree(runs["a"], broken)
    for line in (b'{"iteration": 1, "lo', b'{"iteration": "1"}', b"[1]", b"\xff"):
        (broken / "metrics.json").write_bytes((runs["a"] / "metrics.json").read_bytes() + line)
        with pytest.raises(UserError, match=r"broken' are damaged \(line \d+ of metrics.json\)"):
            read_runs([broken])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page with")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_the_page_in_full_width_without_errors(
    runs: dict[str, Path], width: int, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report(list(runs.values()), path)
    probe = path.with_name("probe.html")
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    probe.write_text(path.read_text().replace("</body>", measure + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *flags, f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found and int(found[1]) <= int(found[2])  # nothing but tables scrolls sideways


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=1000))
def test_thinning_keeps_the_mean_of_whole_runs(values: list[float]) -> None:
    kept = thinned(np.array(values))
    assert len(kept) <= MAX_POINTS
    length = -(-len(values) // MAX_POINTS)
    oracle = [float(np.mean(values[i : i + length])) for i in range(0, len(values), length)]
    np.testing.assert_allclose(kept, oracle, rtol=1e-9, atol=1e-6)


def points(svg: ElementTree.Element, color: int) -> list[tuple[float, float]]:
    """Points of the lines of a colour in a chart."""
    paths = [e.attrib["d"] for e in svg.iter("path") if f"stroke: var(--c{color})" in e.attrib["style"]]
    return [(float(x), float(y)) for path in paths for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_a_chart_is_sound_xml_of_any_names_and_needs_no_other_element_of_the_page() -> None:
    names = '<b> & "x"', "$x_$ 猫"
    lines = [Line(name, np.arange(5.0), np.array([1.0, 3.0, 2.0, 5.0, 4.0]) + i, i) for i, name in enumerate(names)]
    drawn = chart("a < b", lines)
    svg = ElementTree.fromstring(re.sub(r"xlink:", "", str(drawn.svg)))
    assert all(f"{name} ends at {value}" in svg.attrib["aria-label"] for name, value in zip(names, (4, 5), strict=True))
    assert not re.search(r' id="|url\(|href|<style|font-family', drawn.svg)
    colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawn.svg))
    assert colors == {"none", "var(--c0)", "var(--c1)", "var(--soft)", "var(--rule)"}
    assert len({x for x, _ in points(svg, 0)}) == 5


@pytest.mark.parametrize(("percent", "labels"), [(True, "0% 10% 20% 30% 40% 50%"), (False, "0 0.1 0.2 0.3 0.4 0.5")])
def test_points_of_a_chart_lie_at_their_values(percent: bool, labels: str) -> None:
    y = np.array([0.1, 0.3, 0.2, 0.45, 0.0])
    svg = ElementTree.fromstring(chart("t", [Line("l", np.arange(5.0), y, 0)], percent=percent).svg)
    assert " ".join(e.text or "" for e in svg.iter("text") if "text-anchor: end" in e.attrib["style"]) == labels
    heights = np.array([height for _, height in points(svg, 0)])
    assert np.corrcoef(heights, y)[0, 1] == pytest.approx(-1, abs=1e-6)


def evaluated(folder: Path, name: str, detections: str = "[]") -> None:
    """Leave detections and the truth of one image with one object, of class a of a and b, in a folder of inference."""
    folder.mkdir(parents=True, exist_ok=True)
    one = {"bbox": [1, 1, 5, 5], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": "x.png", "image_id": name, "height": 8, "width": 8, "annotations": [one]}
    truth = coco_ground_truth([record], ["a", "b"], ignore_difficult=True)
    ground_truth_file(folder, name).write_text(json.dumps(truth))
    (folder / "coco_instances_results.json").write_text(detections)


def run_of(folder: Path, results: dict[str, Any], **config: Any) -> Run:
    return Run(folder, folder.name, config, {}, [], results)


def test_detections_are_compared_with_the_truth_of_the_set_that_was_evaluated(tmp_path: Path) -> None:
    detection = {"image_id": "b[:2]", "category_id": 0, "bbox": [1, 1, 4, 4], "score": 0.9}
    evaluated(tmp_path / "inference", "a")
    evaluated(tmp_path / "inference", "b[:2]", json.dumps([detection]))
    found = analyze_detections(tmp_path / "inference", "b[:2]")
    assert found and found.images[0].f1 == 1 and found.precision[0].tolist() == [1] * 101
    detector = {"TASK": "detection", "DATASETS.TEST": ["a"]}
    one = run_of(tmp_path, {"b[:2]": {"bbox": {"AP": 1.0}}}, **detector)
    assert [section.dataset for section in detection_sections([one])] == ["b[:2]"]
    for name in "cd":
        evaluated(tmp_path / "inference" / name, name)
    several = run_of(tmp_path, {"c": {}, "d": {}}, **detector)
    assert [section.dataset for section in detection_sections([several])] == ["c", "d"]


def test_test_images_in_the_training_set_are_listed(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs["a"], tmp_path / "a")
    (copy / "inference/shared_images.json").write_text(json.dumps({"svhn_test": ["one.png", "two <2>.png"]}))
    write_report([copy], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "2 of these images are in the training set too" in page.words and "two <2>.png" in page.words


def test_a_metric_on_held_out_images_is_in_the_chart_of_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "ssl"
    folder.mkdir()
    (folder / "config.yaml").write_text("TASK: pretrain\n")
    rows = [
        {"iteration": i, "accuracy_a": 0.5 + i / 100, "chance_a": 0.25}
        | ({"held_out/accuracy_a": 0.3, "held_out/chance_a": 0.25} if i % 5 == 4 else {})
        for i in range(10)
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main, rest = _curves(read_runs([folder]))
    assert [drawn.title for drawn in main + rest] == ["accuracy a"]
    svg = ElementTree.fromstring(main[0].svg)
    assert svg.attrib["aria-label"].startswith("accuracy a: training (ssl) ends at 59.0%; held out (ssl) ends at 30.0%")
    assert {"training (ssl)", "held out (ssl)", "chance (ssl)"} <= {e.text for e in svg.iter("text")}


def test_a_class_without_objects_has_no_precision_even_without_detections(tmp_path: Path) -> None:
    evaluated(tmp_path, "set")
    found = analyze_detections(tmp_path, "set")
    assert found and found.precision[0].tolist() == [0] * 101 and np.isnan(found.precision[1]).all()


@pytest.mark.parametrize("damaged", ["[{", '[{"bbox": [1, 1, 4, 4]}]', '{"bbox": 1}'])
def test_damaged_detections_are_one_sentence(damaged: str, tmp_path: Path) -> None:
    evaluated(tmp_path, "set", damaged)
    if damaged.startswith("{"):
        ground_truth_file(tmp_path, "set").write_text("[]")
    with pytest.raises(UserError, match=r"coco_instances_results\.json' or .* is damaged .* --eval-only"):
        analyze_detections(tmp_path, "set")


def test_the_summary_of_results(tmp_path: Path) -> None:
    errors = {"held_out": {"error_distance": 0.25, "chance_distance": 0.5, "feature_std": 1.0}}
    classifier = {"cifar10_test": {"test": {"top1": 90.1, "loss": 0.3}, "images": 9}, "validation": {"top1": 88.0}}
    expected: dict[str, dict[str, Any]] = {
        "distance error 0.250 (chance 0.500) on held out": errors,
        "relation accuracy 30.0% (chance 20.0%) on held out": {
            "held_out": {"accuracy_relation": 0.3, "chance_relation": 0.2}
        },
        "bbox AP: no objects on svhn_test": {"svhn_test": {"bbox": {"AP": None, "AP50": None}}},
        "bbox AP 12.3 on svhn_test": {"svhn_test": {"bbox": {"AP": 12.34}}},
        "test top1 90.1 % on cifar10_test\ntop1 88.0 % on validation": classifier,
        "no metrics": {"svhn_test": {}},
        "no evaluation: DATASETS.TEST is empty": {},
    }
    for words, results in expected.items():
        one = run_of(tmp_path, results, **{"SOLVER.IMS_PER_BATCH": 1})
        assert "\n".join(summary(one)) == ("" if words.startswith("no ") else words)
        table = summary_table(one, "go on")
        assert all(line in table for line in words.splitlines()) and "go on" in table


def test_rows_of_results(tmp_path: Path) -> None:
    def detector(seed: int, ap: float, cat: float | None) -> Run:
        figures = {"AP": ap, "AP50": None, "AP-cat": cat}
        held_out = {"accuracy_relation": 0.25, "chance_relation": 0.2 + seed / 10}
        return run_of(tmp_path / str(seed), {"voc": {"bbox": figures}, "held_out": held_out}, SEED=seed)

    runs = [detector(0, 12.0, 3.5), detector(1, 14.0, None)]
    assert result_rows(runs) == [
        ["voc bbox AP", ("12.00", ""), ("14.00", "+2")],
        ["voc bbox AP50", ("-", ""), ("-", "")],
        ["accuracy relation", ("0.25", ""), ("0.25", "+0")],
        ["chance relation", ("0.2", ""), ("0.3", "")],
    ]
    assert seed_rows(runs) == [
        ["0", "voc bbox AP", "13.00", f"{2**0.5:.4g}", "2 (0, 1)"],
        ["0", "accuracy relation", "0.25", "0", "2 (0, 1)"],
    ]
    assert class_rows(runs) == [("AP on voc, bbox", [["cat", 3.5, None]])]


def test_an_error_of_the_report_is_logged_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("it\nbroke")

    monkeypatch.setattr("relvit_d2.report.run_summary.write_report", fail)
    monkeypatch.setattr(logging.getLogger("relvit_d2"), "propagate", True)
    (tmp_path / "config.yaml").write_text("SOLVER: {IMS_PER_BATCH: 2}")
    with caplog.at_level("INFO"):
        end_run(tmp_path, "go on")
    assert "the report could not be written: RuntimeError: it broke" in caplog.text
    assert "no evaluation" in caplog.text and "go on" in caplog.text
    caplog.clear()
    (tmp_path / "config.yaml").unlink()
    with caplog.at_level("INFO"):
        end_run(tmp_path, "go on")
    assert "has no config.yaml" in caplog.text and "next: go on" in caplog.text


def test_matching_is_the_plain_greedy_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        boxes, truth = (np.sort(rng.uniform(0, 10, (n, 2, 2)), 1).reshape(-1, 4) for n in rng.integers(0, 6, 2))
        free = set(range(len(truth)))
        expected = []
        for box in boxes:
            ious = {t: overlap(box, truth[t]) for t in free}
            best = max(ious, key=lambda t: ious[t], default=-1)
            best = best if best >= 0 and ious[best] >= MIN_IOU else -1
            free.discard(best)
            expected.append(best)
        assert match(boxes, truth).tolist() == expected


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    inner = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


@pytest.mark.slow
def test_a_model_of_any_script_is_analysed(root: Path) -> None:
    cases = {
        "demo/streets.yaml": ("encoder", "pyramid", "proposals", "heads"),
        "demo/ssl_streets.yaml": ("views",),
        "cls/cifar10_vit_s4.yaml MODEL.RELVIT.JOINT True": ("augmentation", "encoder", "head", "pretext"),
    }
    small = ("MODEL.ENCODER.NAME", "vit_nano")
    for config, stages in cases.items():
        done = run(root, "relvit-d2", "analyze", "--config-file", *f"configs/{config}".split(), *small)
        rows = {row.split()[0]: row.split()[-4:] for row in done.stdout.splitlines() if len(row.split()) >= 5}
        assert all(stage in rows for stage in stages)
        parameters = {name: float(row[0]) for name, row in rows.items() if re.fullmatch(r"[\d.]+", row[0])}
        total = parameters.pop("all")
        assert abs(sum(parameters.values()) - total) < 0.03


def test_text_from_others_is_no_markup(runs: dict[str, Path], tmp_path: Path) -> None:
    attack = "<script>alert('1')&\"<img src=x>\x1b[2J\x07"
    folder = tmp_path / attack
    shutil.copytree(runs["a"], folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["MODEL"]["WEIGHTS"] = config["MODEL"]["ENCODER"]["NAME"] = attack
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(dict.fromkeys(info, attack)))
    results = json.loads((folder / "inference/results.json").read_text())
    for metrics in results.values():
        metrics["bbox"] |= {f"AP-{attack}": 12.5}
    (folder / "inference/results.json").write_text(json.dumps(results | {attack: next(iter(results.values()))}))
    rows = [json.loads(line) | {f"loss_{attack}": 1.0} for line in (folder / "metrics.json").read_text().splitlines()]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folders in ([folder], [folder, runs["b"]]):
        write_report(folders, tmp_path / "report.html")
        text = (tmp_path / "report.html").read_text()
        page = Page(text)
        assert page.open == [] and "<script" not in text and "<img src=x" not in text
        assert page.words.count(printable(attack)) > 5
        assert all(c.isprintable() or c == "\n" for c in text)
        assert all(address.startswith(("#", "data:image/")) for address in page.loads)
