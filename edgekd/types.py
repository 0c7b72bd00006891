"""The nouns of edgekd: frozen data that steps pass to each other. Imports nothing of ours but `outcome`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeAlias

from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import TypeAliasType

from edgekd.outcome import Front, Limit, Matched, Nearest, Pruning, Search
from edgekd.outcome import Status as Status

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# a named alias, since pydantic cannot resolve a recursive one without a name
Json = TypeAliasType("Json", "bool | int | float | str | list[Json] | dict[str, Json] | None")
Arrays: TypeAlias = "Mapping[str, np.ndarray]"  # named inputs or outputs, batch first
# int8: static, calibrated; w8: int8 weights, computed in fp32; dynamic: int8 weights, inputs quantized as they come.
Precision: TypeAlias = Literal["fp32", "fp16", "int8", "w8", "dynamic"]
QuantizationMethod: TypeAlias = Literal["minmax", "percentile", "mse", "equalize", "bias", "rounding"]
Stage: TypeAlias = Literal["teacher", "student", "pruned", "onnx", "quantized", "engine"]
Origin: TypeAlias = Literal["device", "host", "estimate"]
# What the label of a sample is: one class; a 0 or a 1 for each label; a class for each point of a grid; numbers.
LabelForm: TypeAlias = Literal["classes", "flags", "maps", "values"]


class Say(Protocol):
    """Where a step tells what happens: an event name and plain fields, e.g. say("epoch", step="distill", epoch=3)."""

    def __call__(self, event: str, /, **fields: Json) -> None: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor; a string in `shape` is a symbolic dimension, e.g. ("batch", 32, 32, 3)."""

    name: str
    dtype: str  # numpy name: "uint8", "float32", "int64"
    shape: tuple[int | str, ...]
    values: int | None = None  # of ids: how many there are, each in [0, values); None: not ids, or not known


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a decoded image (uint8, height × width × channels) becomes a network's input.

    The image is resized to `size`, divided by 255, then per channel minus `mean` and divided by `std`.
    It belongs to the model, not to the data, so that teacher and student may differ in it.
    """

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # of values in [0, 1], one a channel
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples of one split, as they are stored (no augmentation, no normalisation)."""

    indices: np.ndarray  # int64, positions in the split
    inputs: Arrays  # by input name, first dimension as long as `indices`
    labels: np.ndarray  # int64 class indices, or whatever the task takes, first dimension as long as `indices`


