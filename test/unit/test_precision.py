"""Mixed precision: what is chosen, which copy computes, which is updated, and when nothing is."""

import copy
import importlib
import sys
from types import SimpleNamespace

import train_8p
from nmt import checkpoint, devices, distributed, precision
from nmt.errors import run_main

import pytest
import torch
from conftest import REPOSITORY, refused, write_corpus
from torch import nn

CPU = torch.device("cpu")
FAKE_APEX = REPOSITORY / "test" / "simulation" / "fake_apex"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.fixture(autouse=True)
def with_bfloat16(monkeypatch):
    """The tests are the same on every CPU: torch computes in bfloat16 on all of them, if slowly."""
    monkeypatch.setattr(devices, "cpu_gains_from_bfloat16", lambda: True)
    monkeypatch.setattr(devices, "words_about_cpu", lambda *_: set())


@pytest.fixture
def apex(monkeypatch):
    """Puts the fake apex on the path and gives its `amp`."""
    monkeypatch.syspath_prepend(FAKE_APEX)
    yield precision.import_amp()[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


def start(model, level, *, scale=1.0, dtype=torch.bfloat16, backend="native"):
    dtype = torch.float32 if level == "O0" else dtype
    return precision.make_trainer(precision.Choice(level, dtype, scale, backend), model, CPU)


def loss_of(trainer, data):
    """A loss in float32, as the model's is."""
    with trainer.forward_context():
        return (trainer.working_model(data.to(next(trainer.working_model.parameters()).dtype)).float() ** 2).sum()


def one_step(trainer, data, *, factor=1.0, lr=0.1, max_norm=0.0):
    trainer.backward(loss_of(trainer, data) * factor)
    trainer.step(lr, max_norm=max_norm)


# ---------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    ("device_type", "level", "dtype", "loss_scale"),
    [
        ("npu", "O0", torch.float32, 1.0),
        ("npu", "O2", torch.float16, 32.0),
        ("cuda", "O1", torch.float16, 32.0),
        ("cuda", "O3", torch.float16, 1.0),
        ("cpu", "O1", torch.bfloat16, 1.0),
        ("cpu", "O3", torch.bfloat16, 1.0),
    ],
)
def test_each_device_has_its_half_and_its_loss_scale(device_type, level, dtype, loss_scale):
    assert precision.choose(device_type, level) == precision.Choice(level, dtype, loss_scale)


