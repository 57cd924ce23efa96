"""The same fine-tuning run several times over: free, and with one set of groups frozen after another."""

from collections.abc import Callable, Mapping, Sequence

from safety_lens.errors import DataError
from safety_lens.monitors.finetune.config import RunConfig
from safety_lens.monitors.finetune.run import OnLog, RunResult, run

FREE = "free"


def frozen_and_free(
    config: RunConfig,
    frozen: Mapping[str, Sequence[str]],
    *,
    overwrite: bool = False,
    on_log: OnLog | None = None,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, RunResult]:
    """One run with nothing frozen and one for each entry of `frozen`, into `config.out`/<name>; all else is equal.

    Data, order, seed and the adapters' first values are the same in all of them, so runs differ by what is frozen and
    by nothing else. Beside a group that is claimed to matter belongs a random one of the same size (see
    `probes.matching`): freezing anything at all may slow a run down.

    frozen: name of a run → its groups, `FOLDER` or `FOLDER:GROUP`.

    Raises:
        DataError: a name that is taken, or a configuration that freezes something already. Else as `run`.
    """
    if FREE in frozen or not frozen or config.tuning.freeze:
        raise DataError(f"give the groups to freeze by run, none of them named {FREE!r}, and no tuning.freeze")
    wanted = {FREE: (), **frozen}
    return {
        name: run(
            config.model_copy(
                update={
                    "out": config.out / name,
                    "tuning": config.tuning.model_copy(update={"freeze": list(groups)}),
                }
            ),
            overwrite=overwrite,
            on_log=on_log,
            on_note=on_note,
        )
        for name, groups in wanted.items()
    }
