"""Tests take the processor for one without bfloat16: what a machine has must not decide them."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def processor_without_bf16():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield
