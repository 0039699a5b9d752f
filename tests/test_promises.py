"""Hooks, copies, pickles, param groups: what every user of a torch.optim.Optimizer may rely on."""

import copy
import gc
import operator
import pickle
import weakref
from functools import partial

import pytest
import torch
from support import (
    assert_close,
    assert_identical,
    batches,
    built,
    everything,
    is_open,
    learned,
    mlp,
    mse,
    network,
    train,
    train_plainly,
    weights,
    wrapped,
)
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import hypertorch
from hypertorch import FirstOrder, HyperOptimizer, HypertorchWarning, Replay, Unroll


def setup(name="SGD with momentum", **options):
    model = network(dropout=0.3)
    return model, wrapped(built(name, model), model, **options)


def test_it_is_a_torch_optimizer_with_the_wrapped_ones_groups_state_and_defaults():
    model, optimizer = setup()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state
    assert optimizer.defaults is optimizer.optimizer.defaults
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in model.parameters()
    ]


def test_the_parameters_of_the_groups_stay_the_same_objects_through_windows():
    model, optimizer = setup()
    before = [id(p) for p in model.parameters()]
    train(model, optimizer, batches(5))
    assert [id(p) for p in model.parameters()] == before
    train(model, optimizer, batches(1))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before


@pytest.mark.parametrize("outer", [None, hypertorch.GatedSign], ids=["off", "on"])
@pytest.mark.parametrize("where", ["wrapper", "wrapped"])
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
def test_a_step_hook_runs_once_per_step_in_and_out_of_windows(outer, where, when):
    model = network()
    bare = built("SGD with momentum", model)
    calls = []

    def register(optimizer):
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    if when == "before wrapping":
        register(bare)
    optimizer = wrapped(bare, model, outer=outer)
    if when == "after wrapping":
        register(optimizer if where == "wrapper" else bare)
    train(model, optimizer, batches(7))
    assert calls == ["pre", "post"] * 7


@pytest.mark.parametrize("outer", [None, hypertorch.GatedSign], ids=["off", "on"])
def test_a_global_step_hook_runs_once_per_step(outer):
    model, optimizer = setup(outer=outer)
    calls = []
    hooks = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append(type(o) is HyperOptimizer)),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(type(o) is HyperOptimizer)),
    ]
    # The outer rule is an optimizer too, and global hooks see its steps.
    train(model, optimizer, batches(7))
    for hook in hooks:
        hook.remove()
    assert calls.count(True) == 14
    assert calls.count(False) == (0 if outer is None else 2)


def test_a_step_hook_runs_once_around_a_step_that_a_subclass_adds_to():
    class Counting(HyperOptimizer):
        steps = 0

        def step(self, loss=None, **kwargs):
            self.steps += 1
            return super().step(loss, **kwargs)

    model, calls = network(), []
    optimizer = Counting(
        built("SGD", model), model, lambda: mse(model(batches(1)[0][0]), batches(1)[0][1])
    )
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, batches(3))
    assert optimizer.steps == 3 and calls == ["pre", "post"] * 3


def test_a_profile_shows_the_steps_of_both_optimizers_by_torchs_labels():
    model, optimizer = setup(window=1, update_every=3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, batches(3))
    labels = [event.name for event in profile.events()]
    assert labels.count("Optimizer.step#HyperOptimizer.step") == 3
    assert labels.count("Optimizer.step#GatedSign.step") == 1


