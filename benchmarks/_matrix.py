"""What ``run.py`` runs: a matrix of models, engines, workloads and loads, and the key of each of its cells."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _workloads import Dataset

MATRICES = Path(__file__).resolve().parent / "matrices"
#: Engines that ``run.py`` starts itself, and those behind a URL.
STARTED = ("plain", "sparsespec", "ngram", "standalone", "eagle3")
SERVED = ("server", "vllm", "vllm-ngram")


@dataclass(frozen=True)
class EngineSpec:
    """An engine of the matrix.

    Attributes:
        engine: ``KIND[:DETAIL]``: ``plain:BACKEND``, ``sparsespec[:POLICY]``, ``ngram``, ``standalone``, ``eagle3``,
            ``server``, ``vllm``, ``vllm-ngram``.
        label: its name in tables; the engine's own unless it has arguments.
        args: further ``sglang.Engine`` arguments.
    """

    engine: str
    label: str = ""
    args: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in (*STARTED, *SERVED):
            raise ValueError(f"engine {self.engine!r}: expected one of {', '.join((*STARTED, *SERVED))}, some with :DETAIL")
        if self.args and not self.label:
            raise ValueError(f"engine {self.engine!r} has args, so it needs a label of its own")
        object.__setattr__(self, "label", self.label or self.engine)

    @property
    def kind(self) -> str:
        """The part before the colon."""
        return self.engine.partition(":")[0]

    @property
    def detail(self) -> str:
        """The part after the colon: attention backend or draft policy; may be empty."""
        return self.engine.partition(":")[2]

    @property
    def policy(self) -> str | None:
        """SPARSESPEC's draft policy, None for other engines."""
        return (self.detail or "pillar") if self.kind == "sparsespec" else None

    @classmethod
    def parse(cls, value: str | dict[str, Any]) -> EngineSpec:
        """From a string, or from an object with ``engine``, ``label`` and ``args``."""
        if isinstance(value, str):
            return cls(value)
        _refuse_unknown(value, cls, "engine")
        return cls(**value)


@dataclass(frozen=True)
class Load:
    """What an engine is given: ``batch`` prompts at once, and how each goes on.

    Attributes:
        requests: how many there are in all. More than ``batch``: whenever one is answered the next is sent, so that the
            batch stays full but for the end, and prefill is timed. 0: ``batch``.
    """

    dataset: Dataset
    batch: int
    output_length: int
    temperature: float = 0.0
    requests: int = 0

    def __post_init__(self) -> None:
        if self.requests and self.requests < self.batch:
            raise ValueError(f"a load of {self.requests} requests cannot have {self.batch} at once")

    @classmethod
    def parse(cls, value: dict[str, Any]) -> Load:
        """From an object with these keys.

        Raises:
            ValueError: an unknown key, a missing one, or no such dataset.
        """
        _refuse_unknown(value, cls, "load")
        missing = [name for name in ("dataset", "batch", "output_length") if name not in value]
        if missing:
            raise ValueError(f"a load has no {' and no '.join(missing)}")
        return cls(**{**value, "dataset": Dataset.parse(value["dataset"])})


