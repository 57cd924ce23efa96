"""What the extraction benchmark compares, with the targets that each figure must meet."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from workload import difference_in_means

HF, FLOOR = "HF output_hidden_states", "HF backbone, length buckets"
HF_LARGE = "HF output_hidden_states, batches as ours without"
PREFIX, PLAIN = "ours, prefix reuse", "ours, no prefix reuse"
SAME_VECTOR = "steering-vectors train_steering_vector"
MIDDLE = slice(4, 9)  # blocks at which vectors are compared with the peers'


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min())


class Report:
    """Lines of figures with their targets, for the terminal and for JSON."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, value: float, target: float | None = None, *, most: bool = False) -> None:
        met = None if target is None else (value <= target if most else value >= target)
        self.rows.append({"what": what, "value": value, "target": target, "most": most, "met": met})

    def show(self) -> None:
        for row in self.rows:
            digits = 6 if "cosine" in row["what"] else 2
            value = f"{row['value']:.{digits}f}" if row["value"] >= 0.01 else f"{row['value']:.1e}"
            target = "" if row["target"] is None else f"{'<=' if row['most'] else '>='} {row['target']:g}"
            verdict = {None: "", True: "pass", False: "FAIL"}[row["met"]]
            print(f"{row['what']:<78}{value:>10}{target:>11}  {verdict}")


def compare_ours(report: Report, seconds: dict[str, list[float]], rows: dict[str, Tensor]) -> None:
    report.add("speed: HF / ours with prefix reuse", ratio(seconds, HF, PREFIX), 2.7)
    report.add("speed: HF / ours without prefix reuse (batches of that size)", ratio(seconds, HF_LARGE, PLAIN), 1.7)
    report.add(
        "time: ours without prefix reuse / HF backbone in length buckets", ratio(seconds, PLAIN, FLOOR), 1.15, most=True
    )
    report.add("time: ours with prefix reuse / HF backbone in length buckets", ratio(seconds, PREFIX, FLOOR))
    truth = difference_in_means(rows[FLOOR])
    inner = difference_in_means(rows[HF])[:-1]  # HF's last hidden state lies behind the final norm
    for name in (PREFIX, PLAIN):
        mine = difference_in_means(rows[name])
        report.add(
            f"vectors: {name}, largest difference from HF blocks", float((mine - truth).abs().max()), 1e-4, most=True
        )
        report.add(f"vectors: {name}, lowest cosine with hidden_states", cosine(mine[:-1], inner), 0.99999)


def compare_peers(
    report: Report, seconds: dict[str, list[float]], names: Sequence[str], mine: Tensor, theirs: Tensor
) -> None:
    for name in names:
        report.add(f"speed: {name} / ours with prefix reuse", ratio(seconds, name, PREFIX), 2.0)
    ratio_of_norms = theirs[MIDDLE].norm(dim=-1) / mine[MIDDLE].norm(dim=-1)
    report.add("vectors: steering-vectors, lowest cosine, middle blocks", cosine(mine[MIDDLE], theirs[MIDDLE]), 0.99999)
    report.add(
        "vectors: steering-vectors, largest relative gap of norms",
        float((ratio_of_norms - 1).abs().max()),
        1e-4,
        most=True,
    )


def compare_memory(report: Report, peak: dict[str, float]) -> None:
    for name, mib in peak.items():
        report.add(f"memory: peak extra MiB, {name}", mib)
    for name in (PREFIX, PLAIN):
        report.add(f"memory: {name} / HF", peak[name] / peak[HF], 0.25 if name == PREFIX else None, most=True)
