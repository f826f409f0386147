"""Tables, lost shapes, the README's section and the comparison of two results, from rows made by hand."""

from __future__ import annotations

import pytest

from benchmarks import measure, plots, report
from benchmarks.__main__ import main
from fastlora.cache import write_json
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
    write_json(result, suite_payload(rows))
    for _ in range(2):  # a second time changes nothing
        report.write_readme(readme, [(result, report.load(result))])
        text = readme.read_text()
        assert text.startswith(f"head\n{report.BEGIN}\n\n###") and text.endswith(f"{report.END}\ntail\n")
        assert "old figures" not in text
        assert "**1.20**" in text and "optimised is 1.20× faster" in text and "2026.json" in text
    assert text.count(report.BEGIN) == 1


def test_variants_have_a_table_of_their_own(rows, row, suite_payload, tmp_path):
    variant = [r | {"base": "nf4", "dora": True} for r in rows_of(row, "two", eager=2.0, peft=3.0, fastlora=1.0)]
    text = report.tables(suite_payload([*rows, *variant]), tmp_path / "2026.json")
    _, apart = text.split(f"plain{report.VARIANTS}**")
    assert "| two |" in apart and "| won |" in text.split(report.VARIANTS)[0]
    assert "float32, nf4, DoRA | 1 | 2.00 | 2.00 |" in report.means([*rows, *variant])


def test_a_small_llamas_training_stands_below_the_newest_suite(rows, suite_payload, tmp_path):
    gain = {"median": 1.25, "p20": 1.2, "p80": 1.3}
    case = {"case": "QLoRA", "peft": {"median": 0.5}, "fastlora": {"median": 0.4}, "peft_over_fastlora": gain}
    case |= {"apart": 1e-4, "stock_from_float32": 2e-4, "fused_calls": 70, "fallback_calls": 0}
    sizes = {"hidden": 8, "layers": 1, "tokens": 4, "dtype": "bfloat16"}
    payload = {"kind": "llama-step", "metadata": suite_payload([])["metadata"], "arguments": sizes, "cases": [case]}
    readme, result = tmp_path / "README.md", tmp_path / "2026-01-01-000000.json"
    write_json(tmp_path / "2026-01-01-000001-llama-step.json", payload)
    write_json(result, suite_payload(rows))
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write_readme(readme, [(result, report.load(result))])
    assert "| QLoRA | 500 | 400 | **1.25** | 1.20–1.30 | 0.0001 | 0.0002 | 0 of 70 |" in readme.read_text()


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
        for stamp in ("2026-01-01-120000", "2026-02-01-120000"):
            write_json(tmp_path / device / f"{stamp}.json", suite_payload([]))
        write_json(tmp_path / device / "2026-03-01-120000-steps.json", {"kind": "steps"})
    (tmp_path / "empty").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in report.newest(tmp_path)] == [
        "a/2026-02-01-120000.json",
        "b/2026-02-01-120000.json",
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


def test_a_contender_that_the_model_does_not_know_is_shown_all_the_same(rows, suite_payload, tmp_path):
    for row in rows:
        for key in ("bytes_per_s", "model_bytes", "predicted", "predicted_over_bare", "predicted_launches"):
            row.pop(key, None)
    text = report.tables(suite_payload(rows), tmp_path / "x.json")
    assert "| **1.20** | torch | – |" in text and "| won | 1.00 | – |" in text
    pytest.importorskip("matplotlib")
    assert plots.draw(suite_payload(rows), tmp_path / "x.png")


@pytest.mark.parametrize(
    ("contender", "after", "spread", "status"),
    [
        ("fastlora", 1.20, 0.01, 0),  # the same
        ("fastlora", 1.00, 0.01, 0),  # faster
        ("fastlora", 1.40, 0.01, 1),  # slower past the noise
        ("fastlora", 1.40, 0.20, 0),  # slower within it
        ("fastlora", 1.22, 0.001, 0),  # past the noise, and too little to speak of
        ("split", 1.40, 0.01, 1),
        ("eager", 1.40, 0.01, 0),  # not ours
    ],
)
def test_only_what_is_ours_and_past_the_noise_is_a_regression(
    tmp_path, suite_payload, row, capsys, contender, after, spread, status
):
    rows = [row(contender=contender, over_bare=over, spread=spread) for over in (1.2, after)]
    files = [tmp_path / name for name in ("before.json", "after.json")]
    for file, one in zip(files, rows, strict=True):
        write_json(file, suite_payload([one, row("only here" if one is rows[0] else "only there")]))
    assert main(["compare", *map(str, files)]) == status
    printed = capsys.readouterr().out
    assert ("REGRESSION" in printed) == bool(status)
    assert f"1 rows compared, {status} slower past the noise" in printed


def test_a_slower_machine_is_no_regression(row):
    text, slower = report.compare([row(bare=1e-3)], [row(bare=2e-3)])
    assert not slower and "1200.0us   2400.0us  1.000" in text
    with pytest.raises(UserError, match="no row in common"):
        report.compare([row("a")], [row("b")])


def test_a_result_that_is_not_there_is_the_users_mistake(capsys):
    assert main(["compare", "missing.json", "missing.json"]) == 2
    error = capsys.readouterr().err
    assert "missing.json" in error and error.count("\n") == 1
