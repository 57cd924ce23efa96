"""The doctor's checks hold on every architecture, and each of them sees the fault it is for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import zoo
from torch import Tensor
from transformer_lens import HookedTransformer
from typer.testing import CliRunner

from safety_lens import conformance
from safety_lens.conformance import CHECKS, PROMPTS, Finding, examine
from safety_lens.data import Encoded
from safety_lens.frames import Frame
from safety_lens.interventions import conformance as edits_conformance
from safety_lens.interventions import rows as rows_module
from safety_lens.interventions.conformance import CHECKS as EDIT_CHECKS
from safety_lens.interventions.conformance import WEIGHT_CHECKS, examine_edits
from safety_lens.interventions.edits import Ablate, Edit
from safety_lens.interventions.scopes import Scope
from safety_lens.models import load_model

WORDS = ("w5 w6 w7 w8", "w9", "w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21")


@cache
def hooked(name: str = "llama") -> HookedTransformer:
    return load_model(zoo.make(name), tokenizer=zoo.tokenizer(), check=False)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {f.name: f for f in findings}


SOME = ["llama", "gemma2", "gpt2", "neox", "qwen2_window"]


@pytest.mark.parametrize("name", SOME + [pytest.param(n, marks=pytest.mark.slow) for n in zoo.ALL if n not in SOME])
def test_every_check_of_edits_holds_on_every_architecture(name: str) -> None:
    findings = examine_edits(hooked(name), WORDS)
    assert [f.name for f in findings] == [n for n, *_ in (*EDIT_CHECKS, *WEIGHT_CHECKS)]
    assert all(f.ok for f in findings), [f for f in findings if not f.ok]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_check_of_reading_and_generating_holds(name: str) -> None:
    findings = examine(hooked(name), WORDS)
    assert all(f.ok for f in findings), [f for f in findings if not f.ok]
    assert len(findings) == len(CHECKS) + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_checks_hold_at_the_tolerance_of_other_dtypes(dtype: torch.dtype) -> None:
    findings = examine_edits(load_model(zoo.make("llama", dtype=dtype), tokenizer=zoo.tokenizer(), check=False), WORDS)
    assert all(f.ok for f in findings), [f for f in findings if not f.ok]


def test_what_cannot_be_checked_is_said_and_not_counted_as_a_number() -> None:
    found = by_name(examine_edits(hooked("gemma2"), WORDS))["orthogonal_is_ablated"]
    assert found.ok
    assert found.gap != found.gap
    assert found.detail.startswith("does not apply")


def test_checks_leave_the_model_as_they_found_it() -> None:
    model = hooked()

    def state() -> list[Any]:
        points = [len(p.fwd_hooks) + len(p._forward_hooks) for p in model.hook_dict.values()]
        return [points, model.training, torch.get_rng_state().tolist(), [float(p.sum()) for p in model.parameters()]]

    before = state()
    examine_edits(model, WORDS)
    assert state() == before


# --- every check sees its fault -------------------------------------------------------------------------------------


def _misses(fault: str, check: str, monkeypatch: pytest.MonkeyPatch) -> Finding:
    monkeypatch.undo()
    FAULTS[fault](monkeypatch)
    return by_name(examine_edits(hooked(), WORDS))[check]


def _zero_moves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Edit, "__call__", lambda self, act, hook=None: act + 1e-6)


def _half_ablated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ablate, "__call__", lambda self, x: x - 0.9 * (x @ self.unit.to(x))[..., None] * self.unit.to(x))


def _prefill_only(patch: pytest.MonkeyPatch) -> None:
    """steering-vectors' min_token_index: nothing after the prompt once a cache is used."""
    right = Scope.__call__
    patch.setattr(Scope, "__call__", lambda self, f: right(self, f) & torch.tensor(f.position.shape[1] > 1))


