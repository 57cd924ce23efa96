"""Options of `steer`, and the generation flags that verbs which write text spell the same way."""

from pathlib import Path
from typing import Annotated

import typer

Prompts = Annotated[list[str] | None, typer.Argument(help="One or more prompts.", show_default=False)]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts", help="File of prompts: .txt (one a line), or JSONL with prompt, text or instruction, and label."
    ),
]
DirectionsFrom = Annotated[Path | None, typer.Option(help="Artifact written by `extract`; checked against the model.")]
Method = Annotated[str, typer.Option(help="With --concept or --pairs: dim, whitened, pca, logistic or robust.")]
Hook = Annotated[str | None, typer.Option(help="Name of one hook; default is the one chosen at extraction.")]
AllLayers = Annotated[bool, typer.Option("--all-layers", help="Edit all these hooks at once, with one coefficient.")]
Coeff = Annotated[float, typer.Option(help="What the direction is multiplied with; with --ablate the strength.")]
Units = Annotated[str, typer.Option(help="raw: the direction's own length; rms: the RMS length of activations.")]
Scope = Annotated[str, typer.Option(help="Tokens to edit: all, prompt, generated, answer or from:INDEX.")]
Ablate = Annotated[bool, typer.Option("--ablate", help="Remove the direction instead of adding it.")]
TargetKl = Annotated[
    float | None, typer.Option(help="Find the coefficient that costs this KL on --benign (nats per token).")
]
Benign = Annotated[Path | None, typer.Option(help="File of prompts the edit is not meant for, to measure its cost.")]

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "--max-tokens", min=1, help="Length of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Divides logits of tokens already there; 1 is off.")]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", "--ignore-end-tokens", help="Write on past the end to the full length.")
]
Stream = Annotated[bool, typer.Option("--stream", help="Show the answer to a single prompt as it is written.")]

Sweep = Annotated[bool, typer.Option("--sweep", help="Coefficients × hooks with scorers, controls and intervals.")]
Coeffs = Annotated[str | None, typer.Option(help="Coefficients such as -2,-1,1,2; default 9 symmetric ones.")]
Scorers = Annotated[
    list[str] | None,
    typer.Option("--scorer", help="refusal, refusal-log-odds, lexicon:FILE, hf:MODEL, regex:PATTERN; repeatable."),
]
System = Annotated[str | None, typer.Option("--system", help="System prompt of prompts that have none.")]
ControlCount = Annotated[int, typer.Option(min=0, help="Random directions of the same length; 20 or more are asked.")]
ControlCoeffs = Annotated[
    str | None,
    typer.Option(help="Coefficients of the controls: of a grid the middle ones, or all; else the chosen one."),
]
Shuffled = Annotated[int, typer.Option(min=0, help="Refits on shuffled labels (with --concept or --pairs).")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Sampling seeds; default 5, or 1 at temperature 0.")]
SelectionShare = Annotated[
    float, typer.Option(min=0.0, max=0.9, help="Prompts that choose hook and coefficient, where none has a split.")
]
SystemBaseline = Annotated[str | None, typer.Option(help="System prompt as a baseline without edit.")]
Goal = Annotated[str, typer.Option(help="Which way the first scorer should go: lower, higher or either.")]
CeilingKl = Annotated[float | None, typer.Option("--max-kl", help="Choose no cell above this benign KL.")]
Search = Annotated[
    str,
    typer.Option(
        help="coarse: from coarse to fine, test prompts at the chosen hook alone; grid: every cell; auto: by hooks."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the size of the sweep and its time, and stop.")]
Yes = Annotated[bool, typer.Option("--yes", help="Start a sweep that takes more than an hour.")]
Harmful = Annotated[
    bool, typer.Option("--harmful", help="All prompts are harmful: keep 12 tokens of refusals, no other text.")
]
Subset = Annotated[
    str | None, typer.Option(help="By toxicity of the prompt: challenging (>= 0.5), benign (< 0.25) or both.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many prompts of each label, drawn with --seed.")]
SteerOut = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for answers and measurements; a sweep that was cut off goes on there."),
]
