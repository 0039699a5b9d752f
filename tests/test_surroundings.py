"""What a pass through a model moves besides s is put back: the same objects, and what they held."""

import copy
import functools
from collections import Counter, OrderedDict, defaultdict, deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hypertorch
from hypertorch.surroundings import ModuleBuffers, leaving_no_trace


class Terms(list):
    """A list of one's own."""


class Sizes(dict):
    """A dictionary of one's own, which takes one entry at a time."""

    def update(self, *others):
        assert not self
        super().update(*others)


def keeping(held):
    """Return a model that keeps something as an attribute."""
    model = nn.Linear(2, 1)
    model.held = held
    return model


#: What a model keeps, and what a pass does to it.
CONTAINERS = {
    "a list": (lambda: [1.0, 2.0], lambda held: held.append(3.0)),
    "a list in a dictionary": (lambda: {"a": [1.0]}, lambda held: held["a"].append(2.0)),
    "a dictionary in a tuple": (lambda: (0, {"a": 1}), lambda held: held[1].clear()),
    "a list in a list in a list": (lambda: [[[1]], 2], lambda held: held[0][0].pop()),
    "a list in a deque": (lambda: deque([[1]]), lambda held: held.pop().append(2)),
    "an OrderedDict": (lambda: OrderedDict(a=1, b=2), lambda held: held.move_to_end("a")),
    "a defaultdict": (lambda: defaultdict(list, a=[1]), lambda held: held["b"].append(2)),
    "a Counter": (lambda: Counter(a=2, b=1), lambda held: held.update("bbb")),
    "a deque": (lambda: deque([1, 2], maxlen=2), lambda held: held.append(3)),
    "a set": (lambda: {1, 2}, lambda held: held.symmetric_difference_update({2, 3})),
    "a list of one's own": (lambda: Terms([1.0]), lambda held: held.append(2.0)),
    "a dictionary of one's own": (lambda: Sizes(a=1), lambda held: held.pop("a")),
}


