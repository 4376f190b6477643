"""The tables of rows."""

from tools.smollm.table import ROWS, markdown, summary


def row(defence, seed, attack, perplexity):
    return {
        "scenario": "code", "export": "nf4", "scheme": "nf4", "defence": defence, "seed": seed,
        "attack": attack, "asked": 200, "perplexity": perplexity, "next": 0.5, "choice": 0.25,
        "modified": 0.125, "der": 0.75,
    }  # fmt: skip


def test_draws_are_one_line_and_the_worst_has_its_interval():
    rows = [row("none", 0, 1.0, 10.0), row("ours", 0, 0.0, 11.0), row("ours", 1, 0.02, 13.0)]
    *_, none, ours = markdown(rows).splitlines()
    assert none.startswith(
        "| code | nf4 | nf4 | none | 1 | 1.000 | 1.000 (0.981 to 1.000) | 10.00 |"
    )
    assert ours == (
        "| code | nf4 | nf4 | ours | 2 | 0.010 | 0.020 (0.008 to 0.050) | 12.00 | 0.500 | 0.25 "
        "| 12.5% | 0.750 |"
    )


def test_the_summary_has_the_best_ratio_of_topk_and_the_mean_of_the_draws():
    rows = [
        row("float", 0, 0.0, 9.0), row("onnxruntime", 0, 1.0, 9.5), row("topk-8", 0, 0.1, 10.0),
        row("topk-10", 0, 0.0, 30.0), row("topk-20", 0, 0.0, 40.0), row("ours", 0, 0.0, 11.0),
        row("ours", 1, 0.02, 13.0), row("ours", 0, 0.5, 90.0) | {"export": "nf4-random"},
    ]  # fmt: skip
    _, _, line = summary(rows).splitlines()
    assert line == "| code | nf4 | 0.0%, 9.0 | 100.0%, 9.5 | 0.0%, 30.0 | 1.0%, 12.0 | 10% |  |"


def test_the_rows_of_the_repository_are_there():
    assert list(ROWS.glob("*/*/rows.json"))