class Split(Protocol):
    """Random access to one part of a data set."""

    def __len__(self) -> int: ...

    def batches(self, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One Batch for each index array, in that order; a streamed split reads ahead with workers."""
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """Train, calibration and test samples that never overlap. Images are uint8, height × width × channels."""

    name: str
    inputs: tuple[TensorSpec, ...]
    classes: tuple[str, ...]  # names of the network's outputs: of classes, of labels, or of values
    train: Split
    calibration: Split  # held out of training; calibration and tuning read it, never `test`
    test: Split
    images: bool  # the one input is an image: it may be augmented as one and normalised inside the graph
    fingerprint: str  # hash of every sample's content, the splits and the classes: equal data, equal string
    notes: tuple[str, ...] = ()  # what was decided while reading: files ignored, images resized, samples left out
    assets: Mapping[str, bytes] = field(default_factory=dict)  # files an app needs to make inputs, e.g. tokenizer.json


@dataclass(frozen=True, slots=True)
class Part:
    """A part as the recipe names it: `name` and the keyword options beside it."""

    name: str
    options: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as the recipe names it. What is None is filled in from the model's own defaults."""

    name: str  # resnet20, timm.NAME, torchvision.NAME or package.module:callable
    options: Mapping[str, Json] = field(default_factory=dict)
    weights: str | None = None  # safetensors, or a checkpoint that loads without running code
    mean: tuple[float, ...] | None = None  # of values in [0, 1], one a channel
    std: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a network is trained; the same for a teacher and a student."""

    epochs: Annotated[int, Ge(1)] = 30
    batch_size: Annotated[int, Ge(2)] = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Gt(0)] = 0.1  # at the peak of the schedule
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9  # of sgd, Nesterov's
    weight_decay: Annotated[float, Ge(0)] = 5e-4  # not applied to biases and normalisation layers
    schedule: Literal["cosine", "onecycle"] = "onecycle"
    warmup_epochs: Annotated[float, Ge(0)] = 1.0  # of cosine
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0  # of the cross-entropy on labels
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.99  # per step; 0 turns the moving average of weights off
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where a measurement at start shows a gain
    threads: Annotated[int, Ge(0)] = 0  # of the CPU; 0: all. Another number gives other last digits
    views: Annotated[int, Ge(0)] = 0  # of distillation: epochs after which augmented views come again; 0: never
    teacher_augment: Literal["input", "output"] = "input"  # output: the teacher sees plain images, its maps are moved
    cache_gb: Annotated[float, Ge(0)] = (
        4.0  # of distillation: disk that kept teacher outputs may take; 0: none are kept
    )
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: where a measurement shows that it pays


@dataclass(frozen=True, slots=True)
class Augment:
    """Random changes to training samples; each is a pure function of (sample, view, seed)."""

    crop_pixels: Annotated[int, Ge(0)] = 0  # pad by so much (reflected), crop at a random place
    flip: bool = False  # mirror left and right, every other epoch
    cutout_pixels: Annotated[int, Ge(0)] = 0  # side of a grey square at a random place
    mixup: Annotated[float, Ge(0)] = 0.0  # α of Beta(α, α), the part of another image mixed in; 1: uniform; 0: none
    seed: int = 0  # apart from the run's seed: runs on the same training samples share what a teacher said


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a network gave for one batch: logits (batch × classes) and features by tap name."""

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)  # batch first, as the module gave them


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One addend of the distillation loss."""

    part: Part
    weight: float = 1.0
    pairs: tuple[tuple[str, str], ...] | None = None  # of a feature loss: (student path, teacher path); None: matched


@dataclass(frozen=True, slots=True)
class Task:
    """What a head of a network is for: its loss on labels, how it is distilled, and how it is judged.

    outputs: a network's output for it is batch × classes, or batch × classes × grid where `dense`.
    """

    name: str
    metric: str  # what the mean of `scores` is called: "accuracy"
    rows: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    # (output, labels) → what losses see: (rows × classes logits, labels of the rows), ignored rows left out
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray]
    # (output, labels) → float64, one for each sample that has something to judge; 1 is perfect, lower is worse
    decisions: Callable[[np.ndarray], np.ndarray]  # output → what is decided, for the agreement of two networks
    # Of a dense task the decisions of a split are kept and not its outputs, which are far larger: there `scores`,
    # `metrics` and `decisions` itself take either.
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]]  # (output, labels) → other figures by name
    check: Callable[[Dataset], None]  # raises DataError where the labels are not what the task takes
    label_loss: LossTerm  # what a network is trained by where there is no teacher
    losses: tuple[LossTerm, ...]  # of outputs: what a student is distilled by where the recipe names none
    beside_layers: tuple[LossTerm, ...] = ()  # in their place where "auto" compares layers; (): it does not
    labels: LabelForm = "classes"  # how data parts read labels for it, and how a bundle prints outputs
    dense: bool = False  # the outputs have a grid behind the classes
    values: bool = False  # the outputs are values, not logits: losses on class logits are refused


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished build in the store: a folder that is never changed again, named by its key."""

    step: str
    key: str
    path: Path
    meta: Mapping[str, Json] = field(default_factory=dict)
    parents: tuple[str, ...] = ()


