"""What an input kind is: one object that knows all there is to know of pictures, or of text.

    class Series(InputKind):
        name = "series"
        held = "series of numbers"

        def fits(self, feature):
            return isinstance(feature, datasets.List)

        def make_spec(self, views, rows, context, values):
            return SeriesSpec(length=16)

    register(Series())

A kind finds its column, says how stored values are decoded (an `InputSpec`), settles with the rows
what the config leaves open, and refuses the algorithms that its rows do not allow. Nothing else in
hpdist knows which kinds there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from PIL import Image

from hpdist.config.component import Component, ComponentOf, components, import_object
from hpdist.data.decode.recorded import restored
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.stored_values import Column
from hpdist.data.files.named_files import USUAL_LIMITS, Limits
from hpdist.data.kinds.columns import find_column
from hpdist.data.structures import Structure, tensors_of
from hpdist.errors import ConfigError, DataError

_SHOWN = 8  # numbers of a tensor, in a line of text

Rank: TypeAlias = Literal["certain", "alone", "single", "joined"]


@dataclass(frozen=True)
class Recognised:
    """What a kind sees in a column of a table."""

    rank: Rank
    """How sure it is that the column is the input: certain, whatever stands beside it; alone, where
    nothing else could be the input; single, where no other column is as good; joined, together with
    the others of that rank."""
    held: str
    """What the column holds, in the plural, for messages."""


@dataclass(frozen=True)
class FoundInput:
    """What the model is to see."""

    kind: str
    column: Column
    lines: tuple[str, ...] = ()
    """What was decided, for a person."""


@dataclass(frozen=True)
class Facts:
    """What the rows told of the inputs, where the config does not say."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """JSON by names of the kind's own. The run keeps it, for a resume to find the same."""
    lines: tuple[str, ...] = ()
    """What was decided, for a person."""
    open: bool = False
    """Whether rows of other sets may still change it."""


@dataclass(frozen=True)
class Context:
    """What a kind may go by besides views and rows."""

    model: Any = None
    """The model's config."""
    recorded: Mapping[str, Any] = field(default_factory=dict)
    """The values that the run kept when it began; none of a run that begins."""
    resumed: bool = False
    """Whether a run goes on: what it kept no record of is then as it was before there were any."""
    limits: Limits = USUAL_LIMITS
    """What a row may take to decode."""


class TableOfRows(Protocol):
    """The labelled rows, as a kind sees them."""

    @property
    def dataset(self) -> Any:
        """The columns of the input, a `datasets.Dataset` in Arrow format."""
        ...

    @property
    def column(self) -> Column:
        """The column or columns that the model sees."""
        ...

    @property
    def name(self) -> str:
        """What messages call the set."""
        ...

    @property
    def ids(self) -> Any:
        """The rows in use, int64 [rows], as rows of the split."""
        ...

    def __len__(self) -> int: ...

    def read(self, positions: Any) -> list[Any]:
        """Read the stored values at positions among the rows in use."""
        ...

    def read_split(self, indices: list[int]) -> list[Any]:
        """Read the stored values at rows of the split."""
        ...

    def describe(self, row: int) -> str:
        """Name a row of the split, for messages."""
        ...


class UsesInputs(Protocol):
    """What an algorithm says of the inputs that it uses; `hpdist.Algorithm` does."""

    @property
    def changes_inputs(self) -> bool:
        """Whether it mixes inputs, adds to them or gives them back."""
        ...

    @property
    def views(self) -> Any:
        """Which views it asks for."""
        ...


