"""`python -m clipvip.training CONFIG.yaml key=value …`, also under torchrun.

An error is one line; with CLIPVIP_TRACEBACK=1 in the environment it is Python's traceback.
SIGTERM saves a checkpoint and ends with status 75.
"""

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from clipvip.terminal import one_line_errors, safe_output
from clipvip.training.preemption import EXIT_STATUS, leave_on_sigterm

USAGE = """usage: python -m clipvip.training CONFIG [key=value …] [--dry-run [--processes N]]

CONFIG is a YAML file or the name of a packaged configuration: {names}.
Several processes: torchrun --nproc-per-node 8 -m clipvip.training CONFIG key=value

--dry-run prints what a run on N processes (1) will cost, then takes one step through all its
parts on made-up clips, with a model of the same layers that is hardly any wide.

On SIGTERM all processes finish the step, save and end with status 75: started again, with
resume=latest, the run goes on. One more SIGTERM, over 5 seconds later, ends at once."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train by a configuration; an error is one line and exit status 1."""
    leave_on_sigterm()
    from clipvip.training.config import (
        ConfigError,
        Preempted,
        TrainingError,
        load_config,
        packaged_configs,
    )

    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(names=", ".join(path.stem for path in packaged_configs())))
        raise SystemExit(0 if arguments else 2)
    arguments, dry, processes = _flags(list(arguments))
    with one_line_errors(alike=(ConfigError, TrainingError)):
        config = load_config(arguments[0], arguments[1:])  # before the slow imports

        if dry:
            from clipvip.training.dry_run import dry_run

            dry_run(config, processes)
            return

        import torch.distributed as dist

        from clipvip.training.trainer import train

        status = 0
        try:
            train(config)
        except Preempted as end:
            status = EXIT_STATUS
            if os.environ.get("RANK", "0") == "0":
                print(f"clipvip: {end}", file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()
            _leave(status)
        if status:
            raise SystemExit(status)


def _leave(status: int) -> NoReturn:
    """End the process without shutting the interpreter down.

    A gloo thread may still have to free the tensors of the last collective (PyTorch 2.13). It would
    then abort the process, and a finished run would fail.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _flags(arguments: list[str]) -> tuple[list[str], bool, int]:
    """The arguments without flags; whether it is a dry run, and of how many processes."""
    parser = argparse.ArgumentParser(prog="python -m clipvip.training", add_help=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    flags, rest = parser.parse_known_intermixed_args(arguments)
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    if flags.processes < 1:
        parser.error(f"--processes is {flags.processes}; expected at least 1")
    return rest, flags.dry_run, flags.processes


if __name__ == "__main__":
    with safe_output():
        main()
