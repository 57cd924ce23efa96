"""`safety-lens finetune`: LoRA, QLoRA or full fine-tuning with the monitor watching."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safety_lens.cli import options, terminal

if TYPE_CHECKING:
    from safety_lens.monitors.finetune.config import RunConfig
    from safety_lens.monitors.finetune.estimate import Estimate
    from safety_lens.monitors.finetune.run import RunResult

FLAGS = {
    "out": "out",
    "model": "model",
    "data": "data.source",
    "data_format": "data.format",
    "max_length": "data.max_length",
    "limit": "data.limit",
    "method": "tuning.method",
    "rank": "tuning.rank",
    "layers": "tuning.layers",
    "freeze": "tuning.freeze",
    "penalty": "protect.penalty",
    "penalty_weight": "protect.weight",
    "drop_risky": "protect.drop_risky",
    "safety": "protect.safety",
    "epochs": "training.num_train_epochs",
    "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "report_to": "training.report_to",
    "concept": "monitor.concepts",
    "every": "monitor.every",
    "monitor_budget": "monitor.budget",
    "baseline": "monitor.baseline",
    "probe_harmful": "monitor.probes.harmful",
    "probe_harmless": "monitor.probes.harmless",
    "watch": "monitor.groups",
    "control_runs": "monitor.control_runs",
    "on_alarm": "monitor.on_alarm",
    "seed": "seed",
    "device": "device",
    "dtype": "dtype",
}
"""Which key of the configuration a flag sets."""


def finetune(
    config: Annotated[Path | None, typer.Option(help="YAML file; flags stand above what it says.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write: adapter, log, checkpoints.")] = None,
    model: Annotated[
        str | None,
        typer.Option(callback=options.checked_model, help="Hub id, folder or GGUF file of the base; default organism."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="JSONL, JSON or CSV file, hf:NAME, alpaca, dolly, code-alpaca, benign, facts, compliance."),
    ] = None,
    data_format: Annotated[
        str | None, typer.Option("--format", help="messages, instruction, alpaca, dolly, code-alpaca, prompt, text.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row; longer ones are cut, and said.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows to take, drawn by the seed.")] = None,
    method: Annotated[str | None, typer.Option(help="lora, qlora or full.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Blocks that get an adapter, such as 0,3,8-12; default all.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Weights that stay exactly as they are: FOLDER:GROUP of a groups artifact; repeatable."),
    ] = None,
    penalty: Annotated[
        str | None, typer.Option(help="Hold the model to its safe answers: kl, fisher or alignguard.")
    ] = None,
    penalty_weight: Annotated[float | None, typer.Option(help="0 or more; default each penalty's own.")] = None,
    drop_risky: Annotated[
        float | None, typer.Option(help="Share of the rows to leave out, those that push away from safe answers most.")
    ] = None,
    safety: Annotated[
        str | None,
        typer.Option(help="Requests for --penalty and --drop-risky, with safe answers or answered by the model."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; stands above --epochs.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in one forward, on each device.")] = None,
    report_to: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb, ...; repeatable.")] = None,
    concept: Annotated[
        list[str] | None, typer.Option(help="Built-in concept or file of pairs to watch; repeatable. None: no monitor.")
    ] = None,
    read_pairs: options.ReadPairs = None,
    every: Annotated[int | None, typer.Option(help="Optimizer steps between full measurements, at least.")] = None,
    monitor_budget: Annotated[
        str | None, typer.Option(help="Share of the training time that measuring may take, such as 5%, or none.")
    ] = None,
    baseline: options.BaselineFrom = None,
    probe_harmful: options.ProbeHarmful = None,
    probe_harmless: options.ProbeHarmless = None,
    watch: Annotated[
        list[str] | None,
        typer.Option(help="Neuron groups whose weights the monitor watches too: FOLDER:GROUP; repeatable."),
    ] = None,
    control_runs: Annotated[
        list[Path] | None,
        typer.Option(help="Harmless run of the same steps and rate; five or more judge whether a direction turned."),
    ] = None,
    on_alarm: Annotated[list[str] | None, typer.Option(help="log, checkpoint, stop, reduce_lr; repeatable.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Any key: training.weight_decay=0.01; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="With --dry-run: estimate from three real steps and one measurement on the model."
        ),
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and splits.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; auto takes the first there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default the checkpoint's.")] = None,
    as_json: options.Json = False,
) -> None:
    """Fine-tune a model and watch concepts and behaviour while it trains.

    The loss is on responses only. Everything is checked before the model loads.
    """
    from safety_lens.cli.extract import parse_layers
    from safety_lens.monitors.finetune.config import parse_change, read_config
    from safety_lens.monitors.finetune.early import check_early
    from safety_lens.monitors.finetune.place import check_room

    given = {k: v for k, v in locals().items() if k in FLAGS and v is not None}
    changes: dict[str, Any] = {FLAGS[name]: value for name, value in given.items()}
    if layers is not None:
        changes["tuning.layers"] = parse_layers(layers)
    if read_pairs is not None:
        changes["monitor.pairs"] = options.parse_read_pairs(read_pairs)
    chosen = read_config(config, changes | dict(parse_change(text) for text in change or ()))
    check_early(chosen)  # a mistake is known before anything is imported that takes seconds
    check_room(chosen, resume=resume, overwrite=overwrite)
    terminal.quiet_libraries()
    if dry_run:
        _announce(chosen, measure, as_json)
        return
    _train(chosen, resume, overwrite, as_json)


def _announce(config: "RunConfig", measure: bool, as_json: bool) -> None:
    from safety_lens.monitors.finetune.estimate import computed, measured

    estimate = (measured if measure else computed)(config)
    if as_json:
        import json
        from dataclasses import asdict

        known = {k: None if v != v else v for k, v in asdict(estimate).items()}
        typer.echo(json.dumps({"config": config.model_dump(mode="json"), "estimate": known}, allow_nan=False))
        return
    terminal.out.print(config.to_yaml(), markup=False, end="")
    for line in estimate_lines(estimate):
        terminal.out.print(line, markup=False, soft_wrap=True)


def estimate_lines(estimate: "Estimate") -> list[str]:
    """What an estimate says, a line each."""
    memory = ", ".join(f"{name} {_size(size)}" for name, size in estimate.memory.items())
    lines = [
        *(f"! {note}" for note in estimate.notes),
        f"{estimate.steps} steps of {estimate.tokens} tokens; {estimate.trained:,} of {estimate.parameters:,} weights"
        " are trained",
        f"time: {terminal.duration(estimate.seconds)} of training ({estimate.basis})",
    ]
    if estimate.before == estimate.before:
        total = estimate.seconds + estimate.before + estimate.watching
        lines += [
            f"      {terminal.duration(estimate.before)} for the measurement before training,"
            f" {terminal.duration(estimate.watching)} for {estimate.full} full and {estimate.light} light ones later",
            f"      {terminal.duration(total)} in all",
        ]
    return [*lines, f"memory: {_size(estimate.peak)} ({memory})"]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _train(config: "RunConfig", resume: bool, overwrite: bool, as_json: bool) -> None:
    import warnings

    from safety_lens.monitors.finetune.run import run

    terminal.show_log("safety_lens.monitor")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft reads the old name

    def on_log(step: int, logs: Mapping[str, float]) -> None:
        if "loss" in logs:
            terminal.err.print(f"step {step}: loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.2e}")

    result = run(
        config,
        resume=resume,
        overwrite=overwrite,
        on_log=on_log,
        on_group=lambda line: terminal.err.print(line, markup=False, soft_wrap=True),
        on_note=lambda note: terminal.err.print(f"! {note}", markup=False, soft_wrap=True),
    )
    if not result.first:
        return  # under torchrun the first process reports
    if as_json:
        for row in result.measurements:
            typer.echo(row.to_json())
        return
    # a run that goes on may have said its first alarm to another terminal
    report_run(result, told=not resume and "log" in config.monitor.on_alarm)


def report_run(result: "RunResult", *, told: bool = False) -> None:
    """Tables of what moved, figures beside the log, and where everything is. told: its alarm was printed meanwhile."""
    from safety_lens.report.drift_plots import draw_run
    from safety_lens.report.drift_tables import show_runs
    from safety_lens.report.neuron_drift_plots import draw_neuron_drift

    if any(row.metric == "cosine_to_baseline" for row in result.measurements):
        for part in show_runs({result.out.name: result.measurements}, (result.out.name,) if told else ()):
            terminal.out.print(part)
        draw_run(result.measurements, result.out / "figures", result.out.name)
        draw_neuron_drift(result.measurements, result.out / "figures", result.out.name)
    terminal.out.print(f"{result.steps} steps", markup=False)
    terminal.out.print(f"written: {result.out}", markup=False, soft_wrap=True)
