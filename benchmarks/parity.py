"""The hooked model against transformers, for every architecture and setting, from memory and from a folder.

float32: largest logit difference over five left-padded rows of different lengths. bfloat16: RMS logit error against
the same weights run in float32, of transformers itself and of the hooked model. Hidden states: resid_post(l) against
hidden_states[l+1] for all blocks but the last, and the last one against the input of the final norm.

Run: python benchmarks/parity.py
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo

from safety_lens.loading.architectures import architecture_of
from safety_lens.models import hooks_at, load_model

HEADER = ("model", "source", "fp32 max|Δ|", "bf16 HF", "bf16 ours", "ratio", "hidden l", "hidden last")


def load(hf: PreTrainedModel, source: str, folder: Path) -> HookedTransformer:
    if source == "memory":
        return load_model(hf)
    hf.save_pretrained(folder)
    return load_model(folder)


def rms(x: Tensor) -> float:
    return float(x.float().pow(2).mean().sqrt())


def low_precision(name: str, source: str, folder: Path, seeds: int = 8) -> tuple[float, float]:
    """RMS logit errors of transformers and of the hooked model in bfloat16, against float32 with the same weights."""
    hf = zoo.make(name, dtype=torch.bfloat16)
    model, wide = load(hf, source, folder), copy.deepcopy(hf).float()
    batches = [zoo.ragged(seed) for seed in range(seeds)]
    truth = torch.cat([zoo.hf_logits(wide, batch) for batch in batches])
    theirs = torch.cat([zoo.hf_logits(hf, batch) for batch in batches])
    ours = torch.cat([zoo.hooked_logits(model, batch) for batch in batches])
    return rms(theirs - truth), rms(ours - truth)


def hidden(hf: PreTrainedModel, model: HookedTransformer) -> tuple[float, float]:
    """Largest difference of inner hidden states, and of the last block's output to the final norm's input."""
    tokens, mask, positions = zoo.ragged()
    body = getattr(hf, architecture_of(hf).body)
    norm = next(getattr(body, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(body, name))
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        out = hf(input_ids=tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
    handle.remove()
    keep, hooks = mask.bool(), hooks_at(model)
    pairs = zip(hooks[:-1], out.hidden_states[1:-1], strict=True)
    inner = max(float((cache[hook] - state)[keep].abs().max()) for hook, state in pairs)
    return inner, float((cache[hooks[-1]] - seen[0])[keep].abs().max())


def main() -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"{HEADER[0]:<22}{HEADER[1]:<8}" + "".join(f"{word:>13}" for word in HEADER[2:]))
    rows = [(name, source) for name in zoo.ARCHITECTURES for source in ("memory", "folder")]
    rows += [(name, "memory") for name in zoo.VARIANTS]
    worst = [0.0] * 4
    for name, source in rows:
        with tempfile.TemporaryDirectory() as folder:
            hf = zoo.make(name)
            model = load(hf, source, Path(folder) / "fp32")
            batch = zoo.ragged()
            gap = float((zoo.hooked_logits(model, batch) - zoo.hf_logits(hf, batch)).abs().max())
            theirs, ours = low_precision(name, source, Path(folder) / "bf16")
            inner, last = hidden(hf, model)
        worst = [max(pair) for pair in zip(worst, (gap, ours / theirs, inner, last), strict=True)]
        print(
            f"{name:<22}{source:<8}{gap:>13.1e}{theirs:>13.4f}{ours:>13.4f}{ours / theirs:>13.2f}"
            f"{inner:>13.1e}{last:>13.1e}"
        )
    print(f"{'worst':<30}{worst[0]:>13.1e}{'':>26}{worst[1]:>13.2f}{worst[2]:>13.1e}{worst[3]:>13.1e}")
    print("targets: fp32 <= 1e-4, bf16 ratio <= 1.3, hidden states <= 1e-4")


if __name__ == "__main__":
    main()