class Session(Protocol):
    """A loaded model: named arrays in, named arrays out, batch first."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    runtime: str  # name and version, e.g. "onnxruntime 1.32.0"

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """One toolchain as three functions.

    available: None where the toolchain can run here, else the reason why not.
    compile: (onnx file, precision, folder to write into) → the file to load.
    load: (file, threads) → Session.
    """

    name: str
    available: Callable[[], str | None]
    compile: Callable[[Path, Precision, Path], Path]
    load: Callable[[Path, int], Session]
    engine: Callable[[], str] | None = (
        None  # what an engine built here is for (version, GPU); None: ONNX itself is loaded
    )


# ---------------------------------------------------------------- targets


@dataclass(frozen=True, slots=True)
class PowerMode:
    """One power mode of a device with the peaks that hold in it (dense, not sparse)."""

    name: str
    peak_ops_per_s: Mapping[str, float]  # by precision
    bandwidth_bytes_per_s: float
    watts: float | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A board or phone of a platform: facts, each with its source."""

    name: str
    title: str
    memory_bytes: int | None
    modes: tuple[PowerMode, ...]
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class QuantizationRules:
    """What numeric format the runtime turns into integer kernels."""

    activation: Literal["uint8", "int8"]
    activation_symmetric: bool
    weight: Literal["int8"]
    weight_per_channel: bool
    quantize_outputs: bool  # True: every value between operators (ORT QLinear*); False: inputs only (TensorRT)
    quantize_bias: bool  # int32 bias behind a DequantizeLinear
    min_channels: int = 0  # convolutions and linear layers narrower than this stay in float
    lint: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    weight_bits: Literal[7, 8] = 8  # 7: weights in [-64, 64], for kernels that add pairs of products in 16 bits
    sums_16_bit: bool = False  # some CPUs of the platform have only such kernels (x86 without VNNI)


@dataclass(frozen=True, slots=True)
class PruningRules:
    """What widths the runtime's kernels like."""

    channel_multiple: Annotated[int, Ge(1)] = 1  # of the channels of a layer; others take the time of the next one


@dataclass(frozen=True, slots=True)
class Target:
    """A platform: what may be deployed there, as facts read from targets/<name>.toml."""

    name: str
    title: str
    backend: Part
    opset: int
    legacy_opset: int | None  # of the files for older versions of the runtime
    precisions: tuple[Precision, ...]
    quantization: QuantizationRules
    devices: tuple[Device, ...]
    sources: Mapping[str, str]
    pruning: PruningRules = field(default_factory=lambda: PruningRules())


# ---------------------------------------------------------------- measurements and report (schema of report.json)


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int  # samples it was computed from


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds for one batch of one sample, and what they were measured under."""

    p50: float
    p90: float
    p99: float
    mean: float
    n: int
    low: float  # 95 % bootstrap interval of p50
    high: float
    origin: Origin
    device: str
    threads: int
    power_mode: str | None
    rounds: str | None = None  # of a search: the candidate whose own rounds it is from; None: the report's rounds


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two variants timed in turns: ratio = median latency of `candidate` / median latency of `baseline`."""

    candidate: str  # id of a variant
    baseline: str
    ratio: Interval  # n: rounds in which both were timed
    verdict: Literal["faster", "same", "slower", "cannot tell"]  # of the candidate