@dataclass(frozen=True)
class Matrix:
    """Everything that is run; see ``matrices/`` for examples.

    Attributes:
        models: checkpoint folders or Hugging Face names; may come from the command line.
        output_lengths: ``max_new_tokens`` of every request.
        ignore_eos: whether outputs go on past their end, to their full length; records and tables say so.
        repeats: timed runs of each cell.
        interleave: start the engines again for every repeat, in turn, so that drift of the machine hits all alike.
        resident: start all engines of a model together, once, and let them give samples in turn: interleaved repeats
            without the starts. They share the device's memory: on CUDA ``engine_args`` must set ``max_total_tokens``.
        loads: objects with ``dataset``, ``batch``, ``output_length``, and if wanted ``temperature`` and ``requests``
            (:class:`Load`): what is run, in place of every combination of the four lists.
        k: SPARSESPEC's draft length, unless an engine's ``args`` say otherwise.
        engine_args: ``sglang.Engine`` arguments of all engines.
    """

    engines: tuple[EngineSpec, ...]
    datasets: tuple[Dataset, ...] = ()
    batches: tuple[int, ...] = ()
    output_lengths: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (0.0,)
    about: str = ""
    ignore_eos: bool = False
    repeats: int = 3
    interleave: bool = False
    resident: bool = False
    loads: tuple[Load, ...] = ()
    k: int = 8
    device: str = "cuda"
    dtype: str = "bfloat16"
    load_format: str = "auto"
    prefill_backend: str = "triton"
    engine_args: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        lists = () if self.loads else ("datasets", "batches", "output_lengths", "temperatures")
        for name in ("engines", *lists):
            if not getattr(self, name):
                raise ValueError(f"the matrix has no {name}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.resident:
            self._check_resident()
        labels = [engine.label for engine in self.engines]
        if len(set(labels)) < len(labels):
            raise ValueError(f"engines need labels of their own, got {', '.join(labels)}")

    def _check_resident(self) -> None:
        if self.interleave:
            raise ValueError("resident engines are not started again for every repeat: turn interleave or resident off")
        served = [engine.label for engine in self.engines if engine.kind in SERVED]
        if served:
            raise ValueError(f"resident is for engines that are started here, not for {', '.join(served)}")
        if self.device == "cuda" and "max_total_tokens" not in self.engine_args:
            raise ValueError(
                "resident engines share the GPU, so --engine-args must set max_total_tokens: each would take what is free"
            )

    @classmethod
    def parse(cls, value: dict[str, Any]) -> Matrix:
        """From the contents of a matrix file.

        Raises:
            ValueError: an unknown or missing key, or a value out of range.
        """
        _refuse_unknown(value, cls, "matrix")
        fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        fields["engines"] = tuple(map(EngineSpec.parse, value.get("engines", ())))
        fields["datasets"] = tuple(map(Dataset.parse, value.get("datasets", ())))
        fields["loads"] = tuple(map(Load.parse, value.get("loads", ())))
        return cls(**fields)


def _refuse_unknown(value: dict[str, Any], kind: type, what: str) -> None:
    known = [item.name for item in dataclasses.fields(kind)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{what} has unknown keys {', '.join(unknown)}; known are {', '.join(known)}")


def load_matrix(name: str) -> dict[str, Any]:
    """The contents of a matrix file, or of the preset of that name.

    Raises:
        ValueError: there is none, or it is not JSON.
    """
    path = Path(name) if name.endswith(".json") else MATRICES / f"{name}.json"
    if not path.is_file():
        presets = ", ".join(sorted(file.stem for file in MATRICES.glob("*.json")))
        raise ValueError(f"no matrix {path}; give a .json file or one of {presets}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


@dataclass(frozen=True)
class Cell:
    """One combination; it is run ``repeats`` times."""

    model: str
    engine: EngineSpec
    load: Load

    @property
    def dataset(self) -> Dataset:
        """Of the load."""
        return self.load.dataset

    @property
    def batch(self) -> int:
        """Of the load."""
        return self.load.batch

    def key(self, matrix: Matrix) -> str:
        """Name of the cell in a results file: what is readable, and a digest of everything else that is set."""
        rest = [self.model, self.engine.engine, self.engine.args, matrix.ignore_eos, matrix.k, matrix.device, matrix.dtype]
        rest += [matrix.load_format, matrix.prefill_backend, matrix.engine_args, matrix.interleave]
        if matrix.resident:
            rest.append("resident")
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]
        batch = f"b{self.batch}" + (f"of{self.load.requests}" if self.load.requests else "")
        load = f"{batch}|o{self.load.output_length}|t{self.load.temperature:g}"
        return f"{Path(self.model).name}|{self.engine.label}|{self.dataset}|{load}|{digest}"

    def sample(self, matrix: Matrix, repeat: int) -> dict[str, Any]:
        """What a record of the cell's ``repeat``-th run begins with."""
        return {
            "key": self.key(matrix),
            "repeat": repeat,
            "dataset": str(self.dataset),
            "batch": self.batch,
            "requests": self.load.requests or self.batch,
            "output_length": self.load.output_length,
            "temperature": self.load.temperature,
        }


def all_loads(matrix: Matrix) -> tuple[Load, ...]:
    """What every engine is given: the matrix's loads, or every combination of its lists."""
    product = itertools.product(matrix.datasets, matrix.batches, matrix.output_lengths, matrix.temperatures)
    return matrix.loads or tuple(itertools.starmap(Load, product))


def cells(matrix: Matrix, model: str, engine: EngineSpec) -> list[Cell]:
    """The cells of one model and engine."""
    return [Cell(model, engine, load) for load in all_loads(matrix)]


@dataclass(frozen=True)
class Job:
    """One engine start (or one server) and the samples it is to give: (cell, repeat)."""

    model: str
    engine: EngineSpec
    samples: tuple[tuple[Cell, int], ...]


def jobs(matrix: Matrix, done: set[tuple[str, int]]) -> Iterator[Job]:
    """Engine starts in the order they are made, without the samples that are ``done``.

    With ``interleave`` every repeat starts every engine again; else an engine gives all its repeats, cell after cell in
    each.
    """
    rounds: Sequence[Sequence[int]] = [range(matrix.repeats)]
    if matrix.interleave:
        rounds = [[repeat] for repeat in range(matrix.repeats)]
    for model, repeats in itertools.product(matrix.models, rounds):
        for engine in matrix.engines:
            wanted = [(cell, repeat) for repeat in repeats for cell in cells(matrix, model, engine)]
            left = tuple((cell, repeat) for cell, repeat in wanted if (cell.key(matrix), repeat) not in done)
            if left:
                yield Job(model, engine, left)


def turns(planned: Sequence[Job], matrix: Matrix) -> Iterator[tuple[int, int]]:
    """(job, sample) in the order in which resident engines run: repeat by repeat and load by load, each engine in turn.

    Each job's samples are in that order already; what one has no more of is left out.
    """
    following = [0] * len(planned)
    for repeat, load in itertools.product(range(matrix.repeats), all_loads(matrix)):
        for index, job in enumerate(planned):
            at = following[index]
            if at < len(job.samples) and (job.samples[at][1], job.samples[at][0].load) == (repeat, load):
                following[index] += 1
                yield index, at
