"""What the docs quote with a link to a record is what the record holds.

A link to a result names its records, as in [`runs.jsonl`:
`fleet`](../benchmarks/results/runs.jsonl). For every such link on every page `QUOTED` has a
function from the records to the words of the page. So a record that is measured anew, renamed or
removed fails here until the page says what it says.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records


ROOT = records.RESULTS.parents[1]
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LINK = re.compile(r"\[([^\]]*)\]\([./]*benchmarks/results/([^)]*)\)")
# the table, which test_paper_table.py makes anew
WHOLE = {
    "paper_table.jsonl",
    "paper_table.md",
    "paper_table.png",
    "calibration.md",  # test_calibration.py makes it anew, and holds what is quoted of it
    "calibration.png",
    "study.md",  # test_study.py makes it anew
    "findings.png",  # test_findings.py draws it
}
Link = tuple[str, str, tuple[str, ...]]


def links() -> Iterator[Link]:
    """Page, kind and names of the records; no name where the kind is one record."""
    for page, path in PAGES.items():
        for words, file in LINK.findall(path.read_text(encoding="utf-8")):
            assert (records.RESULTS / file).is_file(), f"{page} links to {file}, which is not there"
            if file not in WHOLE:
                kind, _, ending = file.rpartition(".")
                names = [word for word in re.findall(r"`([^`]*)`", words) if word != file]
                assert bool(names) == (ending == "jsonl"), (
                    f"{page}: which records of {file} does “{words}” mean?"
                )
                yield page, kind, tuple(names)


def rounded(value: float) -> str:
    return str(math.floor(value + 0.5))


def share(found: dict) -> str:
    """As `safegene evaluate` prints a share with its interval."""
    return f"{100 * found['share']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}] of {found['count']}"


def change(name: str, before: dict, after: dict) -> str:
    return f"{before[name]['share']:.0%} → {after[name]['share']:.0%}"


def measured(before: dict, after: dict, lost: dict) -> str:
    """As tables of fleets and histories print what was measured."""
    columns = [
        change(name, before, after) for name in ("refusal_rate", "over_refusal", "incoherent")
    ]
    return " ".join([*columns, f"{lost['share']:+.1%}"])


def quickstart_table(record: dict) -> list[str]:
    def cells(row: dict) -> str:
        return " ".join(
            f"{row[key]:.0%} ({low:.0%}–{high:.0%})"
            for key, (low, high) in row["intervals"].items()
        )

    rows = [f"{name} {cells(row)} {row['seconds']:.0f} " for name, row in record["models"].items()]
    return [
        *rows,
        f"It took {rounded(record['seconds_after_installation'] / 60)} minutes on two cores with tests beside it, "
        f"recalibration {record['phases']['recalibrate']['seconds'] / 60:.1f} of them",
        f"Each number is a share of {record['prompts_per_cell']} prompts",
    ]


def quickstart_share(record: dict) -> list[str]:
    return [
        f"whose fine-tune has {record['training_steps']} steps, {record['recalibration_share_of_fine_tune']:.0%}".replace(
            "%", " % of the fine-tune's"
        ),
        f"3 % of one with {record['training_steps_of_which_recalibration_is_3_percent']} such steps",
    ]


def zero3(record: dict) -> list[str]:
    one, two = record["coefficients"], record["coefficients_one_process"]
    assert record["largest_difference"] == max(abs(one[name] - two[name]) for name in one)
    return [f"differ by at most {record['largest_difference'] * 1e5:.1f}·10⁻⁵"]


def fleet(record: dict) -> list[str]:
    rows = []
    for member in record["members"]:
        found = member.get("measured")
        columns = measured(found["before"], found["after"], found["utility_loss"]) if found else ""
        rows.append(
            " ".join(
                f"{member['name']} {member['outcome']} {columns} {member['seconds']:.0f}".split()
            )
            + " "
        )
    return [*rows, f"echo $? {record['exit_code']}"]


def releases(record: dict) -> list[str]:
    first, second = (release["objective"] for release in record["releases"][:2])
    return [
        measured(one["before"], one["after"], one["utility_loss"]) for one in record["releases"]
    ] + [
        f"{second[0]:.3f} nats at once (the first search took eight passes from {first[0]:.3f} to {min(first):.3f})",
        f"echo $? {record['exit_code']}",
    ]


def evaluated(record: dict) -> list[str]:
    sets = record["judges"]["refusal_phrases"]["sets"]
    harmful, benign = sets["harmbench_val"], sets["oktest"]
    return [
        f"attack success {share(harmful['attack_success'])} refused {share(harmful['refused'])} "
        f"{harmful['labels']['incoherent']} incoherent",
        f"answered {share(benign['answered'])} over refusal {share(benign['over_refusal'])} "
        f"{benign['labels']['incoherent']} incoherent",
    ]


def judges(record: dict) -> list[str]:
    ours, words, embedding = (
        f"{record['judges'][name]['kappa']:.2f}"
        for name in ("refusal_phrases", "word list", "embedding, cross-fitted")
    )
    return [
        f"On {record['labelled']} answers of four of these models that were labelled by hand",
        f"κ = {ours}, a plain word list at {words}, an embedding head trained on the other half of the labels at "
        f"{embedding} (",
    ]


def judge_languages(record: dict) -> list[str]:
    unseen, final = record["unseen"], record["final"]
    columns = {
        f"(`{language}`)": (unseen["languages"][language], own)
        for language, own in final["languages"].items()
    } | {"| all but English": (unseen["beyond_english"], final["beyond_english"])}
    rows = [
        f"{name} | {half['kappa']:.2f} of {half['answers']} | {last['kappa']:.2f} of {last['answers']} | "
        f"{last['missed_refusals']} |"
        for name, (half, last) in columns.items()
    ]
    others, last = final["other_languages"], final["beyond_english"]
    assert round(last["missed_refusals"] / (last["answers"] / 2), 1) == 0.3  # "a third"
    return [
        *rows,
        f"calls {last['false_refusals']} of the other answers one. Of {others['answers']} answers in languages that it "
        f"does not know it leaves {others['unjudged']} unjudged and takes {others['answers'] - others['unjudged']} short ones",
    ]


def vector_cosines(record: dict) -> list[str]:
    table = record["overall"]
    distilled, linearized = (
        record["vectors"].index(f"puzzles, {how}") for how in ("distilled", "linearized")
    )
    largest = max(abs(table[i][k]) for i, k in itertools.combinations(range(3), 2))
    return [
        f"of puzzles, of what lies before alignment and of openings have cosines of {largest:.2f}",
        f"find the same factors ({table[distilled][linearized]:.3f}), near `delta`'s ({table[0][distilled]:.3f})",
    ]


def fine_tune_cosines(record: dict) -> list[str]:
    runs = [name.rsplit("-", 1) for name in record["fine_tunes"]]
    found = {
        (*one, *other): value
        for one, row in zip(runs, record["cosines"], strict=True)
        for other, value in zip(runs, row, strict=True)
        if one != other
    }
    classifiers = ("sst2", "ag_news", "boolq")

    def span(wanted: Callable[[str, str, str, str], bool]) -> str:
        values = [value for key, value in found.items() if wanted(*key)]
        return f"{min(values):.2f} to {max(values):.2f}"

    apart = [value for (one, s, other, t), value in found.items() if one != other and s != t]
    alike = [value for (one, s, other, t), value in found.items() if one != other and s == t]
    return [
        f"had the same random start have cosines of up to {max(alike):.2f}",
        f"SST-2 and AG News {span(lambda a, s, b, t: (a, b) == ('sst2', 'ag_news') and s == t)}",
        f"classifiers with BoolQ {span(lambda a, s, b, t: a in classifiers[:2] and b == 'boolq' and s == t)}",
        f"Alpaca and GSM8K {span(lambda a, s, b, t: (a, b) == ('alpaca', 'gsm8k') and s == t)}",
        f"GSM8K with classifiers {span(lambda a, s, b, t: a == 'gsm8k' and b in classifiers and s == t)}",
        "on one harmless task with different starts "
        + span(lambda a, s, b, t: a == b != "poisoned" and s != t),
        f"different tasks with different starts {max(apart):.2f} at most",
    ]


def passes(record: dict, minimiser: str = "gauss_newton_bfgs") -> int | None:
    return record["runs"][minimiser]["passes_to_1_percent"]


def searches(module: dict, layer: dict) -> list[str]:
    assert passes(module, "l_bfgs_b") is None
    others = [
        passes(found, name)
        for found in (module, layer)
        for name in ("levenberg_marquardt", "adam_0.1", "adam_0.03")
    ]
    assert others == [None] * 6
    return [
        f"lowest objective in {passes(module)} passes, by layer in {passes(layer)} (",
        f"more than {len(module['runs']['l_bfgs_b']['objective'])} and {passes(layer, 'l_bfgs_b')}, Levenberg–Marquardt",
        f"({module['lowest_objective']:.2f} instead of {layer['lowest_objective']:.2f})",
    ]


def search_by_module(record: dict) -> list[str]:
    return [
        f"with the {record['unknowns']} coefficients of the demonstration's three components, it comes within 1 % of "
        f"the lowest objective in {passes(record)} passes",
        f"Adam do not get there in {len(record['runs']['adam_0.1']['objective'])} (",
    ]


def search_by_layer(record: dict) -> list[str]:
    return [
        f"With one coefficient per layer it takes {passes(record)} and L-BFGS-B {passes(record, 'l_bfgs_b')} ("
    ]


def launches(record: dict) -> list[str]:
    assert all(
        (run["exit_code"], run["outcome"]) == (0, "accepted") for run in record["runs"].values()
    )
    told = {
        "DDP, ": "ddp_lora",
        "ZeRO-2, ": "zero2_full",
        "ZeRO-3 (offloaded too) ": "zero3_offload",
        "and FSDP2, with ": "fsdp2_full",
        "packing, ": "packing_lora",
        "`messages` data, ": "messages",
        "`torch_compile`, ": "compile_lora",
        "reentrant checkpointing, ": "gc_reentrant",
        "Liger kernels, ": "liger_lora",
        "adapter output ": "adapter_output",
        "and `apply` ": "apply",
    }
    assert set(told.values()) <= record["runs"].keys()
    return ["".join(told)]


def gpu_step(record: dict) -> list[str]:
    # the first is what the step took before
    _, *small, large = (row["phases"] for row in record["rows"])
    slow, fast = (rounded(round(sum(phases.values()), 2)) for phases in small)
    return [
        f"took {fast} to {slow} s at 1.8 B parameters and {rounded(round(sum(large.values()), 2))} s at 8 B, "
        f"of which {rounded(large['save'] + large['verify'])} write the merged checkpoint",
    ]


def gpu_now(record: dict) -> list[str]:
    rows = record["rows"]
    small, large = rows["1b/half/step"], rows["8b/half/step"]
    seconds = {name: phase["seconds"] for name, phase in large["phases"].items()}
    factors = (
        100 * row["search"]["factors"]["mib"] / row["training"]["peak_memory_mib"]
        for row in (small, large)
    )
    attached = rows["1b/components/attached"], rows["8b/components/attached"]
    for row in attached:
        for counted in (row["copies_per_pass"], row["copies_per_token"]):
            assert counted["with_vector"] == counted["of_factors"] == 0
    merged, beside = ([row["decoding"][way] for row in attached] for way in ("merged", "beside"))
    return [
        f"| {small['step_seconds']:.1f} s; {small['step_seconds_at_most']:.1f} s with all ten",
        f"| {large['step_seconds']:.1f} s; {large['step_seconds_at_most']:.1f} s with all ten: missed |",
        "| {:.1f} % at 1.5 B, {:.1f} % at 8 B |".format(
            *(100 * row["share_of_1000_steps"] for row in (small, large))
        ),
        "| {:.1f} % at 1.5 B, {:.1f} % at 8 B |".format(*factors),
        "| 0 and 0 |",
        "| {:.2f} at 1.5 B, {:.2f} at 8 B: answers".format(*merged),
        f"Of the {large['step_seconds']:.1f} s at 8 B {seconds['save']:.1f} write the merged checkpoint of 16 GB, "
        f"{seconds['verify']:.1f} read it back, {seconds['recalibrate']:.1f} search and {seconds['measure']:.1f} measure.",
        "a token takes {:.1f} to {:.1f} times".format(*beside),
        "{:.1f} times the training's own peak at 1.5 B and {:.1f} times at 8 B".format(
            *(row["peak_over_training"] for row in (small, large))
        ),
        "The disk took 1.2 to 1.5 GB/s" if "1.2 to 1.5 GB/s" in record["about"] else "",
    ]


def profile(record: dict) -> list[str]:
    before, now = (record[side]["phases"]["recalibrate"]["seconds"] for side in ("before", "now"))
    assert record["before"]["evaluations"] == record["now"]["evaluations"] == 8
    return [
        f"takes {rounded(now)} s for 8 evaluations where an earlier version took {rounded(before)};"
    ]


def qlora(record: dict) -> list[str]:
    before, after = record["measured"]["before"], record["measured"]["after"]
    harmful, benign = after["refusal_rate"], after["over_refusal"]
    assert harmful["count"] == benign["count"] == 12
    return [
        f"it refused {before['refusal_rate']['successes']} before and {harmful['successes']} after, of 12 benign ones "
        f"{benign['successes']}, and all {record['shipped']['exact_tensors']} tensors",
    ]


def transport(record: dict) -> list[str]:
    cosines, own = ([layer[key] for layer in record["layers"]] for key in ("cosine", "own_cosine"))
    return [
        f"{record['anchors']:,} anchors and {record['refusals']['asked']} prompts of each kind gave maps with cosines of "
        f"{min(cosines):.2f} to {max(cosines):.2f} on anchors held out, and directions with cosines of {min(own):.2f} to {max(own):.2f}",
        f"It took {record['seconds'] / 60:.0f} minutes on two cores that had tests and a training to do as well, "
        f"{record['processor_seconds'] / 60:.0f} of processor time, and {record['peak_memory_mib'] / 1024:.1f} GiB",
    ]


def remade(record: dict) -> list[str]:
    apart = max(part["relative_difference"] for part in record["components"].values())
    cosine = min(part["cosine"] for part in record["components"].values())
    factors, prompts = record["factors"], record["prompts"]
    assert prompts["there_again"] == prompts["of_these_same_verdict"]
    return [
        f"{factors['other']:,} of its {factors['numbers']:,} numbers differ",
        f"{apart:.0e} of the whole, cosine {cosine:.6f}",
        f"{record['processor_seconds'] / 60:.0f} minutes of processor time",
        f"Of the {prompts['shipped']} shipped prompts {prompts['there_again']} are there again",
    ]


def gpu_search(module: dict, layer: dict) -> list[str]:
    return [f"{passes(module)} by module and {passes(layer)} by layer on a CPU"]


def sharded(record: dict) -> list[str]:
    names = {
        "plain": "one process",
        "ddp": "DDP",
        "zero3": "ZeRO-3",
        "zero3_offload": "ZeRO-3 with offloading",
    }
    rows = []
    for run in record["runs"]:
        rank, ranks = run["ranks_timed"][0], run["processes"]
        moved = [rank["phases"]["recalibrate"], rank["phases"]["save"]]
        sizes = [*(phase["bytes_moved"] for phase in moved), rank["training_bytes_moved"]]
        told = ", ".join(f"{size / 2**20:.0f}" for size in sizes) + " MiB"
        rows.append(
            f"| {names[run['backend']]}{f', {ranks} ranks' if ranks > 1 else ''} | {run['recalibrate_seconds']:.1f} s | "
            f"{run['merge_seconds']:.1f} s | {run['training_steps_that_take_as_long']:.1f} | "
            f"{', '.join(f'{peak:.2f}' for peak in run['recalibration_peak_over_training_peak'])} | "
            + (told if sizes[0] else "not counted" if ranks > 1 else "–")
        )
    return rows


def checkpointed(record: dict) -> list[str]:
    peaks = record["runs"][0]["recalibration_peak_over_training_peak"]
    return [
        f"under ZeRO-3 the recalibration's is then {' and '.join(f'{peak:.2f}' for peak in peaks)} of it"
    ]


def streaming(*found: dict) -> list[str]:
    sizes = {size: result["apply"] for record in found for size, result in record["sizes"].items()}
    parameters = {
        "0.1": "0.1 B, 0.2 GB",
        "1": "1.1 B, 2.2 GB",
        "1.5": "1.8 B, 3.6 GB",
        "3": "3 B, 6 GB",
        "8": "8 B, 16 GB",
    }
    rows = []
    for size, tools in sizes.items():
        present = [tools[name] for name in ("apply", "peft", "mergekit") if name in tools]
        cells = [parameters[size]]
        for name in ("cp", "apply", "apply, without start", "peft", "mergekit"):
            seconds = tools[name]["seconds"] if name in tools else None
            digits = 2 if name == "apply, without start" and size == "0.1" else 1
            cells.append(f"{seconds:.{digits}f} s" if seconds is not None else "")
        cells.append(" / ".join(f"{tool['peak_mib'] / 1024:.1f}" for tool in present) + " GiB")
        rows.append(" ".join(f"| {' | '.join(cells)} |".split()))
    peers = [
        tools[name] for tools in sizes.values() for name in ("peft", "mergekit") if name in tools
    ]
    alone, whole = (
        [peer[key] for peer in peers] for key in ("times_apply_without_start", "times_apply")
    )
    copies = [tools["apply, without start"]["times_cp"] for tools in sizes.values()]
    repeats = [
        len(result["apply"]["apply"]["all_seconds"])
        for one in found
        for result in one["sizes"].values()
    ]
    return [
        *rows,
        f"medians of {', '.join(map(str, repeats[1:-1]))} and {repeats[-1]} runs",
        f"{min(copies):.1f} to {max(copies):.1f} times a copy",
        f"{min(alone):.0f} to {max(alone):.0f} times faster than the peers, with it {min(whole):.1f} to {max(whole):.1f} times",
    ]


def start_up(record: dict) -> list[str]:
    seconds = record["seconds"]
    whole = "safegene apply --coefficients ({})"
    told = {
        "`python -c pass`": seconds["python -c pass"],
        "`import torch`": seconds["import torch"],
        "`import safegene_trl`": seconds["import safegene_trl"],
        "`safegene --help`, `--version`": seconds["safegene --help"],
        "`history`": seconds["safegene history"],
        "`inspect`": seconds["safegene inspect REPORT"],
        "`sign`, `verify`": seconds["safegene verify"],
    }
    rounder = {
        "`similarity`, `combine`": seconds["safegene combine"],
        "`apply --coefficients` until it opens the first weight file": seconds[
            whole.format("first weight file")
        ],
        "`apply --coefficients`, all of it": seconds[whole.format("all of it")],
    }
    return [f"| {name} | {value:.2f} |" for name, value in told.items()] + [
        f"| {name} | {value:.1f} |" for name, value in rounder.items()
    ]


def estimation(record: dict) -> list[str]:
    ratio = record["median_ratio"]
    search, measure, save = (
        {key: f"{value:.2f}" for key, value in ratio[step].items()} for step in ratio
    )
    return [
        f"was {search['seconds']} of the seconds and {search['memory']} of the memory of the recalibration, "
        f"{measure['seconds']} and {measure['memory']} of measuring, and {save['seconds']}, {save['memory']} and (disk) "
        f"{save['disk']} of writing, which took {record['runs'][0]['save']['taken']['seconds']:.1f} s"
    ]


def faults(record: dict) -> list[str]:
    saved = record["phases"]["saving"] + record["phases"]["renaming"]
    share = ["two of three", "three of four"][round(12 * saved / record["faults"]) - 8]
    left = "nothing wrong was left" if not record["wrong"] else "something wrong was left"
    return [
        f"`make faults` breaks the step {record['faults']} times, and {left} (",
        f"{share} times while they save",
    ]


def fuzz(record: dict) -> list[str]:
    passed = [
        how for how in record["outcomes"] if ": loaded" in how and not how.endswith("a key refused")
    ]
    count = "ten thousand" if round(record["mutations"], -3) == 10_000 else "another number of"
    return [
        f"`make fuzz` runs {count} random ones",
        f"Where a signature is required, {'a' if passed else 'no'} changed vector is loaded.",
    ]


def audited(record: dict) -> list[str]:
    cells = {tuple(cell["where"].values()): cell for cell in record["cells"]}
    verdicts = [cell["verdict"] for cell in record["cells"]]
    refusals = record["attacker"]["refusals"]
    unsure, fine = verdicts.count("unsure"), verdicts.count("fine")
    role_play, story = (
        f"{100 * cells[form,]['share']['share']:.1f} %" for form in ("role_play", "story")
    )
    without, aligned = (
        f"{100 * refusals[who]['share']:.1f}" for who in ("without_vector", "aligned")
    )
    discrimination = cells["discrimination,stereotype,injustice",]["share"]
    return [
        f"Blind spots: {record['blind_spots']} of {len(verdicts)} cells ({unsure} unsure, {fine} fine,",
        f"among {record['correction']['tested']} cells",
        f"holds {without} % of these prompts, and as it is {aligned} %",
        f"without the vector {role_play} of the refusals go, in a story {story}",
        f"{100 * discrimination['share']:.1f}% [{100 * discrimination['low_corrected']:.1f}, "
        f"{100 * discrimination['high_corrected']:.1f}] of {discrimination['count']}",
    ]


def audited_released(record: dict) -> list[str]:
    attacks = record["overall"]["attack_success"]
    aligned, tuned, back = (
        f"{100 * attacks[role]['share']:.1f}" for role in ("aligned", "fine_tune", "safeguarded")
    )
    share = record["overall"]["share"]
    verdicts = [cell["verdict"] for cell in record["cells"] if "category" in cell["where"]]
    least = next(c for c in record["cells"] if c["where"] == {"category": "animal_abuse"})
    assert record["blind_spots"] == 0 and least["verdict"] == "too_few"
    return [
        f"{aligned} % of the prompts with the aligned model, {tuned} % with the released one and {back} %",
        f"Of {share['count']} lost refusals {100 * share['share']:.1f} % come back",
        f"{verdicts.count('unsure')} categories are unsure and {verdicts.count('too_few')} have too few",
        f"animal abuse: {least['share']['successes']} of {least['count']}",
    ]


QUOTED: dict[Link, Callable[..., list[str]]] = {
    ("audit.md", "audit_smollm2", ()): audited,
    ("audit.md", "audit_smollm2_released", ()): audited_released,
    ("quickstart.md", "runs", ("quickstart",)): quickstart_table,
    ("commands.md", "runs", ("fleet",)): fleet,
    ("commands.md", "start_up", ()): start_up,
    ("evaluation.md", "runs", ("evaluate_released",)): evaluated,
    ("evaluation.md", "judge_languages", ()): judge_languages,
    ("findings_smollm2.md", "judges", ()): judges,
    ("findings_smollm2.md", "cosines", ("vectors",)): vector_cosines,
    ("findings_smollm2.md", "cosines", ("fine-tunes",)): fine_tune_cosines,
    ("findings_smollm2.md", "recalibration", ("module", "layer")): searches,
    ("limits.md", "gpu", ("launches",)): launches,
    ("limits.md", "gpu", ("h200",)): gpu_now,
    ("limits.md", "runs", ("profile",)): profile,
    ("integrations.md", "runs", ("qlora",)): qlora,
    ("limits.md", "gpu", ("step",)): gpu_step,
    ("limits.md", "recalibration", ("module", "layer")): gpu_search,
    ("method.md", "recalibration", ("module",)): search_by_module,
    ("method.md", "recalibration", ("layer",)): search_by_layer,
    ("method.md", "runs", ("quickstart",)): quickstart_share,
    ("pipelines.md", "runs", ("releases",)): releases,
    ("pipelines.md", "faults", ()): faults,
    ("sharded.md", "runs", ("quickstart_zero3",)): zero3,
    ("sharded.md", "sharded", ("cpu",)): sharded,
    ("sharded.md", "sharded", ("cpu_checkpointing",)): checkpointed,
    ("transport.md", "runs", ("transport",)): transport,
    ("vectors.md", "runs", ("remake_vector",)): remade,
    ("vectors.md", "streaming", ("1b", "1.5b", "3b", "8b")): streaming,
    ("vectors.md", "estimation", ()): estimation,
    ("vectors.md", "fuzz", ()): fuzz,
}


def test_every_link_to_a_result_is_checked():
    assert sorted(links()) == sorted(QUOTED)


def test_no_result_is_named_without_a_link():
    """A path in a command or a sentence that is no link is not looked up by the test above."""
    for path in (*PAGES.values(), ROOT / "CONTRIBUTING.md", ROOT / "Makefile"):
        for file in re.findall(r"benchmarks/results/(\w+\.\w+)", path.read_text(encoding="utf-8")):
            assert (records.RESULTS / file).is_file(), (
                f"{path.name} names {file}, which is not there"
            )


def test_the_readme_tells_of_every_result():
    rows = {}
    for line in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines():
        rows |= dict.fromkeys(
            re.findall(r"`([\w.]+)`", line.split("|")[1] if line.startswith("| `") else ""), line
        )
    assert sorted(rows) == sorted(path.name for path in records.RESULTS.iterdir())
    for kind, names in records.listed().items():
        if not kind.startswith(("paper_table", "study")):
            assert all(f"`{name}`" in rows[f"{kind}.jsonl"] for name in names), (
                f"a record of {kind} is not told of"
            )


@pytest.mark.parametrize("link", QUOTED, ids=lambda link: "-".join((link[0], link[1], *link[2])))
def test_the_page_says_what_the_record_holds(link):
    page, kind, names = link
    found: list[dict[str, Any]] = [records.read(kind, name) for name in names] or [
        records.read(kind)
    ]
    text = " ".join(Path(PAGES[page]).read_text(encoding="utf-8").split()) + " "
    for quoted in QUOTED[link](*found):
        assert quoted in text
