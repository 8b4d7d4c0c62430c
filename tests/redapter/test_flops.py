import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from reasonembed.redapter.devices import peak_flops
from reasonembed.redapter.flops import Work
from reasonembed.redapter.step import LocalBatch

LENGTH = 24


def seeing_both_sides(checkpoint):
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager")
    for layer in model.modules():
        if hasattr(layer, "is_causal"):
            layer.is_causal = False  # eager attention computes both halves
    return model


def test_operations_are_those_that_torch_counts(checkpoint):
    model = seeing_both_sides(checkpoint)
    work = Work.of(model, trains_all=True)
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        hidden = model(input_ids=ids).last_hidden_state
        forward = counted.get_total_flops()
        hidden.sum().backward()
        backward = counted.get_total_flops() - forward
    # Rotary embeddings, which the formula leaves out, are a product of vectors as well.
    assert work.forward([LENGTH]) == pytest.approx(forward, rel=0.01)
    assert work.backward([LENGTH]) == pytest.approx(backward, rel=0.01)


def test_adapters_need_no_gradient_of_the_weights_and_causal_attention_is_half(checkpoint):
    model = seeing_both_sides(checkpoint)
    whole = Work.of(model, trains_all=True)
    causal = Work.of(AutoModel.from_pretrained(checkpoint), trains_all=True)
    assert causal.attention == whole.attention / 2
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    work = Work.of(adapted, trains_all=False)
    assert (work.weights, work.attention) == (whole.weights, whole.attention)
    assert whole.backward([5]) - work.backward([5]) == 2 * whole.weights * 5


def test_a_step_passes_rewritten_queries_forward_only():
    work = Work(weights=10, attention=1, trains_all=True)
    step = LocalBatch(queries=[(1,)], rewritten_queries=[(1, 2)], passages=[(1, 2, 3)])
    assert work.step(step) == 3 * (20 + 1) + 3 * (60 + 9) + (40 + 4)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
    ],
)
def test_peaks_of_the_data_sheets(name, tflops):
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA L40S", "NVIDIA A10", "Tesla T4", ""])
def test_other_devices_have_no_peak(name):
    assert peak_flops(name) is None