@pytest.mark.parametrize("where", ["wrapper", "wrapped"])
def test_hooks_on_saving_and_loading_run_once(where):
    model, optimizer = setup()
    calls = []
    target = optimizer if where == "wrapper" else optimizer.optimizer
    target.register_state_dict_pre_hook(lambda *_: calls.append("pre save"))
    target.register_state_dict_post_hook(lambda *_: calls.append("post save"))
    target.register_load_state_dict_pre_hook(lambda *_: calls.append("pre load"))
    target.register_load_state_dict_post_hook(lambda *_: calls.append("post load"))
    train(model, optimizer, batches(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre save", "post save", "pre load", "post load"]


def test_zero_grad_clears_the_gradients_of_the_live_parameters():
    model, optimizer = setup(outer=None)
    mse(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def goes_on_identically(model, optimizer, twin, copied):
    """Train both along the same batches and compare all of them."""
    torch.manual_seed(5)
    train(model, optimizer, batches(12, seed=4))
    torch.manual_seed(5)
    train(twin, copied, batches(12, seed=4))
    assert_identical(weights(model), weights(twin))
    assert_identical(learned(optimizer), learned(copied))
    assert optimizer.cost == copied.cost


STEPS = pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 9])


@STEPS
@pytest.mark.parametrize("name", ["SGD with momentum", "NAdam"])
def test_a_deepcopy_of_model_and_optimizer_goes_on_identically(steps, name):
    model, optimizer = setup(name)
    train(model, optimizer, batches(steps))
    twin, copied = copy.deepcopy((model, optimizer))
    assert copied.model is twin and copied.optimizer is not optimizer.optimizer
    goes_on_identically(model, optimizer, twin, copied)


@STEPS
def test_a_pickle_of_model_and_optimizer_goes_on_identically(steps):
    model, optimizer = setup("AdamW")
    train(model, optimizer, batches(steps))
    twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    goes_on_identically(model, optimizer, twin, copied)


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_alone_brings_its_own_model(through):
    model, optimizer = setup()
    train(model, optimizer, batches(2))
    if through == "deepcopy":
        copied = copy.deepcopy(optimizer)
    else:
        copied = pickle.loads(pickle.dumps(optimizer))
    assert copied.model is not model
    goes_on_identically(model, optimizer, copied.model, copied)


def test_copying_in_a_window_leaves_no_fast_weight_in_the_copy():
    model, optimizer = setup()
    train(model, optimizer, batches(2))
    assert is_open(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_open(twin)
        assert_identical(weights(model), weights(twin))
        assert all(p.is_leaf and p.requires_grad for p in twin.parameters())
    assert is_open(model)


def test_a_state_dict_of_the_model_in_a_window_holds_the_present_weights():
    model, optimizer = setup("Adam")
    twin = network()
    train(model, optimizer, batches(2))
    assert is_open(model)
    twin.load_state_dict(model.state_dict())
    optimizer.close()
    assert_identical(weights(model), weights(twin))


def test_closing_an_open_window_leaves_ordinary_parameters_with_the_present_weights():
    model, optimizer = setup("Adam")
    params = list(model.parameters())
    train(model, optimizer, batches(2))
    held = weights(model)
    optimizer.close()
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
    assert_identical(weights(model), held)
    optimizer.close()
    train(model, optimizer, batches(3))
    assert optimizer.hypergradients is not None


def test_a_wrapper_that_goes_out_of_use_in_a_window_leaves_ordinary_parameters():
    model = network()
    bare = built("Adam", model)
    params = list(model.parameters())
    optimizer = wrapped(bare, model)
    train(model, optimizer, batches(2))
    held, gone = weights(model), weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
    assert_identical(weights(model), held)
    train_plainly(model, bare, batches(2))
    assert all(bare.state[p]["step"].item() == 4 for p in params)


def test_repr_tells_the_rhythm_what_is_learned_and_the_wrapped_optimizer():
    model = network()
    bare = torch.optim.SGD(model.parameters(), lr=0.25, weight_decay=0.5)
    text = repr(wrapped(bare, model))
    assert text.startswith(
        "HyperOptimizer (window=3, update_every=5, "
        "learned: Setting(lr=0.25), Setting(weight_decay=0.5))\nSGD ("
    )


def test_a_closure_gives_the_same_run_as_its_loss_and_is_called_once():
    (model, optimizer), (twin, other) = setup("Adam"), setup("Adam")
    calls = []

    def closure(x, y):
        calls.append(1)
        return mse(twin(x), y)

    losses = train(model, optimizer, batches(8))
    torch.manual_seed(0)
    returned = [other.step(lambda x=x, y=y: closure(x, y)).item() for x, y in batches(8)]
    assert len(calls) == 8 and losses == returned
    assert_identical(weights(model), weights(twin))
    assert_identical(learned(optimizer), learned(other))


def two_layers():
    model = network()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    return model, first, second


@pytest.mark.parametrize("steps", [0, 2, 3, 4])
def test_a_param_group_added_at_any_step_is_learned_as_the_others_are(steps):
    model, first, second = two_layers()
    optimizer = wrapped(torch.optim.SGD(first, lr=0.1, momentum=0.5, weight_decay=0.01), model)
    train(model, optimizer, batches(steps))
    frozen = [p.detach().clone() for p in second]
    assert_identical([p.detach() for p in second], frozen)
    optimizer.add_param_group({"params": iter(second), "lr": 0.02})
    assert not is_open(model)
    assert optimizer.hyperparameters["lr"]()[1].item() == pytest.approx(0.02, rel=1e-12)
    assert optimizer.param_groups[1]["weight_decay"] == pytest.approx(0.01, rel=1e-12)
    train(model, optimizer, batches(10))
    assert optimizer.hypergradients["lr"].shape == (2,)
    assert (optimizer.hypergradients["lr"] != 0).all()
    assert all((p != q).any() for p, q in zip(second, frozen, strict=True))


def test_an_added_group_may_name_its_parameters():
    model = mlp()
    optimizer = wrapped(torch.optim.SGD(model[0].named_parameters(), lr=0.1), model, learn="lr")
    optimizer.add_param_group({"params": model[2].named_parameters(prefix="2"), "lr": 0.02})
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["weight", "bias"], ["2.weight", "2.bias"]]
    assert all(map(operator.is_, optimizer.param_groups[1]["params"], model[2].parameters()))
    train(model, optimizer, batches(5))
    assert optimizer.hypergradients["lr"].shape == (2,)


def test_an_added_group_trains_as_the_bare_optimizer_trains_it():
    model, first, second = two_layers()
    optimizer = wrapped(torch.optim.SGD(first, lr=0.1, momentum=0.5), model, outer=None)
    twin, first2, second2 = two_layers()
    bare = torch.optim.SGD(first2, lr=0.1, momentum=0.5)
    for group, o in ((second, optimizer), (second2, bare)):
        o.add_param_group({"params": group, "lr": 0.02})
    train(model, optimizer, batches(5))
    train_plainly(twin, bare, batches(5))
    assert_identical(weights(model), weights(twin))


@pytest.mark.parametrize("engine", [Unroll(), FirstOrder(), Replay()], ids=repr)
def test_a_rate_of_zero_that_is_not_learned_stays(engine):
    """A group held still, and one whose decay is learned, train as by the bare optimizer."""
    ends, still = [], partial(torch.optim.SGD, lr=0.0)
    for is_wrapped in (True, False):
        model, first, second = two_layers()
        groups = [{"params": first, "lr": 0.1}, {"params": second, "lr": 0.0}]
        bare = torch.optim.SGD(groups, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(bare, 0.9)
        o = bare
        if is_wrapped:
            o = wrapped(bare, model, learn="weight_decay", engine=engine, outer=still)
        for x, y in batches(8):
            if is_wrapped:
                o.step(lambda m=model, x=x, y=y: mse(m(x), y))
            else:
                train_plainly(model, o, [(x, y)])
            scheduler.step()
        if is_wrapped:
            o.close()
            assert o.hypergradients["weight_decay"][0] != 0
            assert o.hypergradients["weight_decay"][1] == 0
        assert [g["lr"] for g in bare.param_groups] == pytest.approx([0.1 * 0.9**8, 0.0])
        ends.append([p.detach().clone() for p in model.parameters()])
    assert_close(*ends)
    start = network()
    assert_identical(ends[0][2:], [p.detach() for p in start.parameters()][2:])


def test_gradients_are_kept_where_torch_keeps_them_in_plain_steps():
    model, optimizer = setup()
    train(model, optimizer, batches(4))
    assert all(p.grad is not None for p in model.parameters())


def test_in_a_window_a_weight_has_no_accumulated_gradient():
    model, optimizer = setup()
    train(model, optimizer, batches(1))
    assert all(p.grad is None for p in model.parameters())
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@torch.no_grad()
def write(weight):
    weight.mul_(0.5)


def write_to_data(weight):
    weight.data.mul_(0.5)


@pytest.mark.parametrize("halve", [write, write_to_data])
def test_a_weight_written_to_in_a_window_is_what_training_goes_on_from(halve):
    (model, optimizer), twin = setup("Adam"), network(dropout=0.3)
    other = built("Adam", twin)
    data = batches(5)
    train(model, optimizer, data[:2])
    torch.manual_seed(0)
    train_plainly(twin, other, data[:2])
    for m in (model, twin):
        halve(m[0].weight)
    torch.manual_seed(1)
    train(model, optimizer, data[2:3])
    torch.manual_seed(1)
    train_plainly(twin, other, data[2:3])
    assert_close(weights(model), weights(twin))


@pytest.mark.parametrize("halve", [write, write_to_data])
def test_a_weight_written_to_in_a_window_starts_what_is_differentiated(halve):
    model, optimizer = setup("Adam")
    twin = network(dropout=0.3)
    data = batches(3)
    train(model, optimizer, data[:1])
    halve(model[0].weight)
    train(model, optimizer, data[1:2])
    optimizer.close()
    twin.load_state_dict(model.state_dict())
    bare = built("Adam", twin)
    bare.load_state_dict(copy.deepcopy(optimizer.optimizer.state_dict()))
    other = wrapped(bare, twin, window=1)
    torch.manual_seed(1)
    train(model, optimizer, data[2:])
    torch.manual_seed(1)
    train(twin, other, data[2:])
    for name, hypergradient in optimizer.hypergradients.items():
        torch.testing.assert_close(hypergradient, other.hypergradients[name], rtol=1e-9, atol=0.0)


def test_weights_that_are_clipped_after_every_step_are_warned_of_once():
    model, optimizer = setup()
    with pytest.warns(HypertorchWarning, match="for the third time") as caught:
        for batch in batches(20):
            train(model, optimizer, [batch])
            model[0].weight.data.clamp_(-0.5, 0.5)
    assert len(caught) == 1 and caught[0].filename.endswith("support.py")


def test_a_model_can_be_moved_to_where_it_is_in_a_window():
    model, optimizer = setup()
    train(model, optimizer, batches(1))
    model.to("cpu").double().requires_grad_()
    train(model, optimizer, batches(4))
    assert optimizer.hypergradients is not None


def test_everything_that_a_plain_step_touches_is_what_the_bare_step_touches():
    model, twin = network(), network()
    optimizer, other = wrapped(built("AdamW", model), model), built("AdamW", twin)
    train(model, optimizer, batches(4))
    twin.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        other.state[q] = copy.deepcopy(optimizer.state[p])
    for name, h in optimizer.hyperparameters.items():
        other.param_groups[0][name] = h().item()
    train(model, optimizer, batches(1, seed=9))
    train_plainly(twin, other, batches(1, seed=9))
    after, expected = everything(model, optimizer.optimizer), everything(twin, other)
    for part in ("model", "grads", "state"):
        assert_identical(after[part], expected[part], part)


OPEN = [
    *(hypertorch.Unroll(), hypertorch.OneStep(), hypertorch.Forward(), hypertorch.Replay()),
    *(hypertorch.Replay(spacing=None), hypertorch.Evolution(), hypertorch.FiniteDifferences()),
    *(hypertorch.FirstOrder(), hypertorch.Implicit()),
]


@pytest.mark.parametrize("engine", OPEN, ids=repr)
def test_an_optimizer_that_is_dropped_with_its_window_open_hands_everything_back(engine):
    """Also where an engine goes on: it keeps nothing of the optimizer."""
    flash = torch.backends.cuda.flash_sdp_enabled()
    model = network()
    optimizer = wrapped(built("SGD", model), model, engine=engine, learn="weight_decay")
    x, y = batches(1)[0]

    def loss():
        return mse(model(x), y)

    optimizer.step(loss if engine.needs == "closure" else loss())
    assert optimizer._loop.is_window_open
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert not is_open(model)
