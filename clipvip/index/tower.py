"""CLIP's text tower in NumPy: a sentence to its unit vector, without importing torch.

Importing torch and transformers takes five seconds, and the text tower of a B/32 takes 20 ms. So
search from a shell runs this tower. It computes what `CLIPViPModel.get_text_features` does, in
fp32, from the weights in the model's own file and from a description of the loaded model.

`describe` makes that description from a model that torch has loaded. So nothing is guessed from
configuration files: the tokenizer, activation, heads and end token are those of the model itself.
It then runs the described tower on a few texts and compares. If anything differs, or the files are
unusual, there is no description, and the caller uses the model by torch.

Weights are read with ordinary reads: a file that shrinks meanwhile is an error, while memory that
is mapped to it would end the process.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipvip.sentences import plain

# Texts on which a tower is compared with the model: short, accents, entities, symbols, and longer
# than any model reads. Their tokens include rare ones.
PROBES = (
    "a dog catches a ball",
    "a",
    "Ein Café &amp; «naïve» 北京 🙂 don't 1234!",
    " ".join(f"word{number}" for number in range(120)),
)
AGREEMENT = 1e-5  # largest difference from the model's unit vectors, in fp32
HEADER_BYTES = 100 << 20  # limit that safetensors has too

Linear = Callable[[np.ndarray], np.ndarray]  # [n, C] to [n, D]


class UnusualModel(Exception):
    """A model that this tower does not compute, or whose files it does not read."""


@dataclass(frozen=True)
class Description:
    """What a text tower computes besides its weights.

    tokenizer: tokenizer.json of the loaded tokenizer, as the library tokenizers has it.
    length: number of tokens at which texts are cut off, start and end token included.
    end: token at whose place a text's feature is read; 2 for the highest token, as old models have
        it.
    heads, layers: number of attention heads and of layers.
    activation: "quick_gelu" or "gelu". epsilon: of the layer norms.
    """

    tokenizer: str
    length: int
    end: int
    heads: int
    layers: int
    activation: str
    epsilon: float


class TextTower:
    """A text tower in memory."""

    def __init__(self, description: Description, folder: Path, by_torch: bool = False) -> None:
        """Read the weights of a model folder, except for the tokens' embeddings.

        by_torch: multiply by torch, for processes that use it anyway. NumPy's threads would spin
        for a while after each product, at the cost of torch's.

        Raises UnusualModel if the folder lacks a weight or stores it in an unusual way, and OSError
        if it cannot be read.
        """
        from tokenizers import Tokenizer

        self.description = description
        self.tokenizer = Tokenizer.from_str(description.tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(description.length)
        self._act = _ACTIVATIONS[description.activation]
        self._folder = folder
        self._files = _weight_files(folder)
        names = ["text_model.embeddings.position_embedding.weight", "text_projection.weight"]
        names += _both("text_model.final_layer_norm")
        for layer in range(description.layers):
            names += [name for part in _PARTS for name in _both(_layer(layer) + part)]
        self._weights = self._read(names)
        make = _linear_by_torch if by_torch else _linear
        self._linears = {
            name: make(self._weights.pop(f"{name}.weight"), self._weights.pop(f"{name}.bias"))
            for layer in range(description.layers)
            for name in (_layer(layer) + part for part in _PARTS)
            if "norm" not in name
        }
        width = self._weights["text_projection.weight"].shape[1]
        if width % description.heads:
            raise UnusualModel(f"{width} channels do not divide into {description.heads} heads")

    @property
    def width(self) -> int:
        """Number of values of a vector, P."""
        return self._weights["text_projection.weight"].shape[0]

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, without padding."""
        return self.tokenizer.encode(plain(text)).ids

    def embed(self, text: str) -> np.ndarray:
        """Return the unit vector of a text, float32 [P]; NaN if the weights are damaged."""
        ids = self.tokens(text)
        end = self.description.end
        last = ids.index(max(ids)) if end == 2 else ids.index(end) if end in ids else 0
        features = self._forward(ids[: last + 1])  # later tokens mean nothing to this one
        with np.errstate(all="ignore"):
            return features / np.linalg.norm(features)

    def _forward(self, ids: list[int]) -> np.ndarray:
        """Return the projected feature of the last of `ids`, float32 [P]."""
        weights, count = self._weights, len(ids)
        positions = weights["text_model.embeddings.position_embedding.weight"]
        x = self._embeddings(ids) + positions[:count]
        mask = np.triu(np.full((count, count), -np.inf, np.float32), 1)
        for number in range(self.description.layers):
            name = _layer(number)
            if number == self.description.layers - 1:  # only the last token's output is needed
                x = self._block(name, x, x[-1:], mask[-1:])
            else:
                x = self._block(name, x, x, mask)
        x = self._norm("text_model.final_layer_norm", x[-1:])
        return (x @ weights["text_projection.weight"].T)[0]

    def _block(self, name: str, x: np.ndarray, queries: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the layer's output [m, C] for the tokens `queries` [m, C], which attend to the
        tokens x [n, C] where mask [m, n] is 0."""
        heads = self.description.heads
        normed = self._norm(f"{name}layer_norm1", x)
        asking = normed if queries is x else self._norm(f"{name}layer_norm1", queries)
        q, k, v = (
            self._linears[f"{name}self_attn.{part}_proj"](tokens)
            .reshape(len(tokens), heads, -1)
            .swapaxes(0, 1)
            for part, tokens in (("q", asking), ("k", normed), ("v", normed))
        )
        logits = (q @ k.swapaxes(1, 2)) * np.float32(q.shape[-1] ** -0.5) + mask
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        attended = (shares @ v).swapaxes(0, 1).reshape(len(queries), -1)
        x = queries + self._linears[f"{name}self_attn.out_proj"](attended)
        hidden = self._linears[f"{name}mlp.fc1"](self._norm(f"{name}layer_norm2", x))
        return x + self._linears[f"{name}mlp.fc2"](self._act(hidden))

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred * centred).mean(-1, keepdims=True) + self.description.epsilon)
        scale, shift = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return (centred / deviation * scale + shift).astype(np.float32, copy=False)

    def _read(self, names: list[str]) -> dict[str, np.ndarray]:
        weights = {}
        for file in sorted({self._file_of(name) for name in names}):
            with _opened(file) as stored:
                for name in names:
                    if self._file_of(name) == file:
                        weights[name] = stored.whole(name)
        return weights

    def _embeddings(self, ids: list[int]) -> np.ndarray:
        """Read the rows of the tokens' embeddings that a text needs: float32 [n, C].

        The whole table is most of a small model's text tower.
        """
        name = "text_model.embeddings.token_embedding.weight"
        with _opened(self._file_of(name)) as stored:
            return np.stack([stored.row(name, token) for token in ids])

    def _file_of(self, name: str) -> Path:
        if name not in self._files:
            raise UnusualModel(f"{name} is missing")
        return self._files[name]


def describe(model: Any, processor: Any, folder: Path) -> Description | None:
    """Describe the text tower of a model that torch has loaded from a folder, on the CPU.

    Returns None if the tower that the description and the files make is not the model's.
    """
    import torch

    config, tokenizer = model.config.text_config, processor.tokenizer
    if config.hidden_act not in _ACTIVATIONS or getattr(tokenizer, "split_special_tokens", False):
        return None
    if not (isinstance(config.eos_token_id, int) and getattr(config, "is_causal", True)):
        return None
    description = Description(
        tokenizer.backend_tokenizer.to_str(),
        int(processor.longest_text),
        config.eos_token_id,
        config.num_attention_heads,
        config.num_hidden_layers,
        config.hidden_act,
        config.layer_norm_eps,
    )
    try:
        tower = TextTower(description, folder)
        vectors = np.stack([tower.embed(text) for text in PROBES])
    except (UnusualModel, OSError, ValueError, IndexError):
        return None
    with torch.inference_mode():
        expected = np.stack([_by_torch(model, processor, text) for text in PROBES])
    same_tokens = all(
        tower.tokens(text) == processor(text=text)["input_ids"][0].tolist() for text in PROBES
    )
    agree = same_tokens and bool(np.abs(vectors - expected).max() < AGREEMENT)  # not for NaN
    return description if agree else None


def _by_torch(model: Any, processor: Any, text: str) -> np.ndarray:
    """Return the unit vector of a text by the model, in fp32 whatever its precision."""
    import torch

    tower, projection = model.text_model, model.text_projection
    if model.dtype != torch.float32:
        tower, projection = (deepcopy(part).float() for part in (tower, projection))
    features = projection(tower(**processor(text=text)).pooler_output)[0].numpy()
    return features / np.linalg.norm(features)


def load_description(content: Any) -> Description:
    """Return a description from JSON. Raises ValueError if it is none."""
    kinds = Description.__annotations__
    if not isinstance(content, dict) or set(content) != set(kinds):
        raise ValueError("no description of a text tower")
    for name, kind in kinds.items():
        if type(content[name]) is not kind:
            raise ValueError(f"{name} is {content[name]!r}; expected {kind.__name__}")
    return Description(**content)


def save_description(description: Description) -> dict[str, Any]:
    """Return a description as JSON takes it."""
    return asdict(description)


_PARTS = (
    "layer_norm1",
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)


def _layer(number: int) -> str:
    return f"text_model.encoder.layers.{number}."


def _both(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def _linear(weight: np.ndarray, bias: np.ndarray) -> Linear:
    return lambda x: x @ weight.T + bias


def _linear_by_torch(weight: np.ndarray, bias: np.ndarray) -> Linear:
    import torch
    import torch.nn.functional as F

    w, b = torch.from_numpy(weight), torch.from_numpy(bias)
    ops = torch.ops.mkldnn
    try:
        # For a few tokens, oneDNN is three times as fast with a weight in its own order. These ops
        # are not public, so their result is compared with that of the public product.
        ordered = ops._reorder_linear_weight(w)
        sample = torch.sin(torch.arange(3.0 * w.shape[1])).view(3, -1)
        expected = F.linear(sample, w, b)
        error = (ops._linear_pointwise(sample, ordered, b, "none", [], "") - expected).abs().max()
        if error <= 1e-4 * expected.abs().max():  # not for NaN
            return lambda x: ops._linear_pointwise(
                torch.from_numpy(x), ordered, b, "none", [], ""
            ).numpy()
    except (AttributeError, RuntimeError, TypeError, ValueError):  # absent, or changed
        pass
    return lambda x: F.linear(torch.from_numpy(x), w, b).numpy()


def _quick_gelu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # the exponential of a large number is inf, its share 0
        return x / (1 + np.exp(np.float32(-1.702) * x))


_GRID = np.linspace(-8, 8, 1 << 16)  # steps of 2.4e-4: linear interpolation is exact to 4e-9
_normal: list[np.ndarray] = []


def _gelu(x: np.ndarray) -> np.ndarray:
    """Return x·Φ(x), with Φ interpolated in a table, as NumPy has no error function."""
    if not _normal:
        _normal.append(np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in _GRID]))
    return (x * np.interp(x, _GRID, _normal[0])).astype(np.float32)


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "quick_gelu": _quick_gelu,
    "gelu": _gelu,
}


def _weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of each weight in a folder of transformers, in the order in which it looks.

    Raises UnusualModel if there are no safetensors, OSError if they cannot be read.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        with _opened(whole) as stored:
            return dict.fromkeys(stored.header, whole)
    if not index.is_file():
        raise UnusualModel("no model.safetensors")
    parts = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(parts, dict) or any(Path(str(part)).name != part for part in parts.values()):
        raise UnusualModel("its index names other folders")
    return {name: folder / part for name, part in parts.items()}


class _Stored:
    """The tensors in an open safetensors file, as float32."""

    def __init__(self, file: BinaryIO, header: dict[str, Any], start: int) -> None:
        self.file, self.header, self.start = file, header, start

    def whole(self, name: str) -> np.ndarray:
        dtype, shape, begin = self._place(name)
        return self._numbers(dtype, begin, math.prod(shape)).reshape(shape)

    def row(self, name: str, number: int) -> np.ndarray:
        dtype, (rows, width), begin = self._place(name)
        if not 0 <= number < rows:
            raise UnusualModel(f"token {number} is none of {rows}")
        size = _ITEM_BYTES[dtype]
        return self._numbers(dtype, begin + number * width * size, width)

    def _place(self, name: str) -> tuple[str, list[int], int]:
        """Return dtype, shape and first byte of a tensor."""
        try:
            entry = self.header[name]
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if end - begin != math.prod(shape) * _ITEM_BYTES[dtype] or begin < 0:
                raise UnusualModel(f"{name} has another size than its shape")
        except (KeyError, TypeError, ValueError) as error:
            raise UnusualModel(f"{name} is missing or stored in an unusual way") from error
        return dtype, shape, self.start + begin

    def _numbers(self, dtype: str, begin: int, count: int) -> np.ndarray:
        self.file.seek(begin)
        array = np.empty(count, _STORED_AS[dtype])
        if self.file.readinto(array.data) != array.nbytes:  # type: ignore[attr-defined]
            raise UnusualModel("the file ends early")
        if dtype == "BF16":  # the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32, copy=False)


_STORED_AS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@contextmanager
def _opened(path: Path) -> Iterator[_Stored]:
    """Open a safetensors file. Raises UnusualModel if it is none."""
    with path.open("rb", buffering=0) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > HEADER_BYTES:
            raise UnusualModel("no safetensors")
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError) as error:
            raise UnusualModel("no safetensors") from error
        if not isinstance(header, dict):
            raise UnusualModel("no safetensors")
        yield _Stored(file, header, 8 + size)  # type: ignore[arg-type]
