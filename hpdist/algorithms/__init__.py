"""The algorithms, one file each. `base` is the contract; a new one needs only its own file."""

from __future__ import annotations

from hpdist.algorithms.adamatch import AdaMatch
from hpdist.algorithms.addons.auxiliary_balanced import ABC
from hpdist.algorithms.addons.base import AddOn, AddOnConfig
from hpdist.algorithms.addons.crest import CReST
from hpdist.algorithms.addons.darp import DARP
from hpdist.algorithms.addons.debiaspl import DebiasPL
from hpdist.algorithms.addons.logit_adjustment import LogitAdjustment
from hpdist.algorithms.addons.reconstruction import Reconstruction
from hpdist.algorithms.base import Algorithm, AlgorithmConfig
from hpdist.algorithms.comatch import CoMatch
from hpdist.algorithms.crmatch import CRMatch
from hpdist.algorithms.dash import Dash
from hpdist.algorithms.defixmatch import DeFixMatch
from hpdist.algorithms.entropy_minimization import EntropyMinimization
from hpdist.algorithms.exchange import StudentOutputs, WeakOutputs
from hpdist.algorithms.fixmatch import FixMatch
from hpdist.algorithms.flexmatch import FlexMatch
from hpdist.algorithms.freematch import FreeMatch
from hpdist.algorithms.ict import ICT
from hpdist.algorithms.ladder import Ladder
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.mean_teacher import MeanTeacher
from hpdist.algorithms.mixmatch import MixMatch
from hpdist.algorithms.noisy_student import NoisyStudent
from hpdist.algorithms.pi_model import PiModel
from hpdist.algorithms.pseudo_label import PseudoLabel
from hpdist.algorithms.refixmatch import ReFixMatch
from hpdist.algorithms.regmixmatch import RegMixMatch
from hpdist.algorithms.remixmatch import ReMixMatch
from hpdist.algorithms.sequencematch import SequenceMatch
from hpdist.algorithms.simmatch import SimMatch
from hpdist.algorithms.softmatch import SoftMatch
from hpdist.algorithms.stored_pseudo_labels import StoredPseudoLabels
from hpdist.algorithms.supervised import Supervised
from hpdist.algorithms.temporal_ensembling import TemporalEnsembling
from hpdist.algorithms.uda import UDA, AnnealedUDA
from hpdist.algorithms.vat import VAT
from hpdist.algorithms.view_request import Views
from hpdist.tasks.base import Task
from hpdist.tasks.classification import Classification
from hpdist.tasks.detection import Detection
from hpdist.tasks.multilabel import Multilabel
from hpdist.tasks.regression import Regression

__all__ = [
    "ABC",
    "DARP",
    "ICT",
    "UDA",
    "VAT",
    "AdaMatch",
    "AddOn",
    "AddOnConfig",
    "Algorithm",
    "AlgorithmConfig",
    "AnnealedUDA",
    "CRMatch",
    "CReST",
    "Classification",
    "CoMatch",
    "Dash",
    "DeFixMatch",
    "DebiasPL",
    "Detection",
    "EntropyMinimization",
    "FixMatch",
    "FlexMatch",
    "FreeMatch",
    "Ladder",
    "LogitAdjustment",
    "LossTerms",
    "MeanTeacher",
    "MixMatch",
    "Multilabel",
    "NoisyStudent",
    "PiModel",
    "PseudoLabel",
    "ReFixMatch",
    "ReMixMatch",
    "Reconstruction",
    "RegMixMatch",
    "Regression",
    "SequenceMatch",
    "SimMatch",
    "SoftMatch",
    "StoredPseudoLabels",
    "StudentOutputs",
    "Supervised",
    "Task",
    "TemporalEnsembling",
    "Views",
    "WeakOutputs",
]