@dataclass(frozen=True, slots=True)
class Parity:
    """The difference from the stage before it, over `samples` real samples."""

    max_abs: float
    cosine: float
    samples: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a device is expected to take; the roofline is a lower bound, never a measurement."""

    device: str
    mode: str
    lower_bound_ms: float
    predicted_ms: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Budget:
    """What the user allows; None is no limit."""

    max_accuracy_drop: Annotated[float, Ge(0), Le(1)] | None = None  # of the metric, against the teacher; 0.01: a point
    max_latency_ms: Annotated[float, Gt(0)] | None = None
    max_size_bytes: Annotated[int, Gt(0)] | None = None
    max_memory_bytes: Annotated[int, Gt(0)] | None = None  # of `peak_memory_bytes`


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a variant keeps the budget, with a reason for each limit."""

    status: Status
    reasons: tuple[str, ...]
    limits: tuple[Limit, ...] = ()  # in the order of the reasons; none where the budget sets none


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the report. A value that was not measured is None, with the reason under its name in `missing`."""

    id: str
    stage: Stage
    target: str | None
    precision: Precision
    runtime: str | None
    path: str | None  # relative to the run folder
    sha256: str | None
    size_bytes: int | None
    parameters: int | None
    macs: int | None  # multiply-accumulates for one sample
    accuracy: Interval | None  # the report's metric, which is accuracy where samples have one class
    drop: Interval | None  # paired on the same samples, against the teacher
    agreement: float | None  # fraction of decisions (classes, labels, pixels) that are the teacher's
    parity: Parity | None
    latency_ms: Latency | None
    peak_memory_bytes: int | None
    energy_mj: float | None
    estimates: tuple[Estimate, ...]
    verdict: Verdict | None
    missing: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)  # other figures of the task by name: "RMSE"
    candidate: str | None = None  # of a search: the student that it is of


@dataclass(frozen=True, slots=True)
class Training:
    """How the student was trained, in this run or in an earlier one whose result was kept."""

    teachers: tuple[str, ...]  # models; of several the weighted mean
    assistants: tuple[str, ...]  # models in between, each taught by the one before it; the last one taught the student
    losses: tuple[LossTerm, ...]  # of which the weighted sum was minimised
    epochs: int
    seconds: float
    precision: str  # that the student computed in
    recalled: float | None  # part of the teachers' answers that came from the cache; None: no answers are kept


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """What one layer costs where it alone is in integers, on held-out calibration samples."""

    layer: str  # path in the model; of a block, the module around its layers; of a value, the module that makes it
    kind: Literal["layer", "block", "value"]  # block: neighbours measured as one; value: between layers, no weight
    sqnr_db: float | None  # of the outputs: 10 · log10(mean square / mean square of the error); None: no error
    divergence: float  # mean KL(float ‖ quantized) in nats; of a task of values: squared error / variance
    changed: float | None  # part of the decisions that are others; None: the task decides nothing
    expected_drop: float  # of the metric, were the float network's own probabilities true
    drop: Interval | None  # of the metric, on labels; None: there are none
    rest: float | None  # drop with all but this layer in integers; None: not measured
    macs: float  # part of the multiply-accumulates of the whole network
    parameters: int


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Which layers of an int8 variant cost accuracy, and which of them stay in float for it."""

    target: str
    variant: str  # id of the variant with every layer in integers, save those `left`
    samples: int  # held out, that each layer was measured on
    layers: tuple[LayerSensitivity, ...]  # from the input to the output
    float_layers: tuple[str, ...] = ()  # that mixed precision keeps in float
    mixed: str | None = None  # id of the variant with them in float; None: there is none
    whole: float | None = None  # drop of `variant`, measured where that is above zero for certain, else expected
    remaining: float | None = None  # drop of `mixed`
    notes: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)  # layer that `variant` too has in float → why


@dataclass(frozen=True, slots=True)
class Report:
    """The whole outcome of a run: report.json, and all that report.md and report.html show."""

    schema: int
    name: str
    teacher: str  # id of the teacher's variant
    variants: tuple[Variant, ...]
    chosen: Mapping[str, str | None]  # target → id of the variant to deploy, None where none meets the budget
    budget: Budget
    environment: Mapping[str, Json]
    recipe_sha256: str
    timings_s: Mapping[str, float]
    notes: tuple[str, ...] = ()  # what was not done here, and every fallback
    comparisons: tuple[Comparison, ...] = ()  # of latencies measured in the same interleaved rounds
    metric: str = "accuracy"  # what `accuracy` and `drop` of the variants are
    training: Training | None = None  # of the student
    correspondence: tuple[Matched, ...] = ()  # where losses compare layers: one for each head
    pruning: Pruning | None = None  # where the student was cut out of its teacher
    nearest: Mapping[str, Nearest] = field(default_factory=dict)  # by target, where none is chosen
    pareto: tuple[Front, ...] = ()  # one for each target
    search: Search | None = None
    command: str = "compress recipe.toml"  # of edgekd, that makes it again; its targets stand apart
    sensitivity: tuple[Sensitivity, ...] = ()  # one for each target whose int8 was looked into