class InputKind:
    """A kind of input: all that hpdist knows of it.

    A kind of one's own must have a name and `make_spec`, and `fits` or `recognise`; the rest has
    defaults. Its methods are called on every rank, but for `measure` and `measure_sets`, which one
    process calls for all.
    """

    name: ClassVar[str]
    """What views (`input_kind`) and models (`takes`) call it."""
    held: ClassVar[str]
    """What a column of it holds, in the plural, for messages."""
    needs_own_views: ClassVar[bool] = False
    """Whether its rows are decoded by what settings of views for this kind alone say."""
    joins_columns: ClassVar[bool] = False
    """Whether a row's input may be in several columns."""
    folder_column: ClassVar[str | None] = None
    """The column in which `datasets` gives the files of a folder of this kind."""

    def recognise(self, feature: Any) -> Recognised | None:
        """Tell by its type in `datasets` whether a column can be the input without being named."""
        return None

    def begins_like(self, data: bytes) -> bool:
        """Tell whether bytes of a column without a type are of this kind."""
        return False

    def fits(self, feature: Any) -> bool:
        """Tell whether a column of this type can be the input where it is named."""
        return self.recognise(feature) is not None

    def usual(self, feature: Any) -> bool:
        """Tell whether a column of this type is the input where none is named and no other fits."""
        return self.fits(feature)

    def find_columns(
        self,
        features: Any,
        column: Column | list[str] | None,
        where: str,
        exclude: str | None = None,
    ) -> Column:
        """Find the column that the model sees: the one named, or else the only one that can be.

        `features` are those of the set `where`, `exclude` is the column of labels. Raises
        DataError.
        """
        setting = f"{where}.input"
        if isinstance(column, (list, tuple)):
            raise DataError(
                f"{setting}: a list of columns is no {self.held}, which {self.setting} takes; name "
                f"one column of {self.held}, or set views.name: table, or identity"
            )
        return find_column(
            features,
            column,
            setting,
            exclude,
            usual=self.usual,
            fits=self.fits,
            what=self.held,
            taker=self.setting,
        )

    @property
    def setting(self) -> str:
        """Write the setting that asks for this kind, for messages."""
        own = self.name in components("views")
        return f"views.name: {self.name}" if own else f"views.input_kind: {self.name}"

    def default_views(self, options: Mapping[str, Any]) -> Component:
        """Make the views of this kind, with options that were given. Raises ValidationError."""
        own = self.name in components("views")
        named = {"name": self.name} if own else {"name": "identity", "input_kind": self.name}
        return ComponentOf("views").choose({**options, **named})

    def measure(self, views: Any, rows: TableOfRows, context: Context) -> Facts:
        """Find out what the config leaves open, by the labelled rows."""
        return Facts()

    def fill_views(self, views: Any, values: Mapping[str, Any]) -> Any:
        """Put into the views' settings what was found out. Raises ConfigError."""
        return views

    def make_spec(
        self, views: Any, rows: TableOfRows, context: Context, values: Mapping[str, Any]
    ) -> InputSpec:
        """Say how rows are decoded. Raises ConfigError or DataError where that cannot be said."""
        raise NotImplementedError(f"{type(self).__name__} must define make_spec")

    def measure_sets(
        self, spec: InputSpec, facts: Facts, sets: Mapping[str, Any], context: Context
    ) -> Facts:
        """Find out what all sets say, by their names, once they are open."""
        return facts

    def finish(
        self, spec: InputSpec, views: Any, given: Any, values: Mapping[str, Any]
    ) -> tuple[InputSpec, Any, str | None]:
        """Put what all sets said into the spec and the views' settings.

        `given` are these settings before the model filled them in. Also gives what more was taken
        from the model, for a person.
        """
        return spec, views, None

    def is_record(self, found: Mapping[str, Any]) -> bool:
        """Tell whether the values in a run's record can be what this kind put there."""
        return True

    def recorded_spec(self, values: Mapping[str, Any], folder: Path) -> InputSpec:
        """Make the spec again that `InputSpec.record` was written down of.

        `folder` is where `InputSpec.save_files` put what decoding needs. Raises ConfigError where
        the class cannot be imported, and ValueError where the values are not its own.
        """
        own = dict(values)
        kind = import_object(str(own.pop("class", "")))
        if not (isinstance(kind, type) and issubclass(kind, InputSpec)):
            raise ConfigError(f"the input kind {self.name}: {kind!r} is no InputSpec")
        return restored(kind, own)

    def unlabeled_spec(self, spec: InputSpec, views: Any) -> InputSpec:
        """Say how unlabelled rows are decoded, where that is not as labelled ones are."""
        return spec

    def check_columns(self, spec: InputSpec, features: Any, column: Column, where: str) -> None:
        """Raise DataError where another set's columns do not hold what the labelled set's do."""
        return

    def paired_columns(self, spec: InputSpec, features: Any, where: str) -> Sequence[str]:
        """Give the columns that are read with an unlabelled set's own. Raises ConfigError."""
        return ()

    def refuses(self, spec: InputSpec, algorithm: UsesInputs) -> str | None:
        """Say why an algorithm cannot use such rows, and what to do; None where it can."""
        if algorithm.changes_inputs and isinstance(spec.layout, Mapping):
            return changes_refused(algorithm, f"{self.held}, which are tensors by name, do not")
        return None

    def picture_size(self, value: Any, limits: Limits) -> tuple[int, int] | None:
        """Give height and width of a stored value, in pixels before it is resized.

        None of a kind whose rows labels have no place in. Raises ValueError, or what the library
        that opens it raises, where the value cannot be read.
        """
        return None

    def playable_file(self, spec: InputSpec, rows: Structure) -> bytes | None:
        """Give one decoded row, [1, *], as a WAV file, where it can be heard."""
        return None

    def draw(
        self, spec: InputSpec, rows: Structure, shown: Mapping[str, Structure]
    ) -> list[list[Image.Image]] | list[str]:
        """Show views of rows, by the views' names: as pictures of every row, or lines of text."""
        lines = []
        for row in range(len(next(tensors_of(rows)))):
            for name, view in shown.items():
                named = view if isinstance(view, Mapping) else {"": view}
                for part, tensor in named.items():
                    values = tensor[row].flatten()[:_SHOWN].tolist()
                    numbers = " ".join(f"{value:.5g}" for value in values)
                    lines.append(" ".join(filter(None, [f"{name:9}", part, numbers])))
            lines.append("")
        return lines[:-1]


def changes_refused(algorithm: UsesInputs, why: str, way_out: str = "choose") -> str:
    """Write why an algorithm that changes inputs cannot; `why` begins with what does not allow."""
    return (
        f"algorithm.name: {type(algorithm).__name__} mixes inputs, adds to them or gives them "
        f"back, which {why} allow; {way_out} one that does not, such as fixmatch"
    )
