"""The verdict over two results: only what is past the noise, and ours, is a regression."""

from __future__ import annotations

import pytest

from benchmarks import compare, measure
from benchmarks.__main__ import main


def files(tmp_path, suite_payload, before, after):
    paths = tmp_path / "before.json", tmp_path / "after.json"
    for path, rows in zip(paths, (before, after), strict=True):
        measure.write_json(path, suite_payload(rows))
    return [str(path) for path in paths]


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
def test_exit_status(tmp_path, suite_payload, row, capsys, contender, after, spread, status):
    before = [row(contender=contender, over_bare=1.2, spread=spread)]
    later = [row(contender=contender, over_bare=after, spread=spread)]
    assert main(["compare", *files(tmp_path, suite_payload, before, later)]) == status
    printed = capsys.readouterr().out
    assert ("REGRESSION" in printed) == bool(status)
    assert f"1 rows compared, {status} slower past the noise" in printed


def test_a_slower_machine_is_no_regression(row):
    (change,) = compare.changes([row(bare=1e-3)], [row(bare=2e-3)])
    assert change.ratio == 1.0 and change.after == 2 * change.before and not change.regression


def test_rows_that_only_one_side_has_are_left_out(tmp_path, suite_payload, row, capsys):
    paths = files(tmp_path, suite_payload, [row("a"), row("b")], [row("b"), row("c")])
    assert main(["compare", *paths]) == 0
    assert "1 rows compared" in capsys.readouterr().out
    assert main(["compare", *paths, "--cases", "c*"]) == 2
    assert "no row in common" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("no-such-commit", "HEAD"), ("missing.json", "HEAD")])
def test_what_is_neither_file_nor_commit_is_the_users_mistake(arguments, capsys):
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert arguments[0] in error and error.count("\n") == 1


def test_samples_of_several_turns_are_pooled():
    turn = [
        {"contender": "bare", "mode": "plain", "seconds": [1.0, 1.0]},
        {"contender": "fastlora", "mode": "plain", "seconds": [2.0, 4.0]},
        {"contender": "split", "mode": "plain", "skipped": "not here"},
    ]
    rows = {row["contender"]: row for row in compare._pool([turn, turn])}
    assert rows.keys() == {"bare", "fastlora"}
    assert rows["fastlora"]["samples"] == 4 and rows["fastlora"]["over_bare"]["median"] == 3.0


@pytest.mark.slow
def test_two_commits_are_measured_in_turns(capsys):
    """The working process, the worktrees and the pooling, with the same commit on both sides."""
    before = compare._git("worktree", "list", "--porcelain").count("worktree ")
    status = main(["compare", "HEAD", "HEAD", "--cases", "classifier-64x100x128-r2-f32/*", "--budget", "20"])
    printed = capsys.readouterr().out
    assert status in (0, 1) and "fastlora plain" in printed and "eager plain" in printed
    assert compare._git("worktree", "list", "--porcelain").count("worktree ") == before
