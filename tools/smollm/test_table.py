"""The table of rows."""

from tools.smollm.table import ROWS, markdown


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


def test_the_rows_of_the_repository_are_there():
    assert list(ROWS.glob("*/*/rows.json"))
