"""The state before training: measured once, kept in a folder, found again when a run resumes.

A resumed run has trained weights in its hands, so it can only trust a stored baseline that provably belongs to it: the
fingerprint covers every weight that training leaves alone, tokenizer, prompts, hooks and settings.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safety_lens.artifacts import load_artifact, save_artifact
from safety_lens.errors import ModelMismatchError
from safety_lens.forced import Continuation
from safety_lens.interventions.behaviours import Behaviour
from safety_lens.loading.live import base_model
from safety_lens.log import Measurement
from safety_lens.monitors.behaviour import Answers, Before
from safety_lens.monitors.geometry import Place

KIND = "baseline"
_SAMPLE = 16_384  # values of each weight that enter its hash
_WRAPPERS = ("base_model.model.", "base_layer.", "original_module.", "modules_to_save.default.")


@dataclass(frozen=True, eq=False)
class Baseline:
    """Everything later measurements are compared with.

    places: geometry, one per concept. before: behaviour, None where nothing is probed. rows: the measurements of step
    0. settings: what shaped the numbers. weights: name of each weight of the base model → hash.
    """

    places: tuple[Place, ...]
    before: Before | None
    rows: tuple[Measurement, ...]
    settings: dict[str, Any]
    weights: dict[str, str]

    def save(self, folder: Path) -> Path:
        """Write it as an artifact, whole or not at all.

        Raises:
            ArtifactError: the place is taken or cannot be written.
        """
        tensors, answers = _packed(self)
        extra = {"weights": self.weights, "places": [_place_entry(p) for p in self.places], "answers": answers}
        if self.before is not None:
            extra["behaviours"] = {name: one.entry() for name, one in self.before.behaviours.items()}
        return save_artifact(
            folder, KIND, tensors=tensors, measurements=self.rows, arguments=self.settings, extra=extra
        )

    @classmethod
    def load(cls, folder: Path) -> "Baseline":
        """Read it back.

        Raises:
            ArtifactError: missing, damaged, or of another kind.
        """
        artifact = load_artifact(folder, kind=KIND)
        manifest, tensors = artifact.manifest, artifact.tensors
        places = tuple(_place_of(entry, tensors, i) for i, entry in enumerate(manifest["places"]))
        before = None
        if "behaviours" in manifest:
            found = {name: _answers_of(name, entry, tensors) for name, entry in manifest["answers"].items()}
            behaviours = {name: Behaviour.from_entry(entry) for name, entry in manifest["behaviours"].items()}
            before = Before(behaviours, found)
        return cls(places, before, tuple(artifact.measurements), manifest["arguments"], manifest["weights"])

    def faults(self, headline: str) -> list[str]:
        """What cannot be measured against this baseline, one line each; directions at the headline hook."""
        lines = [
            f"{place.subject} at {headline}: {place.faults[headline]}; its rows are marked"
            for place in self.places
            if headline in place.faults
        ]
        if self.before is not None:
            lines += [
                f"{name} log-odds will not be measured, and no light measurement can raise its alarm: {one.fault}"
                for name, one in self.before.behaviours.items()
                if one.fault
            ]
        return lines + self._no_contrast()

    def _no_contrast(self) -> list[str]:
        """One line where the model does not refuse harmful requests more than harmless ones."""
        rows = {row.metric: row for row in self.rows if row.subject == "behaviour/harmful" and row.step == 0}
        rate, odds = (rows.get(f"refusal_{name}_above_harmless") for name in ("rate", "log_odds"))
        if rate is None or rate.low > 0 or (odds is not None and odds.low > 0):
            return []
        known = "" if odds is None or np.isnan(odds.value) else f", log-odds {odds.value:+.2f} nats higher"
        return [
            "before training this model does not refuse harmful requests more than harmless ones: refusal rate"
            f" {rate.value:+.2f} [{rate.low:.2f}, {rate.high:.2f}]{known}. A loss of refusal cannot be seen on these"
            " requests: give --probe-harmful and --probe-harmless, or take the refusal figures for what they are"
        ]

    def check(self, settings: dict[str, Any], weights: dict[str, str], where: str) -> None:
        """Refuse a baseline of another run. weights: those that must be equal.

        Raises:
            ModelMismatchError: names what differs.
        """
        for key in sorted(
            settings.keys() | self.settings.keys(), key=lambda k: (k != "seed", k)
        ):  # it draws pairs, too
            mine, theirs = settings.get(key), self.settings.get(key)
            if mine != theirs:
                raise ModelMismatchError(
                    f"{where} was measured with another {key} ({_short(theirs)}) than this run ({_short(mine)}):"
                    " give the run its own baseline folder, or the settings it was measured with"
                )
        if self.weights.keys() != weights.keys() and not weights.keys() <= self.weights.keys():
            odd = sorted(weights.keys() - self.weights.keys())[0]
            raise ModelMismatchError(f"{where} was measured on another model: it has no weight {odd}")
        for name, sha in weights.items():
            if self.weights[name] != sha:
                raise ModelMismatchError(
                    f"{where} was measured on another model: {name}, which training does not change, differs; give the"
                    " run its own baseline folder"
                )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- fingerprints ---------------------------------------------------------------------------------------------------


def base_weights(trained: nn.Module, *, frozen_only: bool) -> dict[str, str]:
    """Name → hash of the base model's own weights, adapters left out, under the names they have without adapters.

    frozen_only: those that training does not change.
    """
    adapters = ("lora_", "modules_to_save.", "ia3_", "hada_", "oft_", "vera_", "trainable_tokens_")
    out = {}
    for name, p in base_model(trained).named_parameters():
        if any(part in name for part in adapters) or (frozen_only and p.requires_grad):
            continue
        plain = name
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        out[plain] = tensor_hash(p)
    return out


def tensor_hash(p: Tensor) -> str:
    """Hash of shape and up to 16 384 evenly spaced values."""
    flat = p.detach().reshape(-1)
    step = -(-flat.numel() // _SAMPLE) if flat.numel() else 1
    values = flat[::step].cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(p.shape)}{p.dtype}".encode())
    digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def prompts_hash(rows: Sequence[Sequence[int]]) -> str:
    """Hash of token ids."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()[:32]


