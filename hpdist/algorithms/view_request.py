"""The views of a row that an algorithm asks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Views:
    """The views of a row that an algorithm needs; a labelled row always has one weak view."""

    weak: int = 0
    """Weak views of an unlabelled row without gradient: they give the targets."""
    strong: int = 0
    """Strong views of an unlabelled row, with gradient."""
    student_weak: int = 0
    """Further weak views of an unlabelled row, with gradient."""
    strong_labeled: int = 0
    """Strong views of a labelled row, with gradient."""
    labeled_targets: bool = False
    """Whether the labelled rows' weak view also passes without gradient, beside the unlabelled
    rows', for statistics of the labelled global batch."""
    operations: tuple[int, ...] = ()
    """Operations of RandAugment in each strong view of an unlabelled image, if the authors use
    other numbers than the run's; the setting in `views` goes first."""
    teacher: bool = False
    """Whether the targets come from the teacher's weights instead of the student's."""
    inputs_need_targets: bool = False
    """Whether `Algorithm.mix` uses the outputs of the weak views."""
    needs_gradient_probe: bool = False
    """Whether `Algorithm.perturb` runs the student on inputs of its own; it needs targets too."""

    stored_labels: bool = False
    """Whether the loss uses stored labels of the unlabelled rows: `StudentOutputs.context` then
    has the tensors of `hpdist.data.batch.StoredTensors`, their names behind `STORED`."""

    @property
    def uses_unlabeled(self) -> bool:
        """Whether there is any view of an unlabelled row."""
        return self.weak + self.strong + self.student_weak > 0
