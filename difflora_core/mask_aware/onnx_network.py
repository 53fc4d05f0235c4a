"""A face network's ONNX file as a torch module, so that it has gradients.

The graph is run as it stands: names, folded batch norms and the exporter do not matter. This is the
only module that imports onnx, and only when a file is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadWeightsFile, DiffLoRAError
from ..face_crop import TEMPLATE_SIZE
from ..tensor_file import is_finite
from .onnx_ops import OPERATIONS, Attributes

AGAIN = "Get the file again: the download or copy may be incomplete."
MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What comes up where the operations of a file do not fit together."""


@dataclass(frozen=True)
class Kind:
    """What a file has to hold."""

    name: str
    gives: str
    side: int
    """Of the pictures that it takes, in pixels."""
    hint: str
    own_norm: str = ""
    """Name of an operation by which InsightFace tells that a file takes 0..255."""


RECOGNISER = Kind(
    "face recogniser",
    "embedding",
    TEMPLATE_SIZE,
    "Choose a face recogniser, such as glintr100.onnx or w600k_r50.onnx.",
)
LANDMARKS = Kind(
    "landmark network",
    "row of points",
    192,
    "Choose 2d106det.onnx of buffalo_l or antelopev2.",
    "bn_data",
)


@dataclass(frozen=True)
class Step:
    """One operation of the graph."""

    kind: str
    """Its name in ONNX."""
    attributes: Attributes
    inputs: tuple[str, ...]
    """Names of tensors; "" where an optional input is left out."""
    output: str
    last_uses: tuple[str, ...] = ()
    """Inputs that no later step needs."""

    def run(self, values: Sequence[Tensor | None]) -> Tensor:
        return OPERATIONS[self.kind](self.attributes, *values)


class OnnxNetwork(nn.Module):
    """A graph with one input and one output, in float32; its weights move with `to(device)`.

    Whole and single numbers stay on the CPU, where shapes and limits are read from them.
    `takes_bytes`: it is fed 0..255 and normalises that itself, as files made by MXNet do.
    `fields`: what the file tells beside the graph.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        constants: Mapping[str, Tensor],
        picture: str,
        result: str,
        takes_bytes: bool,
        fields: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.picture = picture
        self.takes_bytes = takes_bytes
        self.fields = fields
        self.steps = _with_last_uses(steps, picture, result)
        used = dict.fromkeys(name for step in self.steps for name in step.inputs)
        own = {name: constants[name] for name in used if name in constants}
        self._numbers = {n: t for n, t in own.items() if not (t.ndim and t.is_floating_point())}
        # names in files can hold dots, names of buffers cannot
        names = [name for name in own if name not in self._numbers]
        self._slots = {name: f"weight_{number}" for number, name in enumerate(names)}
        for name, slot in self._slots.items():
            self.register_buffer(slot, own[name])

    def forward(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield every tensor through which all information passes, the result last.

        Those are the places where no other tensor is alive: the ends of residual blocks, but
        nothing inside a block, where its shortcut is alive too.
        """
        alive = {self.picture: pictures}
        for step in self.steps:
            output = step.run([self._value(name, alive) for name in step.inputs])
            alive[step.output] = output
            for name in step.last_uses:
                del alive[name]
            if len(alive) == 1:
                yield output

    def _value(self, name: str, alive: Mapping[str, Tensor]) -> Tensor | None:
        if name in self._slots:
            return self.get_buffer(self._slots[name])
        return alive.get(name, self._numbers.get(name))


def _with_last_uses(steps: Sequence[Step], picture: str, result: str) -> list[Step]:
    """The steps that the result depends on, each with the tensors that are done with after it."""
    computed = {picture, *(step.output for step in steps)}
    needed, kept = {result}, []
    for step in reversed(steps):
        if step.output in needed:
            done = [name for name in dict.fromkeys(step.inputs) if name in computed - needed]
            needed.update(step.inputs)
            kept.append(replace(step, last_uses=tuple(done)))
    return kept[::-1]


def read_onnx(path: Path, kind: Kind) -> OnnxNetwork:
    """The network in a file that takes pictures [N, 3, side, side] and gives one result.

    Errors: BadWeightsFile when it is broken or no such network; DiffLoRAError without onnx.
    """
    model = _load(path)
    graph = model.graph
    picture, result = _ends(path, graph, kind)
    _check_operations(path, graph, kind)
    try:
        steps, constants = _parts(graph)
    except MISFITS as error:
        raise BadWeightsFile(f"{path.name} has a broken part: {error}.", hint=AGAIN) from error
    _check_values(path, steps, constants, picture, result)
    fields = {entry.key: entry.value for entry in model.metadata_props}
    return OnnxNetwork(steps, constants, picture, result, _takes_bytes(graph, kind), fields)


