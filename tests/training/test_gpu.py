"""Training on a GPU: the host rarely waits for it, it is rarely idle, and runs that should be equal
are. Whatever of this a CPU can show is tested there as well."""

import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipvip import embedding, inputs, losses
from clipvip.data.annotations import load_annotations
from clipvip.model import CLIPViPModel, modeling, processing
from clipvip.training import state, trainer
from clipvip.training import step as steps
from clipvip.training.__main__ import main
from clipvip.training.build import build_model
from clipvip.training.config import ConfigError
from clipvip.training.trainer import train

MOST_WAITS = 2  # a step
TASKS = ["retrieval", "omnisource"]
BF16 = ("mixed_precision=bf16", "backend=native", "data.decoder=pyav")


def at_each_step(monkeypatch, do):
    """Calls do(step) as each step of a run begins."""
    schedule = steps.schedule

    def told(done, total, warmup):
        do(done + 1)
        return schedule(done, total, warmup)

    monkeypatch.setattr(steps, "schedule", told)


# --- waits that are counted on the CPU ------------------------------------------------------------

aten = torch.ops.aten
READ = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
MASKED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIED = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.new_tensor}


class Waits(TorchDispatchMode):
    """Records where the host would wait for a GPU if the marked tensors were on one.

    Marked are tensors that were sent to the device, those computed from marked ones, and those
    created with device=…. The host waits where it reads a marked tensor's values, where a shape
    depends on them, and where an unmarked tensor has to be copied to a marked one's device.
    """

    def __init__(self):
        super().__init__()
        self.marked, self.found = set(), []
        self.calls = _Calls(self)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def mark(self, found):
        for tensor in tensors(found):
            self.marked.add(StorageWeakRef(tensor.untyped_storage()))
        return found

    def is_marked(self, tensor):
        return StorageWeakRef(tensor.untyped_storage()) in self.marked

    def send(self, tensor, device):
        return tensor if self.is_marked(tensor) else self.mark(tensor.clone())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        marked = [self.is_marked(tensor) for tensor in given]
        out = func(*args, **kwargs)
        if any(marked):
            self.mark(out)
            packet = func.overloadpacket
            copied = any(x.dim() and not own for x, own in zip(given, marked, strict=True))
            by_mask = packet in MASKED and any(x.dtype == torch.bool for x in tensors(args[1]))
            repeated = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
            if packet in READ or by_mask or repeated or copied:
                self.found.append(str(func))
        return out


