"""Join a Ray cluster, or start Ray on this machine alone."""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clipvip.files import shown

ANSWER_SECONDS = 10.0
MOST_CPUS = 4  # of an actor with a model: more threads would rather wait for one another


On = Literal["local", "ray"]


def is_ray(on: str) -> bool:
    """Whether workers run on a Ray cluster rather than on this machine. Raises ValueError for
    anything else."""
    if on not in ("local", "ray"):
        raise ValueError(f"on is {on!r}; expected local or ray")
    return on == "ray"


def at_least_one(num_workers: int | None) -> int | None:
    """Return the number. Raises ValueError for less than one."""
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"--workers is {num_workers}; expected at least 1 with --on ray")
    return num_workers


class Cluster(NamedTuple):
    """The nodes of a Ray cluster: CPUs and GPUs of each."""

    nodes: list[tuple[int, int]]

    @property
    def cpus(self) -> int:
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(gpus for _, gpus in self.nodes)

    def for_model(self, num_workers: int | None) -> tuple[int, int, int]:
        """Return the number of actors that each hold a model, and the CPUs and GPUs of each: by
        default one per GPU, or without GPUs one per MOST_CPUS."""
        wanted = at_least_one(num_workers)
        if self.gpus:
            share = min(cpus // gpus for cpus, gpus in self.nodes if gpus)
            return wanted or self.gpus, max(share, 1), 1
        most = min(max(cpus for cpus, _ in self.nodes), MOST_CPUS)
        if wanted is None:
            return sum(cpus // most for cpus, _ in self.nodes), most, 0
        return wanted, max(min(self.cpus // wanted, most), 1), 0


@contextmanager
def joined_cluster() -> Iterator[Cluster]:
    """Join the cluster that RAY_ADDRESS names or this machine belongs to, else start Ray on this
    machine alone, until this block ends; say which. A cluster that is joined already stays so.

    Raises ValueError without Ray, or if no cluster answers.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # or Ray reports on this cluster over the network
    try:
        import ray
    except ImportError:
        raise ValueError('--on ray needs Ray; run: pip install "clipvip[ray]"') from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--on ray starts workers itself; run it without torchrun")
    if ray.is_initialized():
        yield _cluster()
        return
    with _quiet():
        with _usual_sigterm():
            where = _join(os.environ.get("RAY_ADDRESS", ""))
        try:
            cluster = _cluster()
            count = len(cluster.nodes)
            gpus = f", {cluster.gpus} GPUs" * bool(cluster.gpus)
            nodes = f"{count} node{'s' * (count != 1)}, {cluster.cpus} CPUs{gpus}"
            print(f"Ray {where}: {nodes}", file=sys.stderr)
            yield cluster
        finally:
            ray.shutdown()


def _join(address: str) -> str:
    """Join a cluster or start Ray; return in words what was done. address: RAY_ADDRESS, or ""."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    own = _cluster_of_machine() if address in ("", "auto") else ""
    if not own and address in ("", "auto", "local"):
        ray.init(address="local", include_dashboard=False, **quiet)
        return "on this machine alone" + "; found no cluster" * (address != "local")
    found = own or address
    if not _answers(found):  # Ray itself would try for minutes
        raise ValueError(
            f"no Ray cluster answers at {shown(found)}, which is "
            + ("what `ray start` left on this machine; " if own else "RAY_ADDRESS; ")
            + "start it, or set RAY_ADDRESS=local to use this machine alone"
        )
    try:
        # Under "auto", Ray joins the cluster of `ray start` and sends its token. To an address that
        # is given it sends none.
        ray.init(address="auto" if own else found, **quiet)
    except Exception as error:  # another version of Ray or Python, no token, …
        reason = " ".join(str(error).split())[:300]
        token = "" if own else " (if it asks for a token, set RAY_AUTH_MODE=token)"
        raise ValueError(
            f"cannot join the Ray cluster at {shown(found)}: {shown(reason)}{token}"
        ) from error
    return f"joined the cluster at {shown(found)}"


def _cluster_of_machine() -> str:
    """Address of the cluster that `ray start` made this machine a node of; "" if there is none.

    Ray's own search would also join what another program has started for itself.
    """
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _answers(address: str) -> bool:
    """Whether a program answers at host:port. Raises ValueError for another form of address."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "/" in host:
        raise ValueError(
            f"RAY_ADDRESS is {shown(address)}; expected host:port. Run this on a node of the "
            "cluster, such as by `ray job submit`, since files are read and written here too"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS):
            return True
    except (OSError, OverflowError):
        return False


def _cluster() -> Cluster:
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cluster = Cluster([(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in found])
    if not cluster.cpus:
        raise ValueError("the Ray cluster has no CPUs; add nodes that have some")
    return cluster


@contextmanager
def _usual_sigterm() -> Iterator[None]:
    """Put the handler of SIGTERM back, which ray.init replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from printing a paragraph to standard output for each process that dies, which it
    does even with log_to_driver=False. The log has a line for each."""
    from ray._private import worker

    name = "print_to_stdstream"
    before = getattr(worker, name, None)
    if before is None:  # another version of Ray
        yield
        return
    setattr(worker, name, lambda *given, **options: None)
    try:
        yield
    finally:
        setattr(worker, name, before)
