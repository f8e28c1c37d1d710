"""The views of a row that an algorithm asks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Views:
    """How many views of a row an algorithm asks for; a labelled row is always one weak view."""

    weak: int = 0
    """Weak views of an unlabelled row, seen without gradient: they make the targets."""
    strong: int = 0
    """Strong views of an unlabelled row, seen with gradient."""
    student_weak: int = 0
    """Further weak views of an unlabelled row, seen with gradient."""
    strong_labeled: int = 0
    """Strong views of a labelled row, seen with gradient."""
    labeled_targets: bool = False
    """Whether the labelled rows' weak view is also seen without gradient, beside the unlabelled
    rows': for statistics of the labelled global batch."""
    operations: tuple[int, ...] = ()
    """Operations of RandAugment in each strong view of an unlabelled image, where the authors have
    other numbers than the run's; what the run's views say themselves goes first."""
    teacher: bool = False
    """Whether the targets come from the teacher's weights instead of the student's."""
    inputs_need_targets: bool = False
    """Whether `Algorithm.mix` goes by what was said of the weak views."""
    needs_gradient_probe: bool = False
    """Whether `Algorithm.perturb` asks the student of inputs of its own; needs targets too."""

    @property
    def uses_unlabeled(self) -> bool:
        """Whether there is any view of an unlabelled row."""
        return self.weak + self.strong + self.student_weak > 0