def test_bfloat16_on_cuda_needs_no_loss_scale(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert precision.choose("cuda", "O2", dtype="bfloat16").loss_scale == 1.0
    assert precision.choose("cuda", "O2", dtype="bfloat16", loss_scale="dynamic").loss_scale == "dynamic"


@pytest.mark.parametrize(
    ("device_type", "options", "flag", "reason"),
    [
        ("npu", {"level": "O2", "dtype": "bfloat16"}, "--amp-dtype", "GRU"),
        ("npu", {"level": "O1", "dtype": "bfloat16"}, "--amp-dtype", "GRU"),
        ("cpu", {"level": "O2", "dtype": "float16"}, "--amp-dtype", "ten times"),
        ("cuda", {"level": "O2", "dtype": "bfloat16", "indices": [0, 1]}, "--amp-dtype", "GPU 1 has no"),
        ("cuda", {"level": "O1", "dtype": "bfloat16"}, "--amp-dtype", "autocast"),
        ("npu", {"level": "O3", "loss_scale": 32.0}, "--loss-scale", "32.0, with O3"),
        ("npu", {"level": "O3", "loss_scale": "dynamic"}, "--loss-scale", "dynamic, with O3"),
        ("npu", {"level": "O1", "backend": "apex"}, "--amp-backend", "O2 and O3"),
        ("cpu", {"level": "O2", "backend": "apex"}, "--amp-backend", "on cpu"),
        ("cuda", {"level": "O2", "backend": "apex", "dtype": "bfloat16"}, "--amp-backend", "in float16"),
        ("npu", {"level": "O2", "backend": "apex"}, "--amp-backend", "No module named 'apex'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(monkeypatch, device_type, options, flag, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    refused("usage", precision.choose, device_type, **options, says=[flag, reason])


def test_amp_on_a_cpu_that_is_slow_in_bfloat16_computes_in_float32_and_says_so(monkeypatch):
    monkeypatch.setattr(devices, "cpu_gains_from_bfloat16", lambda: False)
    choice = precision.choose("cpu", "O2")
    assert choice.name == "float32/O0"
    assert "no faster in bfloat16" in choice.note
    insisting = precision.choose("cpu", "O2", dtype="bfloat16")
    assert (insisting.name, insisting.note) == ("bfloat16/O2", "")


def test_a_cpu_with_float16_products_computes_in_it_where_it_is_asked_to(monkeypatch):
    monkeypatch.setattr(devices, "words_about_cpu", lambda: {"avx512_fp16"})
    choice = precision.choose("cpu", "O2", dtype="float16")
    assert (choice.name, choice.loss_scale, choice.backend) == ("float16/O2", 32.0, "native")
    assert precision.choose("cpu", "O2").name == "bfloat16/O2"


# ---------------------------------------------------------------- the levels


def test_o0_is_plain_training(model):
    data, plain = torch.randn(5, 4), copy.deepcopy(model)
    trainer = start(model, "O0")
    assert trainer.working_model is model
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    for _ in range(3):
        one_step(trainer, data)
        optimizer.zero_grad()
        (plain(data) ** 2).sum().backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_o1_keeps_float32_weights_and_computes_in_half(model):
    trainer = start(model, "O1")
    with trainer.forward_context():
        assert trainer.working_model(torch.randn(5, 4)).dtype == torch.bfloat16
    assert trainer.working_model is model


def test_o2_computes_in_half_and_keeps_what_half_cannot_hold(model):
    trainer = start(model, "O2")
    assert trainer.working_model.weight.dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    before = model.weight.detach().clone()
    for _ in range(3):
        one_step(trainer, torch.randn(5, 4), lr=1e-6)
    assert not torch.equal(model.weight, before), "steps too small for bfloat16 add up in the master weights"
    assert trainer.working_model.weight.grad is None
    one_step(trainer, torch.randn(5, 4))
    assert torch.equal(trainer.working_model.weight, model.weight.bfloat16()), "the copy follows the master"
    assert not torch.equal(trainer.working_model.weight, before.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_o3_updates_the_half_weights_and_the_model_follows_when_it_is_asked_for(model, dtype):
    before = model.weight.detach().clone()
    trainer = start(model, "O3", dtype=dtype)
    one_step(trainer, torch.randn(5, 4), max_norm=1.0)
    working = trainer.working_model.weight
    assert working.dtype == trainer.optimizer.state[working]["exp_avg"].dtype == dtype
    assert torch.equal(model.weight, before)
    trainer.refresh_model()
    assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, working.float())


@pytest.mark.parametrize("backend", ["native", "apex"])
def test_each_step_has_the_rate_that_it_is_given(apex, model, backend):
    trainer = start(model, "O2", backend=backend)
    data = torch.randn(5, 4)
    for lr in (0.1, 0.02):
        before = trainer.working_model.weight.detach().float().clone()
        one_step(trainer, data, lr=lr)
        moved = (trainer.working_model.weight.detach().float() - before).abs().max().item()
        assert lr / 2 < moved < 2 * lr, "Adam's first steps move each weight by about the rate"


def test_adam_in_float16_does_not_divide_by_zero_where_there_was_no_gradient(model):
    trainer = start(model, "O3", dtype=torch.float16)
    # As an NPU computes it, operation by operation in half.
    trainer.optimizer.param_groups[0]["fused"] = False
    data = torch.randn(5, 4)
    data[:, 0] = 0.0
    one_step(trainer, data)
    assert all(parameter.isfinite().all() for parameter in trainer.working_model.parameters())


# ---------------------------------------------------------------- O2 against a straightforward implementation


MAX_NORM = 12.0


class ReferenceO2:
    """O2 spelled out: half copies of float32 masters, gradients unscaled and clipped in float32, a step skipped where
    one of them is not finite, and a dynamic scale that such a step halves and so many clean ones double."""

    def __init__(self, model, dtype, scale, growth_interval):
        self.masters = [parameter.detach().clone() for parameter in model.parameters()]
        self.half = copy.deepcopy(model).to(dtype)
        self.optimizer = torch.optim.Adam(self.masters, foreach=False)
        self.is_dynamic = scale == "dynamic"
        self.scale = 65536.0 if self.is_dynamic else scale
        self.growth_interval = growth_interval
        self.clean = self.skipped = self.clipped = 0

    def step(self, data, factor, lr):
        loss = squares(self.half, data) * factor
        self.half.zero_grad()
        (loss * self.scale).backward()
        gradients = [parameter.grad.float() / self.scale for parameter in self.half.parameters()]
        if all(gradient.isfinite().all() for gradient in gradients):
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            self.clipped += bool(norm > MAX_NORM)
            for master, gradient in zip(self.masters, gradients, strict=True):
                master.grad = gradient * torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0)
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(self.half.parameters(), self.masters, strict=True):
                    parameter.copy_(master)
            self.clean += 1
            if self.is_dynamic and self.clean == self.growth_interval:
                self.scale, self.clean = self.scale * 2, 0
        else:
            self.skipped += 1
            if self.is_dynamic:
                self.scale, self.clean = self.scale / 2, 0
        return loss.item()


def squares(half, data):
    """The squared distance to what nothing can learn, so that the gradients stay large, in float32."""
    return ((half(data.to(half[0].weight.dtype)).float() - data[:, :2].sign()) ** 2).sum()


@pytest.mark.parametrize("scale", [32.0, "dynamic"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_o2_is_the_reference_over_fifty_steps_with_two_overflows(monkeypatch, dtype, fused, scale):
    """The fused form rounds the last bit of float32 otherwise, which now and then is one whole bit of a half copy."""
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 10)
    make_optimizer = precision.make_optimizer
    monkeypatch.setattr(precision, "make_optimizer", lambda *args: make_optimizer(*args, fused=fused))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    reference = ReferenceO2(model, dtype, scale, growth_interval=10)
    trainer = precision.make_trainer(precision.Choice("O2", dtype, scale), model, CPU)
    tolerance = 1e-6 if not fused else 1e-4 if dtype == torch.float32 else 3e-2
    scales = set()
    for step in range(50):
        data, lr, factor = torch.randn(6, 4), 0.01 * (1 + step % 3), float("inf") if step in (7, 31) else 1.0
        loss = squares(trainer.working_model, data) * factor
        trainer.backward(loss)
        trainer.step(lr, max_norm=MAX_NORM)
        assert loss.item() == pytest.approx(reference.step(data, factor, lr), rel=tolerance), step
        assert trainer.loss_scale == reference.scale, step
        for parameter, master in zip(model.parameters(), reference.masters, strict=True):
            torch.testing.assert_close(parameter.detach(), master, rtol=tolerance, atol=tolerance / 100 if fused else 0)
        scales.add(reference.scale)
    assert trainer.skipped_steps() == reference.skipped >= 2
    assert 10 < reference.clipped < 40 - reference.skipped, "both happen: gradients that are clipped and others"
    assert len(scales) == 1 if scale == 32.0 else len(scales) >= 3


# ---------------------------------------------------------------- clipping and overflow


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_the_clipped_gradients_are_the_unscaled_ones(model, level):
    """The original clipped what was still scaled: with a scale of 1024 that would leave 1 / 1024 of the norm."""
    trainer = start(model, level, scale=1024.0)
    trainer.optimizer = torch.optim.SGD(model.parameters(), fused=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    one_step(trainer, torch.randn(5, 4), lr=1.0, max_norm=1.0)  # moves by the gradient itself
    moved = torch.stack([(new - old).norm() for new, old in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("scale", [32.0, "dynamic"])
@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
@pytest.mark.parametrize("pairs", [5, 1], ids=["nan", "inf"])
def test_a_step_whose_gradients_overflow_changes_no_weight_and_is_counted(model, level, scale, pairs):
    """Row 45. Infinite gradients of several pairs add up to NaN, those of one stay infinite."""
    trainer = start(model, level, scale=scale)
    before = model.weight.detach().clone()
    one_step(trainer, torch.randn(pairs, 4), factor=float("inf"), max_norm=1.0)
    assert torch.equal(model.weight, before)
    one_step(trainer, torch.randn(5, 4), max_norm=1.0)
    assert not torch.equal(model.weight, before), "the next step is an ordinary one"
    assert trainer.skipped_steps() == 1
    one_step(trainer, torch.randn(5, 4), max_norm=1.0)
    assert trainer.skipped_steps() == 0, "since it was last asked"


def test_overflows_of_single_steps_do_not_end_a_run_however_short_its_epochs_are(model):
    trainer = start(model, "O2", scale=32.0)
    for factor in (float("inf"), float("inf"), 1.0, float("inf"), float("inf")):
        one_step(trainer, torch.randn(5, 4), factor=factor)
        assert trainer.skipped_steps() == (factor != 1.0)
    one_step(trainer, torch.randn(5, 4), factor=float("inf"))
    refused("diverged", trainer.skipped_steps, says="1 of 1 steps")


@pytest.mark.parametrize(("scale", "steps"), [(32.0, 3), ("dynamic", 17)])
def test_a_run_whose_gradients_always_overflow_has_diverged(model, scale, steps):
    """Row 45: a dynamic scale has its floor, a static one its number of steps in vain."""
    trainer = start(model, "O2", scale=scale)
    for _ in range(steps - 1):
        one_step(trainer, torch.randn(5, 4), factor=float("inf"))
    if scale == "dynamic":
        assert trainer.skipped_steps() == 16, "2**16 can be halved so often before it is below 1"
    one_step(trainer, torch.randn(5, 4), factor=float("inf"))
    refused("diverged", trainer.skipped_steps)


def test_on_an_npu_the_scaler_is_torch_npus_own_which_sees_what_the_910a_saturates(monkeypatch):
    made = []
    npu = SimpleNamespace(amp=SimpleNamespace(GradScaler=lambda **options: made.append(options)))
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    choice, optimizer = precision.Choice("O2", torch.float16, 32.0), torch.optim.Adam([torch.zeros(1)])
    precision.make_update(choice, optimizer, SimpleNamespace(type="npu"))
    assert made == [{"init_scale": 32.0, "growth_interval": 2000, "enabled": True}]


# ---------------------------------------------------------------- going on from a state


@pytest.mark.parametrize(
    ("level", "backend"), [(level, "native") for level in precision.LEVELS] + [("O2", "apex"), ("O3", "apex")]
)
def test_a_trainer_goes_on_from_the_state_of_another(apex, model, level, backend):
    """As a resumed run does: the same weights after the same further steps."""
    data = [torch.randn(5, 4) for _ in range(5)]
    first = start(copy.deepcopy(model), level, backend=backend)
    for each in data[:3]:
        one_step(first, each)
    state = copy.deepcopy(first.state())
    second = start(copy.deepcopy(model), level, backend=backend)
    assert not torch.equal(second.model.weight, first.model.weight)
    second.restore(state)
    for trainer in (first, second):
        for each in data[3:]:
            one_step(trainer, each)
        trainer.refresh_model()
    assert torch.equal(second.model.weight, first.model.weight)
    assert torch.equal(second.working_model.weight, first.working_model.weight)


def test_steps_in_vain_count_on_in_a_run_that_goes_on(model):
    """Row 45: a run that always overflows and is always killed has diverged too."""
    for asked_before in (False, True):
        for steps in range(3):
            first = start(copy.deepcopy(model), "O2", scale=32.0)
            for _ in range(2):
                one_step(first, torch.randn(5, 4), factor=float("inf"))
            if asked_before:
                assert first.skipped_steps() == 2
            second = start(copy.deepcopy(model), "O2", scale=32.0)
            second.restore(copy.deepcopy(first.state()))
            for _ in range(steps):
                one_step(second, torch.randn(5, 4), factor=float("inf"))
            if steps == 0:
                assert second.skipped_steps() == (0 if asked_before else 2)
            else:
                refused("diverged", second.skipped_steps)


def test_the_devices_own_scaler_goes_on_from_its_state():
    def update():
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        return precision.ScalerUpdate(scaler, 8.0, is_static=False)

    def steps(update, number):
        for _ in range(number):
            weight = torch.nn.Parameter(torch.ones(2))
            update.scaled(weight.sum()).backward()
            update.step(torch.optim.SGD([weight], lr=0.1), max_norm=0.0)

    first, second = update(), update()
    steps(first, 2)
    second.restore(first.state())
    steps(first, 1), steps(second, 1)
    assert first.scale() == second.scale() == 16.0, "grown after three steps, two of them before"


# ---------------------------------------------------------------- a batch in parts


@pytest.mark.parametrize(
    ("level", "backend"), [(level, "native") for level in precision.LEVELS] + [("O2", "apex"), ("O3", "apex")]
)
def test_the_gradients_of_parts_add_up_to_those_of_the_batch(apex, model, level, backend):
    """--accumulate: unscaled, clipped and used once. apex drops what it was not told to keep."""
    data, weights = torch.randn(6, 4), {}
    for parts in (1, 3):
        trainer = start(copy.deepcopy(model), level, scale=1.0 if level == "O3" else 32.0, backend=backend)
        for _ in range(3):
            for number, part in enumerate(data.tensor_split(parts)):
                trainer.backward(loss_of(trainer, part) / len(data), is_last=number + 1 == parts)
            trainer.step(0.1, max_norm=0.5)
        assert trainer.skipped_steps() == 0
        trainer.refresh_model()
        weights[parts] = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    tolerance = 1e-5 if level == "O0" else 0.05
    torch.testing.assert_close(weights[3], weights[1], rtol=tolerance, atol=tolerance)
    moved = max(float((a - b.detach()).abs().max()) for a, b in zip(weights[1], model.parameters(), strict=True))
    assert moved > 4 * tolerance


def test_an_overflow_in_one_part_skips_the_step(model):
    trainer = start(model, "O0", scale="dynamic")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.backward(loss_of(trainer, torch.ones(1, 4)) * float("inf"), is_last=False)
    trainer.backward(loss_of(trainer, torch.ones(1, 4)))
    trainer.step(0.1, max_norm=0.0)
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
    assert trainer.loss_scale == precision.DYNAMIC_START / 2, "once for the step"


# ---------------------------------------------------------------- apex


def test_apex_is_taken_where_it_is_installed_and_the_device_suits_it(apex, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert precision.choose("cuda", "O2", dtype="bfloat16").backend == "native", "apex casts to float16"
    assert precision.choose("npu", "O2").backend == "apex"
    assert precision.choose("cuda", "O3", backend="apex").backend == "apex"
    assert precision.choose("npu", "O2", backend="native").backend == "native"
    assert precision.choose("npu", "O1").backend == "native"
    assert precision.choose("cpu", "O2").backend == "native"


def test_without_apex_auto_is_native_without_a_word():
    choice = precision.choose("npu", "O2")
    assert (choice.backend, choice.note) == ("native", "")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("raise RuntimeError('built for another torch')", "RuntimeError: built"),
        ("from torch import nothing", "cannot import name"),
    ],
)
def test_an_apex_that_fails_to_import_is_no_apex(monkeypatch, tmp_path, broken, reason):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    choice = precision.choose("npu", "O2")
    assert choice.backend == "native"
    assert choice.note.startswith("apex is installed, but not used: ")
    refused("usage", precision.choose, "npu", "O2", backend="apex", says=reason)


def test_apex_is_called_as_it_demands(apex, model):
    trainer = start(model, "O2", scale=32.0, backend="apex")
    for _ in range(2):
        one_step(trainer, torch.randn(5, 4), max_norm=1.0)
    assert apex.calls == ["initialize O2 loss_scale=32.0 combine_grad=False"] + ["scale_loss", "step", "zero_grad"] * 2


def test_apex_clips_the_masters(apex, model):
    trainer = start(model, "O2", scale=1024.0, backend="apex")
    masters = list(apex.master_params(trainer.optimizer))
    trainer.backward(loss_of(trainer, torch.randn(5, 4)))
    norms = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([master.grad.norm() for master in masters]).norm().item())
    )
    trainer.step(0.1, max_norm=0.5)
    assert norms == [pytest.approx(0.5, rel=1e-3)]


def test_with_apex_the_model_gets_the_masters_weights_in_float32(apex, model):
    before = model.weight.detach().clone()
    trainer = start(model, "O2", backend="apex")
    assert trainer.working_model.weight.dtype == torch.bfloat16
    one_step(trainer, torch.randn(5, 4))
    trainer.refresh_model()
    master = next(iter(apex.master_params(trainer.optimizer)))
    assert torch.equal(model.weight, master)
    assert not torch.equal(model.weight, before)
    assert not torch.equal(model.weight, trainer.working_model.weight.float()), "not what was rounded to half"


def test_ascends_fused_optimizer_is_used_with_the_gradients_it_combines(apex, model):
    assert precision.apex_fused_optimizer(apex, CPU) is None
    npu = SimpleNamespace(type="npu")
    assert precision.apex_fused_optimizer(apex, npu).__name__ == "NpuFusedAdam"
    precision.ApexTrainer(precision.Choice("O2", torch.float16, 32.0, "apex"), model, npu)
    assert apex.calls == ["NpuFusedAdam", "initialize O2 loss_scale=32.0 combine_grad=True"]


def test_without_ascends_optimizers_pytorchs_own_is_used(apex, monkeypatch):
    npu = SimpleNamespace(type="npu")
    optimizers = importlib.import_module("apex.optimizers")
    monkeypatch.delattr(optimizers, "NpuFusedAdam")
    assert precision.apex_fused_optimizer(apex, npu) is None, "this apex has no fused Adam"
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    assert precision.apex_fused_optimizer(apex, npu) is None, "this apex has no optimizers"


def test_a_run_by_apex_whose_gradients_always_overflow_has_diverged(apex, model):
    trainer = start(model, "O2", scale="dynamic", backend="apex")
    for _ in range(16):
        one_step(trainer, torch.randn(5, 4), factor=float("inf"))
    assert trainer.skipped_steps() == 0, "apex says so itself"
    one_step(trainer, torch.randn(5, 4), factor=float("inf"))
    refused("diverged", trainer.skipped_steps)


def test_a_whole_run_by_apex_initialises_before_ddp_and_saves_float32(apex, monkeypatch, tmp_path, capsys):
    choice = precision.Choice("O2", torch.bfloat16, 32.0, "apex")
    monkeypatch.setattr(precision, "choose", lambda *_, **__: choice)
    parallel = distributed.World.parallel
    monkeypatch.setattr(distributed.World, "parallel", lambda *args: apex.calls.append("ddp") or parallel(*args))
    corpus = write_corpus(tmp_path / "corpus", 64)
    path = tmp_path / "model"
    flags = ["--data-dir", corpus, "--device", "cpu", "--amp", "--epochs", "1", "-b", "16", "--ckptpath", path]
    assert run_main(train_8p.main, [*map(str, flags), "--emb-dim", "8", "--hid-dim", "12"]) == 0
    out = capsys.readouterr().out
    assert "precision=bfloat16/O2 amp_backend=apex loss_scale=32.0" in out
    assert "BLEU score = " in out
    assert apex.calls[:3] == ["initialize O2 loss_scale=32.0 combine_grad=False", "ddp", "scale_loss"]
    assert apex.calls.count("step") == apex.calls.count("zero_grad") == 4
    assert {tensor.dtype for tensor in checkpoint.load(path).state_dict.values()} == {torch.float32}