# --- packing --------------------------------------------------------------------------------------------------------


def _packed(baseline: Baseline) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for i, place in enumerate(baseline.places):
        tensors[f"place/{i}/differences"] = torch.from_numpy(place.differences)
        tensors[f"place/{i}/vectors"] = torch.from_numpy(place.vectors)
        tensors[f"place/{i}/thresholds"] = torch.from_numpy(place.thresholds)
    entries: dict[str, Any] = {}
    for name, found in (baseline.before.answers if baseline.before else {}).items():
        answers = found.storable
        tensors |= {
            f"answers/{name}/shown": torch.from_numpy(answers.shown),
            f"answers/{name}/log_odds": torch.from_numpy(answers.log_odds),
            f"answers/{name}/tokens": answers.tokens,
            f"answers/{name}/logprobs": answers.logprobs,
        }
        rows = zip(answers.rows, answers.sha256, strict=True)
        entries[name] = {
            "harmful": answers.harmful,
            "rows": [[list(row.prompt), list(row.tokens), sha256] for row, sha256 in rows],
        }
    return tensors, entries


def _place_entry(place: Place) -> dict[str, Any]:
    return {
        "concept": place.concept,
        "method": place.method,
        "hooks": list(place.hooks),
        "groups": list(place.groups),
        "faults": place.faults,
    }


def _place_of(entry: dict[str, Any], tensors: dict[str, Tensor], index: int) -> Place:
    arrays = {name: tensors[f"place/{index}/{name}"].numpy() for name in ("differences", "vectors", "thresholds")}
    return Place(
        entry["concept"], entry["method"], tuple(entry["hooks"]), arrays["differences"], arrays["vectors"],
        arrays["thresholds"], tuple(entry["groups"]), entry["faults"],
    )  # fmt: skip


def _answers_of(name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Answers:
    rows = tuple(Continuation(tuple(prompt), tuple(tokens)) for prompt, tokens, _ in entry["rows"])
    hashes = tuple(sha256 for _, _, sha256 in entry["rows"])
    shown, log_odds = (tensors[f"answers/{name}/{key}"].numpy() for key in ("shown", "log_odds"))
    tokens, logprobs = (tensors[f"answers/{name}/{key}"] for key in ("tokens", "logprobs"))
    return Answers(rows, shown, log_odds, tokens, logprobs, hashes, entry["harmful"])
