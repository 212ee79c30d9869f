"""Small random programs: calls whose arguments are expressions, so that each can be printed, replayed and cut down."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import values

HEADER = "from values import *\nimport flashcoreset as fc\n"


@dataclass(frozen=True)
class Value:
    """An argument, as the text of an expression."""

    text: str

    def source(self, sizes: dict[str, int]) -> str:
        return self.text

    def simpler(self) -> Iterator[Value]:
        return iter(())


def literal(value: Any) -> Value:
    return Value(repr(value))


@dataclass(frozen=True)
class Size(Value):
    """A number that shapes depend on: `text` is a name among the program's sizes, or sums of such, as in "d + 1"."""

    def source(self, sizes: dict[str, int]) -> str:
        return str(eval(self.text, {"min": min, "max": max}, dict(sizes)))


@dataclass(frozen=True)
class Tensor(Value):
    """`values.tensor` of a shape whose entries are numbers or names among the program's sizes."""

    text: str = ""
    shape: tuple[int | str, ...] = ()
    dtype: str = "float32"
    content: str = "normal"
    layout: str = "plain"
    seed: int = 0

    def source(self, sizes: dict[str, int]) -> str:
        lengths = tuple(
            max(0, int(Size(length).source(sizes))) if isinstance(length, str) else length
            for length in self.shape
        )
        name, _, argument = self.content.partition(":")
        content = f"{name}:{Size(argument).source(sizes)}" if argument else name
        return f"tensor({lengths}, {self.dtype!r}, {content!r}, {self.layout!r}, {self.seed})"

    def simpler(self) -> Iterator[Value]:
        if self.layout != "plain":
            yield replace(self, layout="plain")
        if self.content in values.FINITE + values.EXTREME and self.content != "ones":
            yield replace(self, content="ones")
        if self.seed != 0:
            yield replace(self, seed=0)
        for axis, length in enumerate(self.shape):
            if isinstance(length, int):
                for smaller in sorted({0, 1, length // 2, length - 1}):
                    if 0 <= smaller < length:
                        yield replace(self, shape=(*self.shape[:axis], smaller, *self.shape[axis + 1 :]))


def array(
    *shape: int | str, dtype: str = "float32", content: str = "normal", layout: str = "plain", seed: int = 0
):
    return Tensor("", shape, dtype, content, layout, seed)


@dataclass(frozen=True)
class Step:
    """result = target(**arguments); a target that is not called (`attribute`) is read. "problem.g.seed" among the arguments is a field
    of an object that is one."""

    result: str
    target: str
    arguments: dict[str, Value] = field(default_factory=dict)
    positional: int = 0  # so many of the first arguments go without their names
    attribute: bool = False

    def source(self, sizes: dict[str, int]) -> str:
        if self.attribute:
            return f"{self.result} = {self.target}"
        texts = [
            text if i < self.positional else f"{name}={text}"
            for i, (name, text) in enumerate(_sources(self.arguments, sizes).items())
        ]
        return f"{self.result} = {self.target}({', '.join(texts)})"


def _sources(arguments: dict[str, Value], sizes: dict[str, int]) -> dict[str, str]:
    """The texts of arguments, of objects as calls of `fields`."""
    texts: dict[str, str] = {}
    objects: dict[str, dict[str, Value]] = {}
    for name, value in arguments.items():
        owner, _, field = name.partition(".")
        if field:
            texts.setdefault(owner, "")
            objects.setdefault(owner, {})[field] = value
        else:
            texts[name] = value.source(sizes)
    for owner, own in objects.items():
        texts[owner] = f"fields({', '.join(f'{name}={text}' for name, text in _sources(own, sizes).items())})"
    return texts


@dataclass(frozen=True)
class Program:
    sizes: dict[str, int]
    steps: tuple[Step, ...]
    valid: bool = True  # whether a refusal is a fault
    required: frozenset[str] = frozenset()  # names of arguments that cannot be left out

    def source(self) -> str:
        return "\n".join(step.source(self.sizes) for step in self.steps)

    def smaller(self) -> Iterator[Program]:
        """Programs with one part less, the largest first."""
        for i in range(len(self.steps) - 1, 0, -1):
            yield replace(self, steps=self.steps[:i] + self.steps[i + 1 :])
        for i, step in enumerate(self.steps):
            for name in step.arguments:
                if name not in self.required:
                    left = {key: value for key, value in step.arguments.items() if key != name}
                    yield self._with(i, replace(step, arguments=left))
        for name, size in self.sizes.items():
            for less in sorted({1, 2, size // 4, size // 2, size - 1}):
                if 0 < less < size:
                    yield replace(self, sizes={**self.sizes, name: less})
        for i, step in enumerate(self.steps):
            for name, value in step.arguments.items():
                for other in value.simpler():
                    yield self._with(i, replace(step, arguments={**step.arguments, name: other}))

    def _with(self, i: int, step: Step) -> Program:
        return replace(self, steps=(*self.steps[:i], step, *self.steps[i + 1 :]))


def reduce(program: Program, fails: Callable[[Program], bool], tries: int = 300) -> Program:
    """The smallest program that still fails."""
    while tries > 0:
        for smaller in program.smaller():
            tries -= 1
            if fails(smaller):
                program = smaller
                break
            if tries <= 0:
                break
        else:
            break
    return program


# ------------------------------------------------------------------------------------------- hostile arguments

INTS = (0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**33 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
        -(2**31), -(2**63), -(2**63) - 1)  # fmt: skip
NUMBERS = (0.0, -0.0, -1.0, 1.0, 5e-324, 1e-300, 1e-30, 1e-8, 0.5, 1e8, 1e30, 1e300, 1.7976931348623157e308)
OTHERS = ("None", "True", "nan", "inf", "-inf", "1.5", "'1'", "''", "b'x'", "[]", "[1, 2]", "{}", "()", "object()",
          "10**400", "1e400", "2j", "lambda *a, **k: 0", "tensor(())", "tensor((2,))", "scalar(3, 'int64')",
          "scalar(3, 'uint64')", "scalar(0.5, 'float32')", "scalar(nan, 'float64')", "scalar(2, 'torch.int64')",
          "scalar(0.5, 'torch.float16')", "scalar(True, 'torch.bool')", "Awkward('index')", "Awkward('raises')",
          "Awkward('text')", "range(3)", "slice(3)", "type", "...")  # fmt: skip
WORDS = ("''", "'nope'", "'cosine\\0'", "'COSINE'", "'\\ud800'", "'x' * 100000", "Word('cosine')", "b'cosine'",
         "None", "3", "['l1']", "tensor((2,))")  # fmt: skip
DTYPES = ("float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool", "complex64")


def hostile_int(r: random.Random, most: int | None = None) -> Value:
    """`most`: work of larger counts would be carried out."""
    if r.random() < 0.3:
        return Value(r.choice(OTHERS))
    return literal(r.choice([i for i in INTS if most is None or i <= most]))


def hostile_float(r: random.Random) -> Value:
    return (
        Value(r.choice(OTHERS)) if r.random() < 0.4 else literal(r.choice(NUMBERS) * r.choice((1, 1, 1, -1)))
    )


def hostile_word(r: random.Random) -> Value:
    return Value(r.choice(WORDS))


def hostile_any(r: random.Random, trusted: bool = False) -> Value:
    if not trusted and r.random() < 0.5:
        return Value(f"Liar({r.choice(values.LIES)!r})")
    return Value(r.choice(OTHERS))


def hostile_array(r: random.Random, value: Value, trusted: bool = False) -> Value:
    """The array with one thing wrong, or something else in its place. `trusted`: numbers of the call's arrays are indices that are
    not checked, by design, so that no array may lose entries."""
    if not isinstance(value, Tensor) or r.random() < 0.15:
        return hostile_any(r, trusted)  # an array of another size would be too short for the indices
    kind = r.randrange(6)
    if kind == 0 and value.shape:
        axis = r.randrange(len(value.shape))
        more = f"{value.shape[axis]} + 1"
        length = more if trusted else r.choice((0, 1, 2, 3, 5, 17, 40, more, f"{value.shape[axis]} - 1"))
        return replace(value, shape=(*value.shape[:axis], length, *value.shape[axis + 1 :]))
    if kind == 1:
        shape = value.shape
        same, others = ((*shape, 1), (1, *shape)), (shape[1:], shape[::-1], (0,) * len(shape), (2, 2, 2, 2))
        shape = r.choice(same if trusted else same + others)
        return replace(value, shape=shape)
    if kind == 2:
        return replace(value, dtype=r.choice(DTYPES))
    if kind == 3:
        return replace(value, layout=r.choice(values.LAYOUTS + values.HOSTILE_LAYOUTS))
    if trusted:
        return replace(value, layout=r.choice(values.LAYOUTS))
    if value.dtype == "int64":
        return replace(value, content=r.choice(("whole:-1", "whole:2**62", "whole:2**31", "below:100", "bits", "whole:0",
                                                "whole:-2**63", "whole:2**63 - 1", "range")))  # fmt: skip
    return replace(value, content=r.choice(values.FINITE + values.EXTREME))
