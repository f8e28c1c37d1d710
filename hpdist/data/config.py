"""The data sections of a run's configuration."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StrictFloat, StrictInt, StrictStr, model_validator

from hpdist.aliases import find_moved
from hpdist.config.section import Section


def _parse_bytes(value: object) -> object:
    """Turn '512MiB' into 536870912; leave anything else to the field's own check."""
    if not isinstance(value, str):
        return value
    digits = value.strip().rstrip("BbIiKkMmGg")
    unit = value.strip()[len(digits) :].upper().removesuffix("B")
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"must be a number of bytes such as 512MiB, not {value!r}") from None


_UNITS = {"": 1, "KI": 2**10, "MI": 2**20, "GI": 2**30, "K": 10**3, "M": 10**6, "G": 10**9}
_NO_STREAM = "needs the labels of all rows first, which a stream does not tell"
Bytes = Annotated[int, BeforeValidator(_parse_bytes), Field(gt=0)]
PythonName = Annotated[str, Field(pattern=r"^python:[\w.]+:[\w.]+$")]


def _parse_path(value: object) -> object:
    """Turn the `pathlib.Path` objects of Python code into text, in lists and by split too."""
    if isinstance(value, dict):
        return {split: _parse_path(part) for split, part in value.items()}
    if isinstance(value, list):
        return [_parse_path(part) for part in value]
    return str(value) if isinstance(value, PurePath) else value


PathText = Annotated[str, BeforeValidator(_parse_path)]
DataFiles = Annotated[
    str | list[str] | dict[str, str | list[str]] | None, BeforeValidator(_parse_path)
]


class Source(Section):
    """A dataset, named as `datasets.load_dataset` names it."""

    path: PathText
    """Hub id, local folder or file, folder of `save_to_disk`, or a builder such as `parquet`."""
    name: str | None = None
    """The dataset's configuration, where it has several."""
    data_files: DataFiles = None
    """Files, with wildcards, local or remote; `**` stands for folders of any depth."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the `datasets` builder that reads the files: of CSV `sep`, `decimal`,
    `encoding`, `names`, of JSON `field`, of Parquet `columns`. Files that end in .tsv are read
    with tabs."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    split: str = "train"
    """Which split, or `all`; slices allowed: `train[:90%]`."""
    input: str | Annotated[list[str], Field(min_length=1)] | None = None
    """The column that the model sees; by default the only image column.

    A list of columns of numbers or booleans, one per feature, makes a vector of them.
    """


class LabelColumn(Source):
    """A dataset with labels."""

    label: str | None = None
    """The column of labels; by default the only ClassLabel column, or `label`."""


CHOICES = ("labels_per_class", "indices", "rows")
"""Settings of the labelled rows that use some of them only."""


class LongTail(Section):
    """Class sizes that fall from class to class by the same factor."""

    imbalance: float | None = Field(None, ge=1)
    """How many times more rows the most frequent class has than the rarest (gamma)."""
    imbalance_reversed: bool = False
    """Whether the last class is the most frequent one, in place of the first."""

    only_with_imbalance: ClassVar[tuple[str, ...]] = ("imbalance_reversed",)

    @model_validator(mode="after")
    def _used(self) -> LongTail:
        unused = [setting for setting in self.only_with_imbalance if getattr(self, setting)]
        if unused and self.imbalance is None:
            raise ValueError(f"{unused[0]} is only used with imbalance; leave it out")
        return self


class Labeled(LabelColumn, LongTail):
    """The labelled training rows."""

    labels_per_class: int | None = Field(None, gt=0)
    """Draw this many rows of every class, or with imbalance of the most frequent one."""
    indices: list[int] | None = Field(None, min_length=1)
    """Use exactly these rows of the split."""
    rows: int | None = Field(None, gt=0)
    """Draw this many rows, whatever their class."""
    unlabeled_value: StrictInt | StrictFloat | StrictStr | Literal[False] | None = False
    """What the label column holds in a row without a label, such as -1; null also stands for NaN.

    The rows that it marks become the unlabelled set, in place of data.unlabeled; with false, rows
    without a label are passed over.
    """

    @property
    def marks_unlabeled(self) -> bool:
        """Whether the rows without a label are the unlabelled set."""
        return self.unlabeled_value is not False

    @model_validator(mode="after")
    def _one_choice(self) -> Labeled:
        chosen = [choice for choice in CHOICES if getattr(self, choice) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; keep one")
        if self.imbalance is not None and (self.labels_per_class or 0) < self.imbalance:
            raise ValueError(
                f"imbalance: {self.imbalance:g} needs labels_per_class, at least "
                f"{math.ceil(self.imbalance)}: the rows of the most frequent class"
            )
        return self


class UnlabeledSource(Source, LongTail):
    """Unlabelled rows of one dataset."""

    streaming: bool = False
    """Read the rows as they are needed instead of preparing a local copy first."""
    label: str | None = None
    """The column of labels that imbalance goes by; the training never sees it."""
    rows_per_class: int | None = Field(None, gt=0)
    """With imbalance: rows of the most frequent class; by default as many as there can be."""
    filter: PythonName | None = None
    """A function python:module:name of a row, {column: value}: False leaves the row out."""
    map: PythonName | None = None
    """A function python:module:name from a row to one with another value of the input column."""
    columns: tuple[str, ...] = ()
    """Further columns that filter and map see."""

    only_with_imbalance: ClassVar = (*LongTail.only_with_imbalance, "label", "rows_per_class")

    @model_validator(mode="after")
    def _tail_of_a_table(self) -> UnlabeledSource:
        if self.imbalance is not None and self.streaming:
            raise ValueError(f"imbalance {_NO_STREAM}; set streaming: false")
        return self


class UnlabeledPart(UnlabeledSource):
    """One of several datasets that are mixed."""

    weight: float = Field(1.0, gt=0)
    """Its share of every batch, in proportion to the other parts' weights."""