def _from_the_batch_start(patch: pytest.MonkeyPatch) -> None:
    """Positions counted in columns: wrong in every row that is padded."""

    def shifted(self: Scope, frame: Frame) -> Tensor:
        columns = torch.arange(frame.position.shape[1]).expand_as(frame.position)
        return self.touches(Frame(columns, frame.prompt, frame.row)) & (frame.position >= 0)

    patch.setattr(Scope, "__call__", shifted)


def _first_row_only(patch: pytest.MonkeyPatch) -> None:
    """IBM activation-steering: rows behind the first are silently not steered."""
    right = rows_module._EachOwn.__call__

    def call(self: Any, act: Tensor, hook: Any = None) -> Tensor:
        out = act.clone()
        out[:1] = right(self, act, hook)[:1]
        return out

    patch.setattr(rows_module._EachOwn, "__call__", call)


def _hooks_stay(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def leaky(model: HookedTransformer, *hooks: Any) -> Iterator[HookedTransformer]:
        for name, fn in (pair for group in hooks for pair in group):
            model.add_hook(name, fn)
        yield model
        model.reset_hooks()

    patch.setattr(edits_conformance, "applied", leaky)


def _embedding_forgotten(patch: pytest.MonkeyPatch) -> None:
    from safety_lens.interventions import weights

    patch.setattr(weights, "WRITERS", tuple(w for w in weights.WRITERS if w != "embed.W_E"))


FAULTS = {
    "zero moves": _zero_moves,
    "half ablated": _half_ablated,
    "prefill only": _prefill_only,
    "columns": _from_the_batch_start,
    "first row only": _first_row_only,
    "hooks stay": _hooks_stay,
    "embedding forgotten": _embedding_forgotten,
}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("zero moves", "strength_zero"),
        ("half ablated", "ablation_complete"),
        ("prefill only", "asked_tokens"),
        ("columns", "asked_tokens"),
        ("first row only", "rows_are_single"),
        ("hooks stay", "nothing_left"),
        ("embedding forgotten", "orthogonal_is_ablated"),
    ],
)
def test_each_check_fails_for_the_fault_it_is_for(fault: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        assert not _misses(fault, check, monkeypatch).ok
    finally:
        hooked().reset_hooks()


def test_a_gap_that_is_no_number_fails() -> None:
    def broken(model: HookedTransformer, encoded: list[Encoded]) -> conformance.Gap:
        return conformance.Gap(float("nan"), 1.0)

    (found,) = conformance.run_checks(hooked(), [("x", broken, False, "")], [])
    assert not found.ok


# --- the verb -------------------------------------------------------------------------------------------------------


def test_doctor_prints_both_tables_as_json_rows_and_takes_a_control_vector(tmp_path: Path) -> None:
    from safety_lens.cli import app

    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_tensor("direction.1", np.ones(load_model("organism").cfg.d_model, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = CliRunner().invoke(app, ["doctor", "--json", "--directions", str(tmp_path / "v.gguf")])
    assert done.exit_code == 0, done.output
    assert "fits this model (1 directions)" in done.stderr.replace("\n", " ")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    names = [row["metric"] for row in rows]
    assert names == [n for n, *_ in CHECKS] + ["single_bos"] + [n for n, *_ in (*EDIT_CHECKS, *WEIGHT_CHECKS)]
    assert all(row["note"].startswith("ok: ") for row in rows)
    assert len(PROMPTS) == 3


def test_doctor_ends_with_one_line_that_sums_up() -> None:
    from safety_lens.cli.doctor import verdict

    nan = float("nan")
    held, failed = Finding("zero_edit", True, 0.0, 0.0, "held"), Finding("cached_text", False, nan, 1e-4, "broken")
    idle = Finding("orthogonal_is_ablated", True, nan, nan, "does not apply: norms")
    assert verdict([held, held], "m") == "fit to be measured: m passes all 2 checks"
    assert verdict([held, idle], "m").endswith("1 of which cannot be made on it (orthogonal_is_ablated)")
    assert verdict([held, failed, idle], "m") == "not fit to be measured: m fails 1 of 3 checks (cached_text)"