class _Calls(TorchFunctionMode):
    """Records those calls that run no operation on a CPU, such as tolist."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on = [tensor for tensor in tensors(args) if self.waits.is_marked(tensor)]
        if (func in COPIED and on) or (func is torch.tensor and "device" in kwargs):
            self.waits.found.append(str(func))
        out = func(*args, **kwargs)
        return self.waits.mark(out) if "device" in kwargs else out


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def in_backward(x):
    read = []
    leaf = x.clone().requires_grad_()
    leaf.register_hook(lambda gradient: read.append(gradient.max().item()))
    leaf.sum().backward()


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x + torch.ones(3),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.equal(x, x),
        in_backward,
    ],
)
def test_what_waits_for_a_gpu_is_counted(waiting):
    with Waits() as waits:
        waiting(waits.mark(torch.arange(3.0)))
    assert waits.found


@pytest.mark.parametrize(
    "overrides", [[], ["micro_batch=3"], ["accumulation=2", "ema=0.9"]], ids=str
)
@pytest.mark.parametrize("task", TASKS)
def test_a_step_reads_its_device_at_most_twice(task, overrides, make_config, monkeypatch):
    waits, counts, make = Waits(), [], state.adamw

    def adamw(model, optim):
        waits.mark([*model.parameters(), *model.buffers()])
        return make(model, optim)

    def begin(step):
        counts.append(list(waits.found))
        waits.found.clear()

    monkeypatch.setattr(state, "adamw", adamw)
    for module in (steps, losses, processing):
        monkeypatch.setattr(module, "send", waits.send)
    # It checks frames' offsets where they are on the CPU.
    monkeypatch.setattr(modeling, "pack_frames", lambda pixels, offsets: (pixels, offsets))
    at_each_step(monkeypatch, begin)
    config = make_config(*BF16, f"task={task}", "max_steps=5", "save_every=5", *overrides)
    with waits:
        train(config)
    assert len(counts) == 5
    for found in counts[1:]:
        assert 1 <= len(found) <= MOST_WAITS, found


def test_embedding_reads_its_device_once_a_batch(make_config, world, monkeypatch):
    """Also of texts of which some are padded."""
    waits = Waits()
    model, processor = build_model(make_config("backend=native"), None)
    for module in (embedding, processing):
        monkeypatch.setattr(module, "send", waits.send)
    monkeypatch.setattr(modeling, "pack_frames", lambda pixels, offsets: (pixels, offsets))
    clips = load_annotations(world / "annotations.jsonl")
    given = {"batch_size": 4, "num_workers": 0, "decoder": "pyav"}
    embed_clips = embedding.embed_clips.__wrapped__  # inference mode would hide what is read
    with waits, torch.no_grad():
        waits.mark([*model.parameters(), *model.buffers()])
        embedding.embed_texts(model, processor, [text for clip in clips for text in clip.text], 8)
        assert len(waits.found) == 4, waits.found
        waits.found.clear()
        assert len(list(embed_clips(model, processor, clips, [], **given))) == 4
        assert len(waits.found) == 4, waits.found


def test_padding_is_masked_as_by_transformers(make_config):
    model, _ = build_model(make_config(), None)
    ids = torch.randint(400, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    found = model.get_text_features(ids, embedding.causal_mask(mask))
    assert found.equal(model.get_text_features(ids, mask))
    assert not found.equal(model.get_text_features(ids, 1 - mask))


# --- copies to a GPU, on the CPU ------------------------------------------------------------------


class Stream:
    """A stream that does its work as late as it may: when another one waits for it."""

    def __init__(self):
        self.queued, self.done = [], 0

    def record_event(self):
        return self, len(self.queued)

    def wait_event(self, event):
        stream, until = event
        for work in stream.queued[stream.done : until]:
            work()
        stream.done = max(stream.done, until)


class Copies:
    """Copies to a GPU that a CPU stands for; what is queued for computing is done at once."""

    def __init__(self, monkeypatch):
        self.copying, self.computing = Stream(), Stream()
        self.current, self.kept = self.computing, set()
        monkeypatch.setattr(inputs, "_copy_stream", lambda device: self.copying)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(Tensor, "record_stream", lambda *given: self.keep(*given))

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def keep(self, tensor, stream):
        assert stream is self.computing
        self.kept.add(tensor.data_ptr())

    def send(self, tensor, device):
        there = torch.zeros_like(tensor)
        self.current.queued.append(lambda: there.copy_(tensor))
        return there

    def sent_ahead(self, items, send_item, device):
        for item, sent in inputs.sent_ahead(items, send_item, torch.device("cuda")):
            assert {tensor.data_ptr() for tensor in sent.values()} <= self.kept
            yield item, sent


def numbered(count, failing=None):
    for n in range(1, count + 1):
        if n == failing:
            raise ValueError(f"item {n}")
        yield {"x": torch.full((3,), n)}


def test_an_item_is_there_in_time_and_the_next_one_is_on_its_way(monkeypatch):
    copies, found = Copies(monkeypatch), []
    given = numbered(4), lambda item: {"x": copies.send(item["x"], "cuda")}, torch.device("cuda")
    for item, sent in copies.sent_ahead(*given):
        assert sent["x"].equal(item["x"])
        found.append(int(item["x"][0]))
        assert len(copies.copying.queued) == min(found[-1] + 1, 4)
        assert copies.copying.done == found[-1]
    assert found == [1, 2, 3, 4] and not copies.computing.queued


@pytest.mark.parametrize("device", ["cpu", "fake"])
@pytest.mark.parametrize("failing", [1, 2, 4])
def test_items_before_one_that_fails_come_first(failing, device, monkeypatch):
    copies, found = Copies(monkeypatch), []
    ahead = copies.sent_ahead if device == "fake" else inputs.sent_ahead
    with pytest.raises(ValueError, match=f"item {failing}"):
        for item, sent in ahead(numbered(5, failing), dict, torch.device("cpu")):
            assert sent == item
            found.append(int(item["x"][0]))
    assert found == list(range(1, failing))


@pytest.mark.parametrize("overrides", [[], ["micro_batch=3"], ["accumulation=2"]], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_whose_batches_are_sent_ahead_is_the_run(
    task, overrides, make_config, monkeypatch, tmp_path
):
    """Also resumed, and although random numbers are drawn in between. No batch is drawn in vain."""
    common = (f"task={task}", "save_every=4", DROPOUT, "resume=latest", *overrides)
    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    train(make_config(*common, f"out={plain}"))

    copies, drawn, endless = Copies(monkeypatch), [], trainer.endless

    def noted(*given):
        for batch in endless(*given):
            drawn.append(batch)
            yield batch

    monkeypatch.setattr(trainer, "endless", noted)
    monkeypatch.setattr(steps, "send", copies.send)
    monkeypatch.setattr(steps, "sent_ahead", copies.sent_ahead)
    train(make_config(*common, f"out={ahead}"))
    each = 2 if "accumulation=2" in overrides else 1
    assert len(drawn) == 6 * each and copies.copying.done == len(copies.copying.queued) > 0
    assert_same_run(ahead, plain)
    (ahead / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    train(make_config(*common, f"out={ahead}"))
    assert len(drawn) == (6 + 2) * each
    assert_same_run(ahead, plain)


@pytest.mark.parametrize("sent_ahead", [False, True])
def test_waiting_for_data_is_counted_wherever_a_batch_is_drawn(
    sent_ahead, make_config, monkeypatch
):
    clock, waited, endless, copies = [0.0], [], trainer.endless, Copies(monkeypatch)

    def slow(*given):
        for batch in endless(*given):
            clock[0] += 1
            yield batch

    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(trainer, "endless", slow)
    monkeypatch.setattr(trainer, "report", lambda run, step, result: waited.append(result.waited))
    if sent_ahead:
        monkeypatch.setattr(steps, "send", copies.send)
        monkeypatch.setattr(steps, "sent_ahead", copies.sent_ahead)
    train(make_config("max_steps=4"))
    assert waited == ([2, 1, 1, 0] if sent_ahead else [1, 1, 1, 1])


# --- waits and idle time of a GPU -----------------------------------------------------------------

SYNCHRONIZES = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize")


class Trace:
    """What the GPU did in some steps of a run, and what the host called for it, by PyTorch's
    profiler. The host's own operations are left out: recording them would take its time."""

    def __init__(self):
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.seconds = 0.0

    def start(self):
        torch.cuda.synchronize()
        self.profiler.start()
        self.began = time.perf_counter()

    def stop(self, path):
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        self.on_gpu = sorted((e for e in events if e["cat"] in kinds), key=lambda e: e["ts"])
        self.calls = [e for e in events if e["cat"] in ("cuda_runtime", "cuda_driver")]
        if not self.on_gpu:
            pytest.skip("the profiler sees nothing of this GPU")

    def waits(self):
        """Calls that return when the GPU has come so far. Those that stop the trace come last, when
        it has nothing left to do."""
        end = max(e["ts"] + e["dur"] for e in self.on_gpu)
        names = [e["name"].partition("_v")[0] for e in self.calls if e["ts"] < end]
        return [name for name in names if name.endswith(SYNCHRONIZES) or name == "cudaMemcpy"]

    def copies_to_the_host(self):
        return [e["name"] for e in self.on_gpu if "DtoH" in e["name"]]

    def busy(self):
        """The share of time in which the GPU computed or copied anything."""
        total, until = 0.0, 0.0
        for event in self.on_gpu:
            start, end = event["ts"], event["ts"] + event["dur"]
            total += max(end - max(start, until), 0.0)
            until = max(until, end)
        return total / (self.seconds * 1e6)


