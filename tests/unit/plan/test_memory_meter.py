"""The meter counts what tensors hold, to the byte."""

import gc

import pytest
import torch

from hpdist.plan.memory_meter import MemoryMeter

MB = 10**6
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.mark.parametrize("device", DEVICES)
def test_levels_and_peaks_of_each_phase(device):
    before = torch.ones(MB, dtype=torch.uint8, device=device)
    gc.collect()  # what earlier tests have left is not to be freed meanwhile
    with MemoryMeter(torch.device(device)) as meter:
        kept = torch.ones(3 * MB, dtype=torch.uint8, device=device)
        meter.mark("first")
        passing = torch.ones(5 * MB, dtype=torch.uint8, device=device)
        del passing
        meter.mark("second")
        more = torch.ones(2 * MB, dtype=torch.uint8, device=device)
        meter.mark("first")
        del more, kept
        gc.collect()
        meter.mark("end")
    slack = 0.1 * MB
    levels, peaks = meter.levels, meter.peaks
    assert levels["second"] == pytest.approx(3 * MB, abs=slack)
    assert levels["first"] == pytest.approx(5 * MB, abs=slack)  # of its last mark
    assert levels["end"] == pytest.approx(0, abs=slack)
    assert peaks["first"] == pytest.approx(8 * MB, abs=slack)
    assert peaks["second"] == pytest.approx(5 * MB, abs=slack)
    assert (meter.peak, meter.peak_phase) == (peaks["first"], "first")
    assert before.sum() == MB


def test_what_a_backward_pass_allocates_is_counted():
    weight = torch.ones(250_000, requires_grad=True)
    with MemoryMeter(torch.device("cpu")) as meter:
        (weight.exp() * 2).sum().backward()  # on autograd's side: a gradient of a megabyte
        meter.mark("end")
    assert meter.levels["end"] == pytest.approx(MB, abs=1000)
    assert meter.peak >= 2 * MB