@pytest.mark.parametrize(("build", "write"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_holds_again_what_it_held(build, write):
    held = build()
    model = keeping(held)
    with leaving_no_trace(model):
        write(held)
        assert held != build()
    assert model.held is held and held == build()
    assert type(held) is type(build()) and [*held] == [*build()]


def test_a_list_within_a_dictionary_is_the_same_one():
    inner = [1.0]
    model = keeping({"a": inner})
    with leaving_no_trace(model):
        inner.append(2.0)
        model.held["a"] = []
    assert model.held["a"] is inner and inner == [1.0]


def test_a_deque_keeps_its_length_and_a_defaultdict_its_default():
    model = keeping([deque([1, 2], maxlen=2), defaultdict(int, a=1)])
    with leaving_no_trace(model):
        model.held[0].append(3)
        model.held[1]["b"] += 1
    assert model.held[0].maxlen == 2 and model.held[1]["c"] == 0


REPLACED = {
    "a tuple of numbers": ((0.0, 1), (0.5, 1)),
    "a set": ({1}, {2}),
    "a frozenset": (frozenset({1}), frozenset()),
    "a deque": (deque([1]), deque()),
    "an OrderedDict": (OrderedDict(a=1), OrderedDict()),
    "a complex number": (1j, 2j),
    "a tuple by None": ((0.0, 1), None),
    "None by a tuple": (None, (0.0, 1)),
    "a name by a set": ("none", {"some"}),
}


@pytest.mark.parametrize(("before", "after"), REPLACED.values(), ids=REPLACED)
def test_what_another_one_took_the_place_of_is_back(before, after):
    model = keeping(before)
    with leaving_no_trace(model):
        model.held = after
    assert model.held is before


@pytest.mark.parametrize("made", [(1, 2.0), deque(), {1}, OrderedDict(), Terms(), 1j], ids=repr)
def test_what_a_pass_keeps_first_is_gone(made):
    model = nn.Linear(2, 1)
    with leaving_no_trace(model):
        model.held = made
    assert not hasattr(model, "held")


def wrapped_in(tensor):
    """Return a tensor in the places where a model may keep it."""
    return {
        "an attribute": tensor,
        "a list": [tensor],
        "a dictionary": {"h": tensor},
        "a tuple in a dictionary": {"h": (0, tensor)},
        "a deque": deque([tensor]),
        "a set": {tensor},
    }


PLACES = list(wrapped_in(None))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "write",
    [
        lambda h: h.mul_(0.5).add_(1),
        lambda h: h.__setitem__(0, 3.0),
        lambda h: h.data.add_(1),
        lambda h: h.resize_(3).fill_(0),
        lambda h: setattr(h, "data", torch.zeros(3)),
    ],
    ids=["in place", "at an index", "through data", "resized", "given other data"],
)
def test_a_tensor_that_is_written_to_has_its_value_again(place, write):
    h = torch.tensor([1.0, 2.0])
    model = keeping(wrapped_in(h)[place])
    with leaving_no_trace(model):
        write(h)
        assert h.tolist() != [1.0, 2.0]
    assert h.tolist() == [1.0, 2.0]


def test_a_counting_tensor_is_the_same_one_and_counts_from_where_it_was():
    count = torch.tensor(3)
    model = keeping(count)
    with leaving_no_trace(model):
        model.held += 1
    assert model.held is count and count.item() == 3


def test_views_of_one_memory_that_is_written_to_agree():
    states = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    model = keeping({"states": states, "last": states[1], "all": states[0].expand(3, 2)})
    with leaving_no_trace(model):
        model.held["last"].zero_()
        states[0] += 1
    assert states.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert model.held["last"].tolist() == [3.0, 4.0]
    assert model.held["all"].tolist() == [[1.0, 2.0]] * 3


@pytest.mark.parametrize("place", PLACES)
def test_the_version_of_a_tensor_that_nobody_writes_to_stays(place):
    h = torch.tensor([1.0, 2.0]).mul_(2)
    model = keeping(wrapped_in(h)[place])
    with leaving_no_trace(model):
        pass
    assert h._version == 1


def test_a_loss_of_before_that_saved_a_kept_tensor_can_still_be_differentiated():
    h = torch.tensor([2.0, 3.0])
    model = keeping({"h": h})
    loss = (model.weight * h).sum()
    with leaving_no_trace(model):
        assert (model.weight * model.held["h"]).sum() == loss
    loss.backward()
    assert model.weight.grad.tolist() == [[2.0, 3.0]]


def test_a_tensor_in_a_graph_stays_in_it():
    model = nn.Linear(2, 1)
    model.held = [3 * model.weight.sum()]
    hidden = model.held[0]
    with leaving_no_trace(model):
        model.held[0] = torch.zeros(())
    assert model.held[0] is hidden
    hidden.backward()
    assert model.weight.grad.tolist() == [[3.0, 3.0]]


def test_parameters_and_modules_in_a_list_stay_as_they_are():
    own, other = nn.Parameter(torch.zeros(1)), nn.Linear(1, 1, bias=False)
    other.count = 0
    model = keeping([own, other])
    model.held.append(model.weight)
    with leaving_no_trace(model), torch.no_grad():
        for weight in (own, other.weight, model.weight):
            weight.fill_(3.0)
        other.count += 1
    assert model.held == [own, other, model.weight] and other.count == 1
    assert [w.flatten().tolist() for w in (own, other.weight, model.weight)] == [[3], [3], [3, 3]]


def test_a_tensor_is_copied_once_wherever_it_is_kept(monkeypatch):
    h, mean, copied = torch.zeros(2), torch.zeros(2), []
    model = nn.Sequential(keeping({"h": h, "mean": mean}), keeping([h, (h, mean)]))
    model.register_buffer("mean", mean)
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda tensor: copied.append(tensor) or clone(tensor))
    with leaving_no_trace(model):
        h += 1
        mean += 1
    copied = [tensor for tensor in copied if tensor.dtype == torch.float32]
    assert len(copied) == 2 and copied[0] is mean and copied[1] is h
    assert h.tolist() == mean.tolist() == [0.0, 0.0]


def test_tensors_that_cannot_be_written_to_are_left_alone():
    sparse = torch.eye(2).to_sparse()
    with torch.inference_mode():
        seen = torch.ones(2)
    model = keeping([torch.ones(1).expand(3), sparse, seen])
    held = list(model.held)
    with leaving_no_trace(model):
        model.held.clear()
    assert all(now is before for now, before in zip(model.held, held, strict=True))


def test_containers_that_hold_themselves_are_put_back():
    terms, notes = [1], {"n": 2}
    terms += [terms, notes]
    notes["terms"] = (terms, notes)
    model = keeping({"notes": notes})
    with leaving_no_trace(model):
        notes["terms"][0].clear()
        notes["n"] = 3
    assert [terms[0], len(terms), notes["n"]] == [1, 3, 2]
    assert terms[1] is terms and terms[2] is notes and notes["terms"][1] is notes


def test_a_container_that_nobody_writes_to_is_not_filled_again():
    class Output(OrderedDict):
        def clear(self):
            raise AssertionError

    model = keeping(Output(a=torch.ones(2)))
    with leaving_no_trace(model):
        pass
    assert [*model.held] == ["a"]


def spoil(held):
    """Write to tensors, and take from and add to containers, at any depth."""
    if isinstance(held, Tensor):
        held += 1
        return
    for part in held.values() if isinstance(held, dict) else held:
        spoil(part)
    if isinstance(held, dict):
        held.pop("a", None)
        held["spoilt"] = 0
    elif not isinstance(held, tuple):
        held.append(held)
        held.rotate() if isinstance(held, deque) else held.reverse()


