"""Tables, lost shapes and the README's section, from rows made by hand."""

from __future__ import annotations

import pytest

from benchmarks import measure, plots, report
from fastlora.errors import UserError


def rows_of(row, case, **times):
    rows = [row(case, "bare", 1.0)]
    for name, over in times.items():
        extra = {"over_eager": dict.fromkeys(("median", "p20", "p80"), over / times["eager"])}
        rows.append(row(case, name.replace("_", "-"), over, **extra))
    return rows


@pytest.fixture
def rows(row):
    return [
        *rows_of(row, "won", eager=1.5, peft=1.8, optimised=1.3, fastlora=1.2),
        *rows_of(row, "lost", eager=1.4, peft=1.5, optimised=1.1, fastlora=1.32),
        row("broken", "bare", 1.0),
        {"case": "broken", "direction": "forward+backward", "mode": "plain", "contender": "fastlora", "skipped": "no"},
    ]


def test_the_table_shows_every_contender_over_the_floor(rows, row, suite_payload):
    text = report.table(report.grouped(rows, "forward+backward", "plain"))
    lines = text.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "won", "1000", "1.50", "1.80", "1.30", "**1.20**", "torch", "1.10", "1.19–1.21", "1.25",
    ]  # fmt: skip
    assert "broken" not in text


def test_lost_shapes_are_named_with_the_winner(rows):
    assert [(one["case"], best) for one, best, _ in report.losses(rows)] == [("lost", "optimised")]
    assert "lost, forward+backward, plain: optimised is 1.20× faster" in report.lost(rows)
    won = [one for one in rows if one["case"] == "won"]
    assert report.lost(won).startswith("No measured shape")


def test_means_are_geometric(rows):
    mean = (1.5 / 1.2 * 1.4 / 1.32) ** 0.5
    assert f"| {mean:.2f} | {1.4 / 1.32:.2f} |" in report.means(rows)


def test_the_readmes_section_is_replaced_and_the_rest_is_kept(rows, suite_payload, tmp_path):
    readme, result = tmp_path / "README.md", tmp_path / "2026.json"
    readme.write_text(f"head\n{report.BEGIN}\nold figures\n{report.END}\ntail\n")
    measure.write_json(result, suite_payload(rows))
    for _ in range(2):  # a second time changes nothing
        report.write_readme(readme, [(result, report.load(result))])
        text = readme.read_text()
        assert text.startswith(f"head\n{report.BEGIN}\n\n###") and text.endswith(f"{report.END}\ntail\n")
        assert "old figures" not in text
        assert "**1.20**" in text and "optimised is 1.20× faster" in text and "2026.json" in text
    assert text.count(report.BEGIN) == 1


def test_a_readme_without_markers_is_the_users_mistake(tmp_path):
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(UserError, match="<!-- benchmarks -->"):
        report.write_readme(tmp_path / "README.md", [])


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "tune"}'])
def test_a_file_that_is_no_result_is_the_users_mistake(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json"):
        report.load(tmp_path / "x.json")


def test_the_newest_file_of_each_device_is_found(tmp_path, suite_payload):
    for device in ("a", "b"):
        for stamp in ("2026-01-01", "2026-02-01"):
            measure.write_json(tmp_path / device / f"{stamp}.json", suite_payload([]))
        measure.write_json(tmp_path / device / "2026-03-01-tune.json", {"kind": "tune"})
    assert [path.relative_to(tmp_path).as_posix() for path in report.newest(tmp_path)] == [
        "a/2026-02-01.json",
        "b/2026-02-01.json",
    ]


def test_a_busy_machine_is_said_to_be_busy(suite_payload):
    payload = suite_payload([])
    assert "BUSY" not in report.provenance(payload, measure.ROOT / "x.json")
    payload["metadata"]["load_before"] = 3.0
    assert "BUSY" in report.provenance(payload, measure.ROOT / "x.json")


def test_the_figure_is_drawn(rows, suite_payload, tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.draw(suite_payload(rows), tmp_path / "x.png") == tmp_path / "x.png"
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert plots.draw(suite_payload([]), tmp_path / "none.png") is None


def test_the_short_table_ends_a_run(rows):
    text = report.short(rows)
    assert "won" in text and "1.20" in text and max(map(len, text.splitlines())) < 100