def _takes_bytes(graph: Any, kind: Kind) -> bool:
    """What InsightFace makes of a file, by the names of its first operations.

    References come from InsightFace, so that it has to be followed even where the operations
    themselves say otherwise.
    """
    names = [node.name for node in graph.node[:8]]
    if kind.own_norm and kind.own_norm in names[:3]:
        return True
    starts = ("Sub", "_minus"), ("Mul", "_mul")
    return all(any(name.startswith(start) for name in names) for start in starts)


def _parts(graph: Any) -> tuple[list[Step], dict[str, Tensor]]:
    """The steps of a graph, and its constants by name.

    Steps on constants alone are done at once: casts of weights kept in half precision, say.
    """
    onnx, steps = _onnx(), []
    constants = {one.name: _tensor(onnx, one) for one in graph.initializer}
    for node in graph.node:
        attributes = {a.name: _attribute(onnx, a) for a in node.attribute}
        step = Step(node.op_type, attributes, tuple(node.input), node.output[0])
        if all(name in constants or not name for name in step.inputs):
            constants[step.output] = step.run([constants.get(name) for name in step.inputs])
        else:
            steps.append(step)
    return steps, constants


def _load(path: Path) -> Any:
    """The file as onnx's ModelProto, with weights that lie in files beside it."""
    onnx = _onnx()
    if not path.is_file():
        raise BadWeightsFile(f"There is no file {path}.")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no base of their own
        raise BadWeightsFile(f"{path.name} is no intact ONNX file.", hint=AGAIN) from error
    if not model.graph.node:
        raise BadWeightsFile(f"{path.name} holds no network.", hint=AGAIN)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BadWeightsFile(
            f"{path.name} keeps its weights in another file, which is missing or too short.",
            hint=f"Put that file beside it: {_external(model)}.",
        ) from error
    return model


def _external(model: Any) -> str:
    """Names of the files in which a model keeps weights."""
    entries = (entry for one in model.graph.initializer for entry in one.external_data)
    return ", ".join(sorted({entry.value for entry in entries if entry.key == "location"}))


def _ends(path: Path, graph: Any, kind: Kind) -> tuple[str, str]:
    """Names of input and output. Errors: BadWeightsFile unless they are such a network's."""
    weights = {one.name for one in graph.initializer}
    inputs = [one for one in graph.input if one.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise BadWeightsFile(
            f"{path.name} is no {kind.name}: it has {len(inputs)} inputs and "
            f"{len(graph.output)} outputs, expected one picture and one {kind.gives}.",
            hint=kind.hint,
        )
    shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
    wanted = (3, kind.side, kind.side)
    fits = len(shape) == 4 and all(a in (0, b) for a, b in zip(shape[1:], wanted, strict=True))
    if shape and not fits:
        found = " x ".join(str(n or "any") for n in shape)
        raise BadWeightsFile(
            f"{path.name} takes {found}, expected pictures of 3 x {kind.side} x {kind.side}.",
            hint=kind.hint,
        )
    return inputs[0].name, graph.output[0].name


def _check_operations(path: Path, graph: Any, kind: Kind) -> None:
    kinds = {".".join(filter(None, (node.domain, node.op_type))) for node in graph.node}
    if unknown := sorted(kinds - OPERATIONS.keys()):
        raise BadWeightsFile(
            f"{path.name} uses operations that are not known here: {', '.join(unknown[:3])}.",
            hint=kind.hint,
        )


def _check_values(
    path: Path, steps: Sequence[Step], constants: Mapping[str, Tensor], picture: str, result: str
) -> None:
    """Every tensor that is used comes from somewhere, and all weights are finite."""
    known = {picture, "", *constants}
    for step in steps:
        if missing := [name for name in step.inputs if name not in known]:
            raise BadWeightsFile(f"{path.name} lacks the tensor {missing[0]!r}.", hint=AGAIN)
        known.add(step.output)
    if result not in known - {picture, *constants}:
        raise BadWeightsFile(f"{path.name} never computes its output {result!r}.", hint=AGAIN)
    for name, tensor in constants.items():
        if not is_finite(tensor):
            raise BadWeightsFile(
                f"{path.name} holds numbers that are not finite, in {name!r}.", hint=AGAIN
            )


def _tensor(onnx: Any, proto: Any) -> Tensor:
    """Floats of any width as float32, whole numbers as int64."""
    values = onnx.numpy_helper.to_array(proto)
    return torch.from_numpy(values.astype("int64" if values.dtype.kind in "iub" else "float32"))


def _attribute(onnx: Any, attribute: Any) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return _tensor(onnx, value) if isinstance(value, onnx.TensorProto) else value


def _onnx() -> Any:
    try:
        return import_module("onnx")
    except ImportError as error:
        raise DiffLoRAError(
            f"Reading recognisers needs the package onnx, which cannot be imported ({error}).",
            hint="Install it with: pip install onnx",
        ) from error