@given(
    st.recursive(
        st.integers(0, 9).map(torch.tensor),
        lambda parts: st.one_of(
            st.lists(parts, max_size=3),
            st.lists(parts, max_size=3).map(deque),
            st.dictionaries(st.sampled_from("abc"), parts),
            st.tuples(parts, parts),
        ),
    )
)
def test_containers_in_containers_hold_what_they_held(held):
    model, expected = keeping(held), copy.deepcopy(held)
    with leaving_no_trace(model):
        spoil(held)
    assert model.held is held and held == expected


def test_a_buffer_that_a_pass_registers_is_gone():
    model = nn.Sequential(nn.Linear(2, 1))
    with leaving_no_trace(model):
        model[0].register_buffer("mean", torch.zeros(2))
        model[0].register_buffer("mask", torch.ones(2), persistent=False)
        model._buffers["scale"] = torch.ones(())
    assert [*model.buffers()] == [] and not hasattr(model[0], "mean")
    model[0].register_buffer("mean", torch.ones(2))
    model[0]._buffers["mask"] = torch.ones(2)
    assert [*model.state_dict()] == ["0.weight", "0.bias", "0.mean", "0.mask"]


def test_a_buffer_that_a_pass_drops_fills_or_resizes_is_as_before():
    model = nn.Linear(2, 1)
    mean, mask = torch.tensor([1.0, 2.0]), torch.ones(2)
    model.register_buffer("scale", None)
    model.register_buffer("mean", mean)
    model.register_buffer("mask", mask, persistent=False)
    before = ModuleBuffers(model)
    for _ in range(2):
        model.scale = torch.ones(())
        model.mean.resize_(3).zero_()
        del model.mask
        before.restore()
        assert model.scale is None and model.mean is mean and model.mask is mask
        assert mean.tolist() == [1.0, 2.0] and mask._version == 0
        assert [*model.state_dict()] == ["weight", "bias", "mean"]


class Stateful(nn.Module):
    """Keeps a mean of its outputs, here and there; the first pass registers one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.h = nn.Linear(2, 1).double(), torch.zeros(1, dtype=torch.float64)
        self.kept, self.last, self.seen = {"all": [0.0]}, (0.0, 0), deque([0.0], maxlen=2)

    def forward(self, x):
        y = self.linear(x)
        mean = y.detach().mean(0)
        if not hasattr(self, "mean"):
            self.register_buffer("mean", mean.clone())
        self.mean.lerp_(mean, 0.5)
        self.h.lerp_(mean, 0.5)
        self.kept["all"].append(mean.item())
        self.seen.append(mean.item())
        self.last = (self.last[0] + mean.item(), self.last[1] + 1)
        kept = sum(self.kept["all"]) + sum(self.seen) + self.last[0]
        return y - self.h.clone() - self.mean.clone() - 0.1 * kept


def stateful_batches(count):
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return [(draw(4, 2), draw(4, 1)) for _ in range(count)]


def trained(engine):
    """Return the losses of a training whose λ are learned at a rate of 0, or not at all."""
    model, (held_out, *data) = Stateful(), stateful_batches(9)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.01), []
    if engine is not None:
        outer_loss = hypertorch.ValidationLoss(model, nn.functional.mse_loss, [held_out])
        still = functools.partial(torch.optim.SGD, lr=0.0)
        optimizer = hypertorch.HyperOptimizer(
            optimizer, model, outer_loss, window=2, update_every=3, engine=engine, outer=still
        )
    for x, y in data:
        loss = nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        if isinstance(engine, hypertorch.Unroll):
            optimizer.step(loss)
        else:
            loss.backward()
            optimizer.step()
    assert engine is None or optimizer.hypergradients is not None
    assert (model.last[1], len(model.kept["all"])) == (8, 9)
    return losses


@pytest.mark.parametrize("engine", [hypertorch.FirstOrder(), hypertorch.Unroll()], ids=repr)
def test_with_a_rule_that_moves_nothing_training_is_that_of_the_bare_optimizer(engine):
    assert trained(engine) == pytest.approx(trained(None), rel=1e-12)


def test_a_model_that_registers_a_buffer_in_its_first_pass_can_be_replayed():
    class Normed(nn.Linear):
        def forward(self, x):
            if not hasattr(self, "mean"):
                self.register_buffer("mean", x.mean(0))
            self.mean.lerp_(x.mean(0), 0.5)
            return super().forward(x - self.mean.clone())

    model, (held_out, *data) = Normed(2, 1).double(), stateful_batches(4)
    loss = nn.functional.mse_loss
    optimizer = hypertorch.HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.01),
        model,
        hypertorch.ValidationLoss(model, loss, [held_out]),
        window=3,
        update_every=3,
        engine=hypertorch.Replay(),
    )
    for x, y in data:
        optimizer.step(lambda x=x, y=y: loss(model(x), y))
    assert optimizer.hypergradients is not None
