"""The averaged weights: their values, an exchange that leaves no trace, and a resume to the bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from bce3s.config import ModelConfig
from bce3s.models import Recogniser, build_recogniser
from bce3s.weight_average import WeightAverage
from pipelines.types import ConfigError


def recogniser() -> Recogniser:
    torch.manual_seed(0)
    return build_recogniser(ModelConfig(arch="resnet20-cifar", projection_dim=8), 4).to(memory_format=torch.channels_last)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def train_a_little(model: Recogniser, step: int) -> None:
    """New weights, statistics and a new row of the memory."""
    generator = torch.Generator().manual_seed(step)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor += torch.rand(tensor.shape, generator=generator) * 0.02
        elif tensor.dtype == torch.int64:
            tensor += 1
    model.feature_memory.filled_K[step % 4] = True


def test_values_are_those_of_a_plain_loop() -> None:
    model = recogniser()
    average = WeightAverage(model, decay=0.3)
    wanted = {name: value.double() for name, value in snapshot(model).items() if value.is_floating_point()}
    for step, decay in enumerate((0.1, 2 / 11, 0.25, 0.3, 0.3)):
        train_a_little(model, step)
        average.update()
        for name, value in model.state_dict().items():
            if name in wanted:
                wanted[name] = decay * wanted[name] + (1 - decay) * value.double()
    trained = snapshot(model)
    with average.applied():
        for name, value in model.state_dict().items():
            if "feature_memory" in name or name.endswith("num_batches_tracked"):
                assert torch.equal(value, trained[name]), name
            else:
                torch.testing.assert_close(value.double(), wanted[name], rtol=1e-6, atol=1e-6)
    assert wanted["backbone.bn1.running_mean"].abs().sum() > 0


def test_the_exchange_leaves_no_trace() -> None:
    """Same bits at the same addresses afterwards, also after an error; outputs within are those of a network with the averages."""
    model = recogniser().eval()
    average = WeightAverage(model, decay=0.9)
    train_a_little(model, 1)
    average.update()
    train_a_little(model, 2)
    images = torch.randn(2, 3, 32, 32)
    before, addresses = snapshot(model), [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    output = model(images)
    with average.applied():
        within, averages = model(images), snapshot(model)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert addresses == [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    torch.testing.assert_close(model(images), output, rtol=0, atol=0)
    fresh = recogniser().eval()
    fresh.load_state_dict(averages)
    torch.testing.assert_close(within, fresh(images), rtol=0, atol=0)
    assert not torch.allclose(within, output)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_goes_on_after_an_exchange() -> None:
    """The optimizer's references still are the model's weights."""
    model = recogniser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    average = WeightAverage(model, decay=0.9)
    with average.applied():
        pass
    before = snapshot(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    average.update()
    moved = model.classifier.weight.detach() - before["classifier.weight"]
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(average.state_dict()["averages"]["classifier.weight"], before["classifier.weight"] + 0.9 * moved)


def test_a_resumed_average_ends_with_the_same_bits() -> None:
    model = recogniser()
    average = WeightAverage(model, decay=0.99)
    for step in range(2):
        train_a_little(model, step)
        average.update()
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    resumed_model = copy.deepcopy(model)
    resumed = WeightAverage(resumed_model, decay=0.99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(2, 5):
        for each, its_average in ((model, average), (resumed_model, resumed)):
            train_a_little(each, step)
            its_average.update()
    one, two = average.state_dict(), resumed.state_dict()
    assert one["num_updates"] == two["num_updates"] == 5
    assert all(torch.equal(value, two["averages"][name]) for name, value in one["averages"].items())


def test_averages_of_another_network_are_a_sentence() -> None:
    other = WeightAverage(build_recogniser(ModelConfig(arch="resnet20-cifar", projection_dim=8), 5), decay=0.9).state_dict()
    with pytest.raises(ConfigError, match=r"of another network \('classifier.weight'\)"):
        WeightAverage(recogniser(), decay=0.9).load_state_dict(other)


def test_an_update_allocates_and_reads_nothing() -> None:
    model = recogniser()
    average = WeightAverage(model, decay=0.9)
    average.update()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        average.update()
        with average.applied():
            pass
    events = profile.key_averages()
    assert [event.key for event in events if event.key in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")] == []
    assert max(event.self_cpu_memory_usage for event in events) <= 0