def traced(monkeypatch, path, first, count):
    """The Trace, once a run has come so far, of `count` of its steps from the first on."""
    trace = Trace()

    def begin(step):
        if step == first:
            trace.start()
        elif step == first + count:
            trace.stop(path)

    at_each_step(monkeypatch, begin)
    return trace


@pytest.mark.parametrize("task", TASKS)
def test_the_host_waits_for_a_gpu_at_most_twice_a_step(
    task, cuda, make_config, monkeypatch, tmp_path
):
    first, count = 4, 4

    def begin(step):
        counted = first <= step < first + count
        torch.cuda.set_sync_debug_mode("warn" if counted else "default")

    path = tmp_path / "trace.json"
    given = make_config(*BF16, f"task={task}", f"max_steps={first + count}", "save_every=100")
    trace = traced(monkeypatch, path, first, count)
    at_each_step(monkeypatch, begin)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            train(given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [w for w in warned if "called a synchronizing CUDA operation" in str(w.message)]
    assert count <= len(told) <= MOST_WAITS * count, [f"{w.filename}:{w.lineno}" for w in told]
    assert len(trace.waits()) <= MOST_WAITS * count, trace.waits()
    assert len(trace.copies_to_the_host()) <= MOST_WAITS * count, trace.copies_to_the_host()


class InMemory:
    """A loader of batches that are there already."""

    def __init__(self, batches):
        self.batches, self.decoded, self.bad_files = batches, {}, []

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

    def set_epoch(self, epoch):
        """They are the same in each."""

    def skip(self, batches):
        assert not batches


def train_on_made_up_batches(make_config, monkeypatch, clips, layers, steps, pinned):
    """CLIP-ViP B/32 with so many layers, on clips of 12 frames."""
    from bench_train import END, TEXT_LENGTH, WORDS, made_up

    batches = []
    for _ in range(2):
        batch = made_up(clips, "cpu") | {"clip_index": torch.arange(clips)}
        batches.append({k: v.pin_memory() for k, v in batch.items()} if pinned else batch)
    monkeypatch.setattr(state, "training_loader", lambda *given: InMemory(batches))
    monkeypatch.setattr(trainer, "save_state", lambda *given: None)
    assert WORDS < END - 1
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    # 2 means that a text ends at its highest token, so the tokenizer's own end does not matter.
    text |= {"vocab_size": END + 1, "eos_token_id": 2, "max_position_embeddings": 77}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision |= {"image_size": 224, "patch_size": 32, "num_proxies": 4}
    shapes = [
        f"model.config.{tower}_config.{key}={value}"
        for tower, sizes in (("text", text), ("vision", vision))
        for key, value in (sizes | {"num_hidden_layers": layers}).items()
    ]
    shapes += ["model.config.projection_dim=512", f"data.text_length={TEXT_LENGTH}"]
    given = (f"batch_size={clips}", f"max_steps={steps}", "data.num_frames=12")
    return train(make_config(*BF16, "task=omnisource", *shapes, *given))


def test_made_up_batches_can_be_trained_on(make_config, monkeypatch):
    ended = train_on_made_up_batches(make_config, monkeypatch, 2, 1, 2, pinned=False)
    assert ended["step"] == 2


def test_a_gpu_is_busy_in_more_than_95_percent_of_five_steps(
    cuda, make_config, monkeypatch, tmp_path
):
    first, count = 8, 5
    path = tmp_path / "trace.json"
    trace = traced(monkeypatch, path, first, count)
    train_on_made_up_batches(make_config, monkeypatch, 32, 12, first + count, pinned=True)
    assert trace.busy() > 0.95
    assert len(trace.waits()) <= MOST_WAITS * count, trace.waits()


def test_a_gpu_computes_with_what_was_sent_ahead(cuda):
    device, length, sums = torch.device(cuda), 1 << 22, []

    def send(batch):
        return {"x": inputs.send(batch["x"], device)}

    batches = ({"x": torch.full((length,), n)} for n in range(20))
    for _, sent in inputs.sent_ahead(batches, send, device):
        torch.cuda._sleep(10_000_000)  # cycles: the memory must not be written to before it is read
        sums.append(sent.pop("x").sum())
    assert torch.stack(sums).tolist() == [n * length for n in range(20)]


def test_batches_are_copied_to_a_gpu_while_it_computes(cuda, make_config, monkeypatch, tmp_path):
    first, count = 8, 5
    trace = traced(monkeypatch, tmp_path / "trace.json", first, count)
    train_on_made_up_batches(make_config, monkeypatch, 32, 12, first + count, pinned=True)
    kernels = [e for e in trace.on_gpu if e["cat"] == "kernel"]
    computing = {e["args"]["stream"] for e in kernels}
    frames = [e for e in trace.on_gpu if "HtoD" in e["name"] and e["args"]["bytes"] > 1 << 20]
    assert len(frames) >= count - 1
    for copy in frames:
        assert copy["args"]["stream"] not in computing
        end = copy["ts"] + copy["dur"]
        assert any(k["ts"] < end and copy["ts"] < k["ts"] + k["dur"] for k in kernels)


# --- runs that are to be equal --------------------------------------------------------------------


def run(device, arguments, launcher=()):
    """A run in a process of its own; what it says."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    given = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    given |= {"NCCL_DEBUG": "INFO", "TORCH_CPP_LOG_LEVEL": "INFO"}
    if device == "cpu":
        given["CUDA_VISIBLE_DEVICES"] = ""
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "clipvip.training", *map(str, arguments)],
        env=os.environ | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout
    assert f"× {device}" in ended.stdout
    return ended.stdout


def losses_of(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in lines}


def weights_of(out):
    return CLIPViPModel.from_pretrained(out / "last").state_dict()


def assert_same_run(one, other):
    assert losses_of(one) == losses_of(other) and len(losses_of(one)) == 6
    found, wanted = weights_of(one), weights_of(other)
    assert found.keys() == wanted.keys()
    assert [name for name in found if not found[name].equal(wanted[name])] == []


def starts(config, path):
    """What starts a run, by name."""
    arguments = [str(path), f"out={config.out}", "deterministic=true"]
    return {
        "Python": lambda: train(config),
        "python -m clipvip.training": lambda: main(arguments),
        "--dry-run": lambda: main([*arguments, "--dry-run"]),
    }


@pytest.mark.parametrize("start", ["Python", "python -m clipvip.training", "--dry-run"])
def test_cublas_is_told_to_be_deterministic_before_a_gpu_is_used(start, make_config, monkeypatch):
    """A PyTorch without CUDA raises wherever one would be used."""
    told = []
    monkeypatch.setenv(trainer.CUBLAS, "")
    monkeypatch.delenv(trainer.CUBLAS)

    def meet(timeout):
        told.append(os.environ.get(trainer.CUBLAS))
        raise ConfigError("far enough")

    monkeypatch.setattr(trainer.distributed, "start", meet)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", told.append)
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a GPU is used"))
    begin = starts(make_config("deterministic=true"), make_config.path)[start]
    with pytest.raises((ConfigError, SystemExit)):
        begin()
    assert told == [True, ":4096:8"]


def test_a_process_that_has_used_its_gpu_is_not_called_deterministic(make_config, monkeypatch):
    monkeypatch.setenv(trainer.CUBLAS, "")
    monkeypatch.delenv(trainer.CUBLAS)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    with pytest.raises(ConfigError, match="start Python again with CUBLAS_WORKSPACE_CONFIG") as e:
        train(make_config("deterministic=true"))
    assert "\n" not in str(e.value)
    assert trainer.CUBLAS not in os.environ
    monkeypatch.setenv(trainer.CUBLAS, ":16:8")
    assert train(make_config("deterministic=true", "max_steps=1"))["step"] == 1


EXACT = (*BF16, "task=omnisource", "deterministic=true", "save_every=3")
DROPOUT = "model.config.text_config.attention_dropout=0.1"  # so that random states matter


def test_two_deterministic_runs_are_equal_to_the_bit(device, make_config, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for out in (one, other):
        run(device, [make_config.path, *EXACT, DROPOUT, f"out={out}"])
    assert_same_run(one, other)


def test_one_rank_of_ddp_that_is_resumed_is_the_unbroken_run(device, make_config, tmp_path):
    """On a GPU its collectives are NCCL's."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    given = [make_config.path, *EXACT, DROPOUT, "resume=latest"]
    for out in (unbroken, broken):
        said = run(device, [*given, f"out={out}"], torchrun)
        assert device == "cpu" or "NCCL" in said
    # The cosine ends with the run, so it was cut short: what came after its first checkpoint goes.
    (broken / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    assert "steps 4 to 6" in run(device, [*given, f"out={broken}"], torchrun)
    assert_same_run(broken, unbroken)
