"""`safety-lens risk`: what a planned fine-tune is likely to do to safe answers, and afterwards how right that was."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safety_lens.cli import options, terminal

if TYPE_CHECKING:
    from safety_lens.monitors.finetune.config import RunConfig

FLAGS = {
    "model": "model",
    "data": "data.source",
    "data_format": "data.format",
    "mode": "tuning.method",
    "rank": "tuning.rank",
    "max_steps": "training.max_steps",
    "epochs": "training.num_train_epochs",
    "learning_rate": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "optim": "training.optim",
    "seed": "seed",
    "device": "device",
}
"""Which key of the run's configuration a flag sets."""


def risk(
    config: Annotated[
        Path | None, typer.Option(help="YAML of the planned run; flags stand above what it says.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(callback=options.checked_model, help="Hub id, folder or GGUF file of the base; default organism."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Training rows, as `finetune --data` takes them.")] = None,
    data_format: Annotated[str | None, typer.Option("--format", help="Format of the rows; default by fields.")] = None,
    safety: Annotated[
        str,
        typer.Option(help="Whose refusals must stay: safety (built in), or a file of requests, rows or pairs."),
    ] = "safety",
    n_safety: Annotated[int, typer.Option(min=8, help="Safety examples, drawn by the seed.")] = 64,
    mode: Annotated[str | None, typer.Option("--method", help="lora, qlora or full.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps of the plan; stands above --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in one forward.")] = None,
    optim: Annotated[str | None, typer.Option(help="Optimizer, as the Trainer names it.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="Any key of the run; repeatable.")] = None,
    rehearse: Annotated[int, typer.Option(min=0, help="Real optimizer steps on a throwaway; 0 for none.")] = 0,
    closed_form: Annotated[bool, typer.Option("--closed-form/--no-closed-form", help="The closed form.")] = True,
    batches: Annotated[int, typer.Option(min=2, help="Batches behind the direction; each is passed three times.")] = 8,
    directions: Annotated[int | None, typer.Option(min=1, help="Sensitive directions; default 90 % of F.")] = None,
    limit_kl: Annotated[float, typer.Option(help="KL per token on safe answers that counts as broken, nats.")] = 0.1,
    rows: Annotated[
        bool, typer.Option("--rows", help="Also rank the training rows; one pass over all of them.")
    ] = False,
    ancestor: Annotated[bool, typer.Option("--ancestor", help="Also print alignment-risk's numbers.")] = False,
    forecast: Annotated[list[Path] | None, typer.Option(help="With --score: a saved forecast; repeatable.")] = None,
    score: Annotated[
        list[Path] | None, typer.Option(help="Folder of a monitored run to score a forecast with; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write: forecast, figures, row risks.")] = None,
    overwrite: options.Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of adapters, order and draws.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; auto takes the first there is.")] = None,
    as_json: options.Json = False,
) -> None:
    """Forecast what a fine-tune would do to a model's safe answers; with --score, say how right a forecast was.

    --score RUN --forecast DIR compares a saved forecast; --score RUN alone makes one from the run's own configuration.
    """
    from safety_lens.artifacts import check_place
    from safety_lens.cli import risk_output as output
    from safety_lens.cli.risk_score import score_saved
    from safety_lens.errors import DataError
    from safety_lens.monitors.finetune.config import parse_change, read_config

    given = {k: v for k, v in locals().items() if k in FLAGS and v is not None}
    if out is not None:
        check_place(out, "risk", overwrite)
    terminal.quiet_libraries()
    if score and forecast:
        score_saved(forecast, score, out, overwrite, as_json)
        return
    if forecast:
        raise DataError("--forecast names a saved forecast to score: name the run with --score")
    if score:
        if len(score) > 1 or config is not None:
            raise DataError(
                "several runs are scored with a --forecast each; --score alone takes one run and no --config"
            )
        config = _config_of(score[0])
    changes: dict[str, Any] = {FLAGS[name]: value for name, value in given.items()}
    changes |= {"out": str(out or "unwritten"), "monitor.concepts": [], "monitor.groups": []}
    chosen: RunConfig = read_config(config, changes | dict(parse_change(text) for text in change or ()))
    budget = output.Asked(
        safety, n_safety, batches, rehearse, closed_form, directions, limit_kl, rows, ancestor, dry_run, as_json
    )
    output.forecast_run(chosen, budget, score[0] if score else None, out, overwrite)


def _config_of(run: Path) -> Path:
    from safety_lens.errors import ArtifactError

    if not (run / "config.yaml").is_file():
        raise ArtifactError(f"{run} is no run of finetune: it has no config.yaml; name a saved --forecast instead")
    return run / "config.yaml"
