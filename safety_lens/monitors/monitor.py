"""A model in training, watched: fold its weights into a hooked model, read all concepts once, say what moved.

The trained model is only ever read. The hooked model is made once; a measurement folds the adapters into it (a few
milliseconds), sweeps over the concepts' prompts once, and runs the behaviour probes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from safety_lens.artifacts import MANIFEST, tokenizer_fingerprint
from safety_lens.data import Concept
from safety_lens.errors import ArtifactError, DataError, ModelError
from safety_lens.folding import LoraFolder
from safety_lens.forced import unembedded
from safety_lens.loading.live import has_adapters, unwrapped
from safety_lens.log import Measurement
from safety_lens.models import hooks_at, load_model
from safety_lens.monitors import geometry
from safety_lens.monitors.asking import REFUSAL, REQUESTS, Probes
from safety_lens.monitors.audit import audit_adapter
from safety_lens.monitors.baseline import Baseline, base_weights, prompts_hash
from safety_lens.monitors.behaviour import Before, BehaviourProbes
from safety_lens.monitors.geometry import Now, Place
from safety_lens.monitors.inputs import check_tokenizer, common_hooks, named_concepts, templates_of
from safety_lens.monitors.isolation import plain_forward, undisturbed
from safety_lens.monitors.neuron_drift.held import HeldGroups
from safety_lens.monitors.neuron_drift.rows import drift_rows
from safety_lens.monitors.neuron_drift.watch import WHOLE, DriftWatch
from safety_lens.monitors.readings import Pairs, Read, Reader, chosen, describe_pairs
from safety_lens.monitors.schedule import Tier
from safety_lens.positions import Positions, last_token
from safety_lens.probes.directions import Direction
from safety_lens.probes.estimators import estimator
from safety_lens.probes.groups import NeuronGroup
from safety_lens.probes.selection import PREFERRED_DEPTH, depth

NAN = float("nan")


class Monitor:
    """Measures drift of concepts and behaviour in a model that somebody else trains.

    trained: the HF model or PeftModel in training (DDP wrappers are looked through). concepts: `Concept`s or names that
    `load_concept` takes, as this model's tokenizer means them. hooks: default every block's `hook_resid_post`. pairs:
    how many pairs are read each time.
    probes: what behaviour is measured, None for none. groups: neuron groups whose weights are watched too (see `drift`;
    models with adapters only); frozen: groups that training keeps still, left out there. common: the hooks nearest to
    a quarter, half, three quarters and the end of the model, the same for every concept. pair_lines: a line about the
    pairs that are read, per concept. headline: one of them, for
    summaries: where most concepts have evidence, then the nearest to depth 0.6; settled by the baseline.

    Raises:
        ModelError, WeightSyncError: a model that cannot be hooked faithfully (FSDP, ZeRO-3, unknown architecture), or
            a tokenizer of another model. DataError: no concepts, two of one name, a concept with too few pairs.
    """

    def __init__(
        self,
        trained: nn.Module,
        concepts: Sequence[Concept | str],
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        hooks: Sequence[str] | None = None,
        method: str = "dim",
        probes: Probes | None = Probes(),  # noqa: B008 - frozen
        pairs: Pairs = Pairs(),  # noqa: B008 - frozen
        positions: Positions = last_token,
        seed: int = 0,
        batch_size: int | str = "auto",
        groups: Sequence[NeuronGroup] = (),
        frozen: Sequence[NeuronGroup] = (),
    ) -> None:
        estimator(method)
        self.trained, self.method, self.seed, self.pairs, self.probes = unwrapped(trained), method, seed, pairs, probes
        whole = named_concepts(concepts, tokenizer)
        self.concepts = tuple(chosen(c, pairs, seed) for c in whole)
        self.pair_lines = tuple(describe_pairs(c, pairs) for c in whole)
        check_tokenizer(tokenizer, self.trained)
        with undisturbed(), plain_forward(self.trained):
            self.model: HookedTransformer = load_model(self.trained, tokenizer=tokenizer)
            self._folder = LoraFolder(self.model, self.trained)
        self.hooks = tuple(dict.fromkeys(hooks_at(self.model) if hooks is None else hooks))
        self.common = common_hooks(self.model, self.hooks)
        self.headline = self._nearest(self.common)
        self._reader = Reader(self.model, self.concepts, self.hooks, positions=positions, batch_size=batch_size)
        names = [c.name for c in self.concepts]
        self._behaviour = None if probes is None else BehaviourProbes(self.model, probes, names, seed)
        self._neurons = DriftWatch(self.trained, groups, seed=seed, held=HeldGroups(tuple(frozen))) if groups else None
        if self._neurons is not None and not has_adapters(self.trained):
            raise DataError(WHOLE)
        self._baseline: Baseline | None = None
        self.clock: Callable[[], float] = time.perf_counter

    # --- baseline ---------------------------------------------------------------------------------------------------

    def baseline(self, folder: Path | str | None = None, *, resumed: bool = False) -> Baseline:
        """The state before training: measured now, or found in `folder` if this run (or model) has stored it there.

        resumed: the weights are trained already, so it must be found.

        Raises:
            ArtifactError: `resumed` and nothing is stored in `folder`, or the folder cannot be written.
            ModelMismatchError: what is stored belongs to another model, tokenizer, prompts or settings.
        """
        folder = None if folder is None else Path(folder)
        if folder is not None and (folder / MANIFEST).is_file():
            stored = Baseline.load(folder)
            stored.check(self._settings(), base_weights(self.trained, frozen_only=resumed), str(folder))
            return self._accept(self._completed(stored))
        if resumed:
            raise ArtifactError(
                f"this run continues one that has trained already, and no baseline is stored in {folder}: give the"
                " folder that the first part of the run wrote, or start from step 0"
            )
        with undisturbed():
            made = self._measured_baseline()
        if folder is not None:
            made.save(folder)
        return self._accept(made)

    def _completed(self, stored: Baseline) -> Baseline:
        """Write the answers again that may not lie on the disk, where the untrained model is at hand."""
        before = stored.before
        if self._behaviour is None or before is None or not any(a.withheld for a in before.answers.values()):
            return stored
        with undisturbed(), self._folder.unfolded() as at_hand:
            return replace(stored, before=self._behaviour.completed(self.model, before)) if at_hand else stored

    def adopt(self, baseline: Baseline) -> None:
        """Compare with a baseline that another monitor took, for instance of the base model of this adapter.

        Raises:
            ModelMismatchError: it does not belong to the base of this model, or to these settings.
        """
        baseline.check(self._settings(), base_weights(self.trained, frozen_only=True), "the baseline")
        self._accept(baseline)

    def _accept(self, baseline: Baseline) -> Baseline:
        self._baseline = baseline
        self.headline = self._headline(baseline.places)
        return baseline

    def _headline(self, places: Sequence[Place]) -> str:
        """Of the common hooks with evidence for the most concepts, the one nearest to a depth fixed beforehand."""
        faults = {hook: sum(hook in place.faults for place in places) for hook in self.common}
        return self._nearest([hook for hook in self.common if faults[hook] == min(faults.values())])

    def _nearest(self, hooks: Sequence[str]) -> str:
        return min(hooks, key=lambda hook: abs(depth(hook, self.model.cfg.n_layers) - PREFERRED_DEPTH))

    def _measured_baseline(self) -> Baseline:
        started = self.clock()
        self._folder.fold()
        reads = self._reader.read(self.model)
        if not all(read.finite for read in reads):
            raise ModelError("activations of the untrained model are not finite: load it in another dtype")
        places = tuple(
            geometry.place(c.name, self.method, self.hooks, read, *(templates_of(c, s) for s in ("train", "test")))
            for c, read in zip(self.concepts, reads, strict=True)
        )
        fitted = self.clock()
        before = None if self._behaviour is None else self._behaviour.before(self.model)
        derived = self.clock()
        rows = self._rows(reads, places, before, 0)
        full = fitted - started + self.clock() - derived + (0.0 if before is None else before.seconds)
        if self._behaviour is not None and before is not None:
            rows += self._behaviour.contrast(before) + self._light_seconds(before)
        rows.append(Measurement("run", "headline", 1.0, hook=self._headline(places), step=0, seed=self.seed))
        rows += [Measurement("run", "common", 1.0, hook=hook, step=0, seed=self.seed) for hook in self.common]
        rows += self._group_rows(0)
        rows.append(Measurement("run", "full_seconds", full, step=0, seed=self.seed))
        rows.append(Measurement("run", "seconds", self.clock() - started, step=0, seed=self.seed))
        return Baseline(places, before, tuple(rows), self._settings(), base_weights(self.trained, frozen_only=False))

    def _light_seconds(self, before: Before) -> list[Measurement]:
        """Seconds of a light measurement of all probes, timed once."""
        assert self._behaviour is not None
        started, n = self.clock(), self._behaviour.prompts
        self._behaviour.measure(self.model, before, 0, n)
        return [Measurement("run", "light_seconds", self.clock() - started, n=n, step=0, seed=self.seed)]

    def _settings(self) -> dict[str, Any]:
        probes = None if self.probes is None else {
            k: v for k, v in asdict(self.probes).items() if k not in REQUESTS
        }  # fmt: skip
        if probes is not None:
            probes["causal"] = list(probes["causal"])
        asked = {} if self._behaviour is None else self._behaviour.encoded
        return {
            "concepts": [c.name for c in self.concepts],
            "pairs": {c.name: prompts_hash(ids) for c, ids in zip(self.concepts, self._reader.ids, strict=True)},
            "probe prompts": {name: prompts_hash([e.ids for e in rows]) for name, rows in asked.items()},
            "hooks": list(self.hooks),
            "method": self.method,
            "positions": self._reader.positions.name,
            "probes": probes,
            "seed": self.seed,
            "tokenizer": tokenizer_fingerprint(self.model.tokenizer),
            "dtype": str(self.model.cfg.dtype),
            "architecture": self.model.cfg.original_architecture,
            **({} if self._neurons is None else {"groups": self._neurons.names}),
        }

    # --- measuring --------------------------------------------------------------------------------------------------

    def measure(self, step: int, light: int | None = None) -> list[Measurement]:
        """Measure the model as it is now; the trained model and all random streams stay as they are.

        A model whose weights or activations are not finite gives one row, "run"/"finite" with value 0.

        Args:
            step: Of the training.
            light: Prompts of each probe set whose log-odds and KL are read, and nothing else; None measures everything.

        Raises:
            DataError: No baseline was taken, or a light measurement of a run without probes.
        """
        if self._baseline is None:
            raise DataError("there is nothing to compare with: call baseline() before the first measurement")
        if light is not None and self._behaviour is None:
            raise DataError("a light measurement reads the probes, and this monitor has none")
        started = self.clock()
        with undisturbed():
            if fault := self._fault():
                return [Measurement("run", "finite", 0.0, step=step, seed=self.seed, note=fault)]
            self._folder.fold()
            if light is not None:
                rows = self._light(step, light)
                return [*rows, *self._clocked(Tier.LIGHT, started, step, light)]
            reads = self._reader.read(self.model)
            if not all(read.finite for read in reads):
                fault = "activations are not finite: the run has diverged"
                return [Measurement("run", "finite", 0.0, step=step, seed=self.seed, note=fault)]
            rows = self._rows(reads, self._baseline.places, self._baseline.before, step)
            rows += self._group_rows(step)
        return [*rows, *self._clocked(Tier.FULL, started, step)]

    def _light(self, step: int, prompts: int) -> list[Measurement]:
        assert self._behaviour is not None
        assert self._baseline is not None
        assert self._baseline.before is not None
        return self._behaviour.measure(self.model, self._baseline.before, step, prompts).rows

    def _clocked(self, tier: Tier, started: float, step: int, n: int | None = None) -> list[Measurement]:
        return [
            Measurement("run", "tier", float(tier.value), n=n, step=step, seed=self.seed),
            Measurement("run", "seconds", self.clock() - started, step=step, seed=self.seed),
        ]

    def audit(self, step: int) -> list[Measurement]:
        """What the adapters do to the old directions, from weights alone (M12, M15; see `audit_adapter`).

        Empty without adapters: a fully trained model no longer has the weights it started from.

        Raises:
            DataError: no baseline was taken.
        """
        if self._baseline is None:
            raise DataError("there are no directions to audit: call baseline() first")
        if not isinstance(self.trained, PeftModel) or ".hook_resid_" not in self.headline:
            return []
        at = self.hooks.index(self.headline)
        old = [
            Direction(place.concept, self.headline, torch.from_numpy(place.vectors[at]).float(), place.method)
            for place in self._baseline.places
            if place.vectors[at].any()
        ]
        with undisturbed():
            return [replace(row, step=step) for row in audit_adapter(self.trained, self.trained, old, seed=self.seed)]

    def _fault(self) -> str | None:
        for name, p in self.trained.named_parameters():
            if p.requires_grad and not bool(torch.isfinite(p.detach()).all()):
                return f"weight {name} has NaN or infinite entries: the run has diverged"
        return None

    def _rows(
        self, reads: Sequence[Read], places: Sequence[Place], before: Before | None, step: int
    ) -> list[Measurement]:
        common = [self.hooks.index(hook) for hook in self.common]
        nows = [Now(place, read, step, self.seed) for place, read in zip(places, reads, strict=True)]
        rows: list[Measurement] = []
        for now in nows:
            rows += geometry.profile(now)
            rows += geometry.separability(now, common)
            rows += geometry.subspace(now, common)
        rows += geometry.entanglement(nows, common)
        if self._behaviour is not None and before is not None:
            found = self._behaviour.measure(self.model, before, step)
            rows += found.rows + self._lens(nows, before, step)
            for old in self._causal_directions(places):
                rows += self._behaviour.causal_use(self.model, before, old, found.log_odds["harmful"], step)
        return rows

    def _group_rows(self, step: int) -> list[Measurement]:
        return [] if self._neurons is None else drift_rows(self._neurons.live(self.trained), step, seed=self.seed)

    def _causal_directions(self, places: Sequence[Place]) -> list[Direction]:
        """The old directions whose use is probed: each at the common hook nearest to 0.6 that has evidence for it."""
        out = []
        for place in places:
            sound = [hook for hook in self.common if hook not in place.faults]
            if self.probes is None or place.concept not in self.probes.causal or not sound:
                continue
            hook = self._nearest(sound)
            vector = torch.from_numpy(place.vectors[self.hooks.index(hook)]).float()
            if len(vector) == self.model.cfg.d_model:
                out.append(Direction(place.concept, hook, vector, place.method))
        return out

    def _lens(self, nows: Sequence[Now], before: Before, step: int) -> list[Measurement]:
        """Change of refusal minus answer logits when the direction is added to the last residual (M9), per hook.

        In logits, at the mean activation of the negative prompts behind the last block, through the final norm. The
        answer tokens are those that the untrained model's answers to harmless prompts began with.
        """
        last = f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"
        openings = before.behaviours[REFUSAL].openings
        if openings is None or last not in self.hooks:
            return []
        refuse = sorted({opening.ids[0] for opening in openings.shown})
        answer = sorted({row.tokens[0] for row in before.answers["harmless"].rows} - set(refuse))
        rows = []
        for now in nows:
            mean = now.read.test_neg[self.hooks.index(last)].mean(0)
            at = [i for i in (self.hooks.index(h) for h in self.common) if now.vectors[i].shape == mean.shape]
            shifted = np.stack([mean, *(mean + now.vectors[i] for i in at)])
            resid = torch.from_numpy(shifted).to(self.model.W_U.device, self.model.cfg.dtype)[None]
            logits = unembedded(self.model, resid)[0].double().cpu().numpy()
            effect = logits[:, refuse].mean(1) - logits[:, answer].mean(1) if answer else np.full(len(logits), NAN)
            rows += [
                Measurement(
                    now.place.subject, "logit_lens", float(effect[k] - effect[0]), hook=self.hooks[i], step=step,
                    seed=self.seed, note=now.place.faults.get(self.hooks[i]),
                )
                for k, i in enumerate(at, 1)
            ]  # fmt: skip
        return rows
