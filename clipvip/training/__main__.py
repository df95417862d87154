"""`python -m clipvip.training CONFIG key=value …`, alone or under torchrun.

An error is one line; with CLIPVIP_TRACEBACK=1 in the environment, Python's traceback is shown.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from clipvip.terminal import one_line_errors, safe_output
from clipvip.training.preemption import EXIT_STATUS, leave_on_sigterm

DESCRIPTION = """Post-pretrain or fine-tune a model.

Train on several GPUs: torchrun --nproc-per-node 8 -m clipvip.training CONFIG KEY=VALUE …

On SIGTERM, all ranks finish their step, save and exit with status 75; start again with
resume=latest to continue. Another SIGTERM more than 5 seconds later ends the run at once."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the arguments say; on an error print one line and exit with status 1."""
    leave_on_sigterm()
    from clipvip.training.config import ConfigError, Preempted, TrainingError, load_config

    given = _parse(arguments)
    with one_line_errors(alike=(ConfigError, TrainingError)):
        config = load_config(given.config, given.overrides)  # before the slow imports

        if given.dry_run:
            from clipvip.training.dry_run import dry_run

            dry_run(config, given.processes)
            return

        from clipvip.distributed import leave
        from clipvip.training.trainer import train

        status = 0
        try:
            train(config)
        except Preempted as end:
            status = EXIT_STATUS
            if os.environ.get("RANK", "0") == "0":
                print(f"clipvip: {end}", file=sys.stderr)
        leave(status)
        if status:
            raise SystemExit(status)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse with argparse, not with the tyro of `clipvip train`, which refuses flags that stand
    between settings."""
    from clipvip.training.config import packaged_configs

    names = ", ".join(path.stem for path in packaged_configs())
    parser = argparse.ArgumentParser(
        prog="python -m clipvip.training",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help=f"a YAML file, or a packaged configuration: {names}")
    add("overrides", metavar="KEY=VALUE", nargs="*", help="settings that replace those of CONFIG")
    add(
        "--dry-run",
        action="store_true",
        help="print what the run costs, then take one step "
        "through all its parts with a 32-channel model of the same depth, on synthetic clips",
    )
    add("--processes", metavar="N", type=int, default=1, help="processes that a dry run plans for")
    given = parser.parse_intermixed_args(arguments)
    if given.processes < 1:
        parser.error(f"--processes is {given.processes}; expected at least 1")
    return given


if __name__ == "__main__":
    with safe_output():
        main()