class Unlabeled(UnlabeledSource):
    """The unlabelled training rows."""

    path: PathText = ""
    """As of any dataset; or else `mix`."""
    mix: list[UnlabeledPart] | None = Field(None, min_length=1)
    """Several datasets, each read in epochs of its own."""
    shuffle_window: Bytes | None = None
    """Memory for shuffling a stream, in bytes, on each rank; more mixes better.

    By default as much as mixes 128 row groups, and at most 512MiB. A large dataset has a row group
    open for every row of a batch; those that do not fit wait in files in TMPDIR.
    """
    max_bad_rows: int = Field(100, ge=0)
    """Rows of an epoch that may be unusable (unreadable, undecodable) before the run stops."""
    audit: bool = False
    """Write down which rows every step consumed, in the run folder's `audit`."""

    pseudo_labels: list[PathText] | None = Field(None, min_length=1)
    """Folders of labels that `hpdist predict` or another program has stored for these rows, as
    Parquet with the rows' ids; algorithm `stored_pseudo_labels` learns from their mean."""

    @model_validator(mode="after")
    def _one_source(self) -> Unlabeled:
        if bool(self.path) == bool(self.mix):
            raise ValueError("give path, or mix with a path for each part, and not both")
        if self.mix and self.imbalance is not None:
            raise ValueError("imbalance is of one dataset; set it in the parts of mix")
        if self.mix and self.pseudo_labels is not None:
            raise ValueError("pseudo_labels go by the ids of one dataset; give path, not mix")
        return self


class Loading(Section):
    """How rows are read and decoded."""

    threads: int = Field(1, ge=1)
    """Threads that decode a batch, where its images are large enough for that to pay."""
    processes: int = Field(0, ge=0)
    """Processes that decode, per rank; worth it where decoding keeps the training waiting."""
    patience: float = Field(300.0, gt=0)
    """Seconds that a server may fail to answer before the run is saved and stops."""
    paths: Literal["own", "any"] | list[str] = "own"
    """Which files rows may name in place of holding their bytes: own, those in the data's own
    folder or on its own server; any, every regular file and server; or further folders and what
    addresses begin with. Rows of objects that Python gives may name any, unless this is a list."""
    most_bytes: Bytes = 256 * 2**20
    """Most bytes of an encoded image or sound, in a row or in the file that it names."""
    most_pixels: int = Field(50_000_000, ge=1)
    """Most pixels of an encoded image, as its header says; a larger one is a bad row."""
    most_unpacked: Bytes = 512 * 2**20
    """Most bytes that a compressed file, or a row group of Parquet in a table, may hold where that
    is more than 64 (a row group: 16) times its size on the disk."""
    most_samples: int = Field(100_000_000, ge=1)
    """Most samples of the sound that a row holds, at the file's own rate, over all channels."""


class Duplicates(Section):
    """Whether test and validation rows are looked for among the rows to train on, at the start."""

    check: Literal["auto", "always", "never"] = "auto"
    """auto compares what lies on this machine and is no larger than most_bytes, and says what it
    left out; always reads all of it, a stream too, before the first step."""
    most_bytes: Bytes = 2**30
    """Most bytes of a set's input columns, uncompressed, that auto reads."""


class Data(Section):
    """What the run trains and measures on."""

    labeled: Labeled
    unlabeled: Unlabeled | None = None
    test: LabelColumn | None = None
    """Measured and reported; never used to choose anything."""
    validation: LabelColumn | None = None
    """Measured during training in place of the test set; the summary names its best step."""
    loading: Loading = Loading()
    duplicates: Duplicates = Duplicates()

    @model_validator(mode="after")
    def _one_unlabeled_set(self) -> Data:
        if self.labeled.marks_unlabeled and self.unlabeled is not None:
            raise ValueError(
                "labeled.unlabeled_value makes the unlabelled set of rows without a label, and "
                "unlabeled names another; leave one of them out"
            )
        return self

    @property
    def unlabeled_rows(self) -> Unlabeled | None:
        """The settings of the unlabelled set, also where it is the labelled table's other rows."""
        if not self.labeled.marks_unlabeled:
            return self.unlabeled
        return Unlabeled(**{name: getattr(self.labeled, name) for name in Source.model_fields})


def __getattr__(name: str) -> object:
    """Find what this module held before."""
    return find_moved(__name__, name)
