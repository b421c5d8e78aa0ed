"""The findings' page in short: its table, its plot and what it says in words."""

from statistics import fmean

import pytest

from benchmarks import records
from benchmarks.paper_table.render import OURS, harmless, load
from benchmarks.study.findings import (
    BASELINE,
    DEFAULT,
    LARGER,
    PAGE,
    PLOT,
    SAFEGUARDED,
    Group,
    Point,
    groups,
    plot,
    table,
    with_table,
)
from benchmarks.study.table import FAMILY, HARMLESS, KIND, SETS, agreement


TINY = Group(
    "tiny",
    "2 harmless",
    {
        "aligned": [Point(0.1, 0.4), Point(0.1, 0.4)],
        "fine-tuned": [Point(0.6, 0.1, 0.0), Point(0.8, 0.1, 0.0)],
        SAFEGUARDED: [Point(0.1, 0.3, 0.01), Point(0.4, 0.3, -0.02)],
    },
    ["SST-2", "Alpaca"],
)


def test_a_group_is_told_by_its_means():
    assert table([TINY])[2:] == [
        "| tiny | 2 harmless | aligned | 10.0 % |  | 40.0 % |  |",
        "| tiny | 2 harmless | fine-tuned | 70.0 % |  | 10.0 % |  |",
        "| tiny | 2 harmless | safeguarded | 25.0 % | 75 % | 30.0 % | -0.5 points |",
    ]


def test_the_page_has_the_records_table():
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text, groups()) == text
    with pytest.raises(AssertionError, match="no place"):
        with_table("nothing", groups())


def test_the_plot_has_a_panel_for_each_family(tmp_path):
    pytest.importorskip("matplotlib")
    assert f"](../benchmarks/results/{PLOT})" in PAGE.read_text(encoding="utf-8")
    assert (records.RESULTS / PLOT).is_file()
    plot([TINY], tmp_path / "one.png")
    plot([TINY, Group("other", "1", TINY.points, TINY.tasks)], tmp_path / "two.png")
    assert 0 < (tmp_path / "one.png").stat().st_size < (tmp_path / "two.png").stat().st_size


def test_what_the_page_says_in_words_is_what_the_records_hold():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    released, poison, demo, _ = (g.points for g in groups())

    def mean(points, name):
        return 100 * fmean(getattr(point, name) for point in points)

    def removed(points, index=slice(None), after=SAFEGUARDED):
        tuned, after, aligned = (
            fmean(p.attack for p in points[m][index]) for m in ("fine-tuned", after, "aligned")
        )
        return 100 * (tuned - after) / (tuned - aligned)

    def below(points):
        return mean(points["aligned"], "refusal") - mean(points[SAFEGUARDED], "refusal")

    study = records.load(KIND)

    def same(variant):
        return 100 * fmean(
            agreement(study[f"{FAMILY}-{t}-0-{variant}"], study[f"{FAMILY}-{t}-aligned"], [*SETS])
            for t in HARMLESS
        )

    easy = " ".join((PAGE.parent / "quickstart.md").read_text(encoding="utf-8").split())
    aligned, safeguarded = (mean(demo[name], "refusal") for name in ("aligned", SAFEGUARDED))
    assert f"refuses {aligned:.1f} %, and the safeguarded fine-tunes {safeguarded:.1f} %" in easy

    gsm8k, alpaca = slice(3, 4), slice(4, 5)
    assert groups()[0].tasks[3:] == ["GSM8K", "Alpaca"]
    assert removed(demo) > 100  # "all"
    for words in (
        f"removes {removed(released):.0f} % on the released model and all",
        f"{below(released):.1f} points fewer on the released model, {below(demo):.1f} fewer",
        f"loses {mean(released[SAFEGUARDED][alpaca], 'lost'):.1f} and",
        f"removes {removed(released, alpaca):.0f} %, on GSM8K {removed(released, gsm8k):.0f} %",
        f"{removed(poison):.0f} % of what the poison added is removed, "
        f"{removed(poison, after=LARGER):.0f} % with four times the shots",
        f"({mean(demo[BASELINE], 'refusal'):.1f} instead of {mean(demo[SAFEGUARDED], 'refusal'):.1f} %)",
        f"({mean(demo[BASELINE], 'lost'):.1f} instead of {mean(demo[SAFEGUARDED], 'lost'):.1f} points)",
        f"{same('KL'):.1f} instead of {same('CE'):.1f} % of all prompts",
        f"and {same(DEFAULT):.1f} with border prompts",
    ):
        assert words in text, words


def test_no_published_alternative_is_as_good_at_as_little_cost():
    tasks = harmless(load(records.RESULTS))
    published = ["SafeLoRA", "SafeMERGE", "RESTA", "EnchTable", "Safe Delta", "Antidote", "SaLoRA"]
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert len(published) == 7 and "None of the seven published alternatives" in text
    for method in published:
        have = [rows for rows in tasks.values() if method in rows]
        seeds = [rows[method].seeds & rows[OURS].seeds for rows in have]

        def over(name, measure, have=have, seeds=seeds):
            pairs = zip(have, seeds, strict=True)
            return 100 * fmean(getattr(rows[name].at(own), measure) for rows, own in pairs)

        attacks = over(method, "attack_success") - over(OURS, "attack_success")
        lost = over(OURS, "utility") - over(method, "utility")
        assert attacks > 5 or lost > 5, method
