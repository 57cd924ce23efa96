"""The drift of neuron groups as a text report, from what `statistical_results.json` holds."""

from collections.abc import Iterator, Mapping
from typing import Any

ONE_RUN = (
    "one run: the intervals are over its layers, and another seed may move otherwise. Name runs with other seeds beside"
    " it before anything is concluded"
)
NAMES = {"change": "distance moved", "turn": "angle turned"}
PLACES = {"change": "matrices", "turn": "blocks"}


def drift_report(results: Mapping[str, Any], title: str = "Drift of neuron groups") -> str:
    """What moved, beside what, and what follows.

    results: of `monitors.drift_summary.summary`, or read from the JSON file.
    """
    return "\n".join(_lines(results, title)) + "\n"


def _lines(results: Mapping[str, Any], title: str) -> Iterator[str]:
    runs = results["runs"]
    yield from (title, "=" * len(title), "")
    yield f"Runs: {', '.join(runs)}" + (" (taken as one training with different seeds)" if len(runs) > 1 else "")
    yield "Changes are from the adapters' factors in float64 where there are adapters; over adapted matrices only."
    yield (
        "random: others of the same matrix and decile of size, free to move. Intervals: 95 %, layers resampled with all"
        " matrices."
    )
    if len(runs) == 1:
        yield f"! {ONE_RUN}"
    yield from (f"! {note}" for note in results["notes"])
    for name, group in results["groups"].items():
        yield from ("", *_group(name, group, results["margin"]))
    for run, found in results["reidentified"].items():
        yield from ("", *_reidentified(run, found))


def _group(name: str, group: Mapping[str, Any], margin: float) -> Iterator[str]:
    head = f"{name}: {group['weights']:,} weights, as {group['unit']}s"
    yield from (head, "-" * len(head))
    outside = group["outside_share"]
    if outside:
        yield f"{outside:.1%} of its weights lie in matrices without an adapter and could not move; they are left out."
    for run, held in group["held_share"].items():
        if held:
            yield f"{held:.1%} of its weights were frozen in the run {run}; they are left out, and nobody's partners."
    if not group["tests"]:
        yield "Nothing of it could move: no matrix of the group was adapted."
        return
    if all(held == 1 for held in group["held_share"].values()):
        yield "Nothing of it could move, so there is nothing to compare."
        return
    for run, sides in group["final"].items():
        for side, moved in sides.items():
            yield f"  {run:<16} {side:<7} {_moved(moved)}"
    for kind, test in group["tests"].items():
        yield from _test(kind, test)
    one = " in this one run" if len(group["final"]) == 1 else ""
    for label, said in group["hypotheses"].items():
        yield f"  {label} ({said['question']}): {_answer(said)}{one}"
    if withheld := group["tests"]["change"]["withheld"]:
        yield f"  withheld: {withheld}"
    else:
        yield f"  (similar: within a factor {1 + margin:g}; undecided: the interval lies on both sides)"


def _moved(moved: Mapping[str, Any]) -> str:
    cosine = "" if moved["cosine"] is None else f", cosine {moved['cosine']:.6f}"
    spread = moved["change_quantiles"]
    return (
        f"RMS change, all matrices as one, {_number(moved['rms_change'])}, relative to weight"
        f" {_number(moved['relative_to_weight'])}{cosine};"
        f" |Δ| median {_number(spread['q50'])} [{_number(spread['q05'])}, {_number(spread['q95'])}]"
    )


def _test(kind: str, test: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"  {NAMES[kind]}, group / random, mean over {test['matrices']} {PLACES[kind]}:"
        f" {_interval(test['ratio_over_layers'])} over {test['layers']} layers,"
        f" p = {_number(test['p'])} (signs flipped by matrix)"
    )
    yield f"      all as one: {_number(test['ratio_of_totals'])} (descriptive only: ruled by those that moved most)"
    if test["runs"] > 1:
        yield f"      over {test['runs']} runs: {_interval(test['ratio_over_runs'])}; what decides: the wider limits"
        each = ", ".join(f"{run} {_interval(one['ratio'])}" for run, one in test["each_run"].items())
        yield f"      each run: {each}"
    yield (
        f"      Cohen's d over matrices {_number(test['d'])}, Hedges' g {_number(test['g'])};"
        f" pooled d of single units {_number(test['pooled_d'])} (descriptive only)"
    )


def _answer(said: Mapping[str, Any]) -> str:
    others = {k: v for k, v in said["by_quantity"].items() if k != "change"}
    return f"{said['answer']}" + "".join(f" (by {NAMES[kind]}: {answer})" for kind, answer in others.items())


def _reidentified(run: str, found: Mapping[str, Any]) -> Iterator[str]:
    head = f"Identified again after {run}"
    yield from (head, "-" * len(head))
    yield "Overlap of groups before and after; 0 on the last scale: chance, 1: as two halves of the examples agree."
    for name, group in found["groups"].items():
        before, after = group["members"]
        yield f"  {name}: {before:,} members before, {after:,} after"
        for measure in ("recall", "jaccard", "coefficient"):
            v = group[measure]
            yield (
                f"      {measure:<11} {_number(v['found'])} (chance {_number(v['chance'])}, ceiling"
                f" {_number(v['ceiling'])}): {_number(v['normalised'])}; from all examples {_number(v['whole'])}"
            )
    for kind, ranks in found["scores"].items():
        yield f"  {kind} scores: Spearman {_number(ranks['spearman'])} (ceiling {_number(ranks['ceiling'])})"


def _interval(value: Mapping[str, float | None]) -> str:
    if value["value"] is None:
        return "unknown"
    if value["low"] is None:
        return f"{_number(value['value'])} [no interval]"
    high = "∞" if value["high"] is None else _number(value["high"])
    return f"{_number(value['value'])} [{_number(value['low'])}, {high}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
