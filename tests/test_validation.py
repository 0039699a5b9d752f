"""ValidationLoss: the loader cycled for ever; the model, its modes and all randomness untouched."""

import copy
import functools
import pickle
import random
from collections import UserList

import numpy
import pytest
import torch
from support import assert_close, assert_identical, batches, everything, mse, network
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import hypertorch
from hypertorch import ValidationLoss


class Notes(UserList):
    """An object that holds a list: a list itself that a module keeps is put back."""


class Recorder(nn.Module):
    """Remembers the first number of every batch that it sees, and in which mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.seen, self.modes = Notes(), Notes()

    def forward(self, x):
        self.seen.append(x.flatten().tolist())
        self.modes.append(self.training)
        return self.weight * x


def numbers(count=6, **options):
    """Return a loader over the numbers from 0 on, in batches of two."""
    x = torch.arange(count, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x), batch_size=2, **options)


def seen(loss, calls):
    for _ in range(calls):
        loss()
    return loss.model.seen[-calls:]


def test_it_is_the_criterion_on_the_next_batch_in_eval_mode():
    model, data = network(dropout=0.5), batches(2)
    loss = ValidationLoss(model, mse, data)
    twin = copy.deepcopy(model).eval()
    for x, y in (*data, *data):
        assert_identical(loss().detach(), mse(twin(x), y).detach())


def test_its_gradient_is_that_of_the_criterion_with_statistics_as_constants():
    model, data = network(), batches(1)
    loss = ValidationLoss(model, mse, data)
    grads = torch.autograd.grad(loss(), list(model.parameters()))
    model.eval()
    expected = torch.autograd.grad(mse(model(data[0][0]), data[0][1]), list(model.parameters()))
    assert_close(grads, expected)


def test_the_loader_is_cycled_in_its_order():
    loss = ValidationLoss(Recorder(), mse, numbers())
    assert seen(loss, 5) == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]


def test_a_shuffled_loader_shows_every_example_once_per_pass_in_a_new_order():
    loss = ValidationLoss(Recorder(), mse, numbers(40, shuffle=True))
    first, second = ([x for pair in seen(loss, 20) for x in pair] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("training", [True, False])
def test_modes_statistics_gradients_and_randomness_are_untouched(training):
    model = network(dropout=0.5).train(training)
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = ValidationLoss(model, mse, numbers_for(model))
    random.seed(1), numpy.random.seed(1)
    before = everything(model, optimizer)
    for _ in range(5):
        loss()
    assert_identical(before, everything(model, optimizer))


def numbers_for(model):
    data = batches(3)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])

    class Noisy(torch.utils.data.Dataset):
        """Draws from every generator there is, as augmentations do."""

        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            noise = random.random() + numpy.random.rand() + torch.rand(()).item()
            return x[i] + noise, y[i]

    return DataLoader(Noisy(), batch_size=8, shuffle=True)


def test_the_modes_come_back_even_when_the_criterion_fails():
    model = network().train()

    def fails(output, target):
        raise RuntimeError("no criterion")

    loss = ValidationLoss(model, fails, batches(1))
    with pytest.raises(RuntimeError, match="no criterion"):
        loss()
    assert model.training and model[1].training


def test_shuffling_does_not_depend_on_what_training_draws():
    orders = []
    for draws in (0, 17):
        torch.manual_seed(3)
        loss = ValidationLoss(Recorder(), mse, numbers(shuffle=True))
        for _ in range(4):
            torch.rand(draws)
            loss()
        orders.append(loss.model.seen)
    assert orders[0] == orders[1]


def test_shuffling_follows_the_seed():
    orders = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        orders.append(seen(ValidationLoss(Recorder(), mse, numbers(40, shuffle=True)), 20))
    assert orders[0] != orders[1]


OWN = pytest.mark.parametrize("own", ["nothing", "the loader", "the sampler"])


def shuffled(own):
    """With a generator that belongs to one of them."""
    generator = torch.Generator().manual_seed(5)
    options = {
        "nothing": {"shuffle": True},
        "the loader": {"shuffle": True, "generator": generator},
        "the sampler": {"sampler": RandomSampler(range(10), generator=generator)},
    }
    return ValidationLoss(Recorder(), mse, numbers(10, **options[own]))


@OWN
@pytest.mark.parametrize("calls", [0, 1, 4, 5, 6, 13])
def test_a_state_dict_resumes_the_pass_where_it_was(own, calls):
    loss = shuffled(own)
    seen(loss, calls) if calls else None
    state = copy.deepcopy(loss.state_dict())
    expected = seen(loss, 12)
    torch.manual_seed(99)
    again = shuffled(own)
    seen(again, 3)
    before = torch.get_rng_state()
    again.load_state_dict(state)
    assert torch.equal(before, torch.get_rng_state())
    assert seen(again, 12) == expected


@OWN
@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_where_the_original_was(own, through):
    loss = shuffled(own)
    seen(loss, 7)
    twin = through(loss)
    assert twin.model is not loss.model
    assert seen(twin, 12) == seen(loss, 12)


def test_batches_may_be_nested_and_are_moved_to_the_models_device():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.weight * (x["a"] + x["b"][0])

    x = {"a": torch.ones(2), "b": [torch.ones(2)]}
    loss = ValidationLoss(Sum(), mse, [(x, torch.zeros(2))])
    assert loss().item() == 4.0


def test_batches_of_another_form_are_taken_apart_by_whoever_knows_them():
    """Here by keywords; they are moved, and all else is as with pairs."""

    class Scaled(torch.nn.Linear):
        def forward(self, inputs, scale):
            return super().forward(scale * inputs)

    model = Scaled(3, 2)
    torch.manual_seed(0)
    dicts = [{"inputs": torch.randn(4, 3), "scale": 2.0, "y": torch.randn(4, 2)} for _ in range(3)]

    def forward(model, batch):
        return model(batch["inputs"], batch["scale"]), batch["y"]

    loss = ValidationLoss(model, mse, dicts, forward)
    for batch in [*dicts, *dicts]:
        expected = mse(
            torch.nn.functional.linear(2 * batch["inputs"], *model.parameters()), batch["y"]
        )
        assert torch.equal(loss(), expected)


def test_a_loader_that_runs_dry_after_its_first_pass_says_so():
    class Once:
        def __init__(self):
            self.left = [batches(1)[0]]

        def __iter__(self):
            left, self.left = self.left, []
            return iter(left)

    loss = ValidationLoss(network(), mse, Once())
    loss()
    with pytest.raises(hypertorch.ArgumentError, match="`loader` is empty"):
        loss()


def test_within_one_batch_every_call_sees_the_batch_that_the_first_one_drew() -> None:
    model, loader = (
        nn.Linear(1, 1),
        [(torch.full((1, 1), float(i)), torch.zeros(1, 1)) for i in range(4)],
    )
    loss = hypertorch.ValidationLoss(model, lambda prediction, y: prediction.sum(), loader)
    drawn = [loss().item()]
    with loss.one_batch():
        drawn += [loss().item(), loss().item(), loss().item()]
    drawn.append(loss().item())
    expected = [model(torch.full((1, 1), float(i))).item() for i in (0, 1, 1, 1, 2)]
    assert drawn == expected


class Owner:
    """A script that evaluates on the same loader as the outer loss."""

    def __init__(self, loader):
        self.loader = loader

    def evaluate(self):
        return [x.tolist() for x, _ in self.loader]


def test_persistent_workers_serve_the_scripts_own_passes_and_those_of_the_loss_apart():
    loader = numbers(num_workers=1, persistent_workers=True)
    loss, script = ValidationLoss(Recorder(), mse, loader), Owner(loader)
    found = []
    for _ in range(7):
        found += seen(loss, 1)
        assert script.evaluate() == [[0, 1], [2, 3], [4, 5]]
    assert found == [[0, 1], [2, 3], [4, 5]] * 2 + [[0, 1]]
    other = copy.deepcopy(loss)
    assert seen(other, 2) == [[2, 3], [4, 5]]


def test_a_generator_that_others_draw_from_too_is_where_it_was_after_loading():
    def made():
        loader = numbers(shuffle=True, generator=torch.Generator().manual_seed(3))
        return ValidationLoss(Recorder(), mse, loader), Owner(loader)

    loss, script = made()
    for _ in range(4):
        loss()
        script.evaluate()
    state = copy.deepcopy(loss.state_dict())
    expected = [(*seen(loss, 1), script.evaluate()) for _ in range(5)]
    loss, script = made()
    loss.load_state_dict(state)
    assert [(*seen(loss, 1), script.evaluate()) for _ in range(5)] == expected


def test_random_states_are_loaded_from_wherever_a_checkpoint_was_mapped_to():
    """`map_location` moves them too, and generators take them from the host alone."""

    class Elsewhere:
        def __init__(self, tensor):
            self.cpu = lambda: tensor

    def moved(state):
        if isinstance(state, torch.Tensor):
            return Elsewhere(state)
        if isinstance(state, dict):
            return {key: moved(value) for key, value in state.items()}
        return [moved(value) for value in state] if isinstance(state, list) else state

    loader = numbers(shuffle=True, generator=torch.Generator().manual_seed(3))
    loss = ValidationLoss(Recorder(), mse, loader)
    seen(loss, 4)
    state = moved(copy.deepcopy(loss.state_dict()))
    expected = seen(loss, 3)
    loss.load_state_dict(state)
    assert seen(loss, 3) == expected


def test_a_loader_of_ones_own_that_forwards_to_another_is_taken_as_it_is():
    class Forwarding:
        def __init__(self, loader):
            self.loader = loader

        def __getattr__(self, name):
            return getattr(self.loader, name)

        def __iter__(self):
            return iter(self.loader)

    loss = ValidationLoss(
        Recorder(), mse, Forwarding(numbers(num_workers=1, persistent_workers=True))
    )
    assert seen(loss, 2) == [[0, 1], [2, 3]]


class Stateful(nn.Module):
    """An LSTM that goes on from where its last batch ended, as truncated backpropagation does."""

    def __init__(self, detaches=True):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(2, 3), nn.Linear(3, 1)
        self.hidden, self.last, self.detaches = None, None, detaches

    def forward(self, x):
        out, hidden = self.lstm(x, self.hidden)
        self.hidden = tuple(h.detach() for h in hidden) if self.detaches else hidden
        self.last = out[-1].detach()
        return self.head(out)


def stateful_batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 5, 2, generator=generator), torch.randn(4, 5, 1, generator=generator))
        for _ in range(count)
    ]


def test_hidden_states_that_a_model_keeps_are_trainings():
    """With a rule that moves nothing, training is that of the bare optimizer."""
    data, held_out = stateful_batches(12), stateful_batches(13)[12:]
    ends = []
    for wraps in (False, True):
        model = Stateful()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
        if wraps:
            outer_loss = ValidationLoss(model, nn.functional.mse_loss, held_out)
            still, engine = functools.partial(torch.optim.SGD, lr=0.0), hypertorch.FirstOrder()
            optimizer = hypertorch.HyperOptimizer(
                optimizer, model, outer_loss, window=2, update_every=3, engine=engine, outer=still
            )
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        ends.append([*model.hidden, model.last, *(p.detach() for p in model.parameters())])
    assert optimizer.hypergradients is not None
    assert_close(ends[1], ends[0], 1e-5)


def test_hidden_states_before_the_first_batch_are_none_again():
    model = Stateful()
    ValidationLoss(model, nn.functional.mse_loss, stateful_batches(1))()
    assert model.hidden is None and model.last is None


class Counting(nn.Linear):
    """Keeps terms of the loss in a list, what it saw in a dictionary, and counts its calls."""

    def __init__(self):
        super().__init__(2, 1)
        self.terms, self.sizes, self.calls, self.is_begun = [], {}, 0, False

    def forward(self, x):
        self.calls, self.is_begun, self.latest = self.calls + 1, True, len(x)
        out = super().forward(x)
        self.terms.append(1e-3 * out.square().mean())
        self.sizes[self.calls] = len(x)
        return out


def test_numbers_lists_and_dictionaries_that_a_model_keeps_are_trainings():
    model, data = Counting(), stateful_batches(4)
    before = model.terms, model.sizes
    ValidationLoss(model, nn.functional.mse_loss, data)()
    assert (model.terms, model.sizes, model.calls, model.is_begun) == ([], {}, 0, False)
    assert not hasattr(model, "latest")
    bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    outer_loss = ValidationLoss(model, nn.functional.mse_loss, data)
    optimizer = hypertorch.HyperOptimizer(
        bare, model, outer_loss, window=1, update_every=1, engine=hypertorch.FirstOrder()
    )
    for x, y in data:
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x), y) + sum(model.terms)).backward()
        model.terms.clear()
        optimizer.step()
    assert optimizer.hypergradients is not None
    assert (model.calls, model.sizes, model.latest) == (4, dict.fromkeys([1, 2, 3, 4], 4), 4)
    assert model.terms is before[0] and model.sizes is before[1]


class Resetting(nn.Linear):
    """Takes its hidden state in training and drops it in eval mode; makes its lists anew."""

    def __init__(self):
        super().__init__(2, 1)
        self.hidden, self.marks = torch.ones(()), {"mode": "none"}
        self.register_buffer("scale", None)

    def forward(self, x):
        self.marks, self.terms = {"mode": str(self.training)}, []
        self.scale = x.detach().square().mean()
        if not self.training:
            self.hidden = None
        return super().forward(x)


def test_what_a_pass_drops_or_makes_anew_is_as_before():
    model = Resetting()
    hidden, marks = model.hidden, model.marks
    ValidationLoss(model, nn.functional.mse_loss, stateful_batches(1))()
    assert model.hidden is hidden and model.marks is marks and marks == {"mode": "none"}
    assert model.scale is None and not hasattr(model, "terms")


def test_a_hidden_state_with_a_graph_that_is_used_up_is_named():
    model = Stateful(detaches=False)
    outer_loss = ValidationLoss(model, nn.functional.mse_loss, stateful_batches(1))
    bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    engine = hypertorch.FirstOrder()
    optimizer = hypertorch.HyperOptimizer(bare, model, outer_loss, window=1, engine=engine)
    nn.functional.mse_loss(model(stateful_batches(1)[0][0]), torch.zeros(4, 5, 1)).backward()
    with pytest.raises(
        hypertorch.WindowError, match="such as a hidden state: let `forward` detach"
    ):
        optimizer.step()
