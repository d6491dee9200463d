"""Streamed blocks: the bits of resident ones, forward and backward, and no more copies than needed."""

import contextlib
import threading

import pytest
import torch

from diffsynth.models.packed_linear import pack_block_linears
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.motion import MotionGuidance, guided_step
from diffsynth.vram_management import Residency, residency, streaming
from diffsynth.vram_management.streaming import (
    BlockStream,
    ImmediateCopies,
    SideStreamCopies,
    StagedCopies,
    resident_blocks,
    tensors_of,
)

CPU = torch.device("cpu")
KEEPING = tuple({"checkpoint": kept} for kept in ("none", "attention", "block", "offload"))


def make_dit(num_layers):
    torch.manual_seed(0)
    dit = WanModel(
        dim=24, in_dim=4, ffn_dim=48, out_dim=4, text_dim=8, freq_dim=16, num_heads=2, num_layers=num_layers
    )
    return dit.requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(size, generator=generator) for size in ((1, 4, 3, 8, 8), (1, 5, 8)))
    return x, torch.tensor([700.0]), context


@contextlib.contextmanager
def streamed(dit, num_persistent_params=0):
    residency = Residency({"dit": dit}, CPU)
    residency.stream("dit", dit.blocks, num_persistent_params)
    with residency.using("dit"):
        yield residency


def gradient(dit, inputs, block, **options):
    x = inputs[0].clone().requires_grad_()
    q, k = dit.features(x, *inputs[1:], block=block, **options)
    (result,) = torch.autograd.grad((q * k).sum(), x)
    return result


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
def test_forward_passes_give_the_bits_of_resident_weights(inputs, num_layers):
    dit = make_dit(num_layers)
    with torch.no_grad():
        expected = dit(*inputs)
        with streamed(dit):
            assert all(torch.equal(dit(*inputs), expected) for _ in range(3))
        assert torch.equal(dit(*inputs), expected)


@pytest.mark.parametrize("options", KEEPING, ids=["none", "attention", "block", "offload"])
@pytest.mark.parametrize("block", [0, 1, 4, 5])
def test_gradients_have_the_bits_of_resident_weights(inputs, block, options):
    # Six blocks and two slots: a buffer that is overwritten before its backward would show.
    dit = make_dit(6)
    expected = gradient(dit, inputs, block, **options)
    with streamed(dit):
        assert all(torch.equal(gradient(dit, inputs, block, **options), expected) for _ in range(3))


@pytest.mark.parametrize("num_layers", [5, 6])
def test_passes_between_a_forward_and_its_backward_do_no_harm(inputs, num_layers):
    dit = make_dit(num_layers)
    expected = gradient(dit, inputs, 3)
    with torch.no_grad():
        velocity = dit(*inputs)
    with streamed(dit):
        x = inputs[0].clone().requires_grad_()
        q, k = dit.features(x, *inputs[1:], block=3)
        with torch.no_grad():
            assert torch.equal(dit(*inputs), velocity)
            dit.features(*inputs, block=2)
        (result,) = torch.autograd.grad((q * k).sum(), x)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("resident", [1, 4])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_guided_step_has_the_bits_of_resident_weights(inputs, resident, fp8):
    dit = make_dit(5)
    if fp8:
        pack_block_linears(dit)
    x, timestep, context = inputs
    guidance = MotionGuidance(
        guided_steps=1, inner_steps=3, interval=1, block=3, window=3, tile=(1, 1), sf=2, checkpoint="none"
    )

    def step():
        return guided_step(
            dit, x, reference=x.flip(2), noise=x, sigma=0.7, timestep=timestep, context=context,
            null_context=context, guidance=guidance,
        )[0]  # fmt: skip

    expected = step()
    block_size = sum(p.numel() for p in dit.blocks[0].parameters())
    with streamed(dit, resident * block_size):
        assert torch.equal(step(), expected)


def test_text_encoders_stream_too():
    torch.manual_seed(0)
    encoder = WanTextEncoder(
        vocab=50, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=3, num_buckets=8
    )
    ids = torch.tensor([[3, 4, 1, 0]])
    with torch.no_grad():
        expected = encoder(ids, (ids > 0).long())
        residency = Residency({"text_encoder": encoder}, CPU)
        residency.stream("text_encoder", encoder.encoder.block)
        with residency.using("text_encoder"):
            assert torch.equal(encoder(ids, (ids > 0).long()), expected)


class Simulated(ImmediateCopies):
    """A device whose copies take `copy` and whose blocks take `compute`: a clock of each queue."""

    def __init__(self, copy, compute):
        self.copy, self.compute = copy, compute
        self.now = self.engine = self.waited = 0.0
        self.copies = 0

    def start(self, into, source, after):
        super().start(into, source, after)
        self.copies += 1
        self.engine = max(self.engine, after or 0.0, self.now - self.compute) + self.copy
        return self.engine

    def wait(self, copied):
        self.waited += max(0.0, copied - self.now)
        self.now = max(self.now, copied)

    def mark(self):
        return self.now


@contextlib.contextmanager
def simulated(dit, copy, compute):
    """The DiT's blocks streamed on a simulated device, on which a forward and a backward take as long."""
    clock = Simulated(copy, compute)
    stream = BlockStream(dit.blocks, CPU, clock)
    stream.arm()
    stream._enter, enter = (
        (lambda here: (enter(here), clock.__setattr__("now", clock.now + compute))),
        stream._enter,
    )
    try:
        yield clock
    finally:
        stream.disarm()


@pytest.mark.parametrize("num_layers", [5, 6])
def test_a_forward_pass_moves_each_block_once_and_never_waits_where_computing_takes_longer(
    inputs, num_layers
):
    dit = make_dit(num_layers)
    with torch.no_grad(), simulated(dit, copy=1.0, compute=2.0) as clock:
        dit(*inputs)
        # The first block cannot come before it is asked for; the last fetches the first for the next pass.
        assert (clock.copies, clock.waited) == (num_layers + 1, 1.0)
        for _ in range(3):
            dit(*inputs)
        assert (clock.copies, clock.waited) == (4 * num_layers + 1, 1.0)


def test_where_copies_take_longer_the_difference_is_waited_for(inputs):
    dit = make_dit(5)
    with torch.no_grad(), simulated(dit, copy=3.0, compute=2.0) as clock:
        dit(*inputs)
        before = clock.waited
        dit(*inputs)
    assert clock.waited - before == pytest.approx(5 * (3.0 - 2.0))


def test_a_gradient_moves_each_block_once_forward_and_once_back(inputs):
    dit = make_dit(6)
    with simulated(dit, copy=1.0, compute=2.0) as clock:
        gradient(dit, inputs, 5)
        # All but the last two, which are still there, come a second time; the first two are then there.
        assert (clock.copies, clock.waited) == (6 + 4, 1.0)
        gradient(dit, inputs, 5)
        assert (clock.copies, clock.waited) == (6 + 4 + 4 + 4, 1.0)


def test_weights_are_back_in_cpu_memory_after_an_error(inputs):
    dit = make_dit(4)
    before = [tensor.data_ptr() for tensor in tensors_of(dit.blocks)]
    dit.blocks[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), streamed(dit):
        dit(*inputs)
    assert [tensor.data_ptr() for tensor in tensors_of(dit.blocks)] == before
    assert not dit.blocks[0]._forward_pre_hooks
    assert "queries_keys" not in vars(dit.blocks[0])


def test_the_blocks_that_stay_are_the_first_that_fit():
    blocks = make_dit(4).blocks
    size = sum(p.numel() for p in blocks[0].parameters())
    given = (0, size - 1, size, 3 * size, 10 * size)
    assert [resident_blocks(blocks, count) for count in given] == [0, 0, 1, 3, 4]


def test_blocks_that_differ_are_refused():
    dit = make_dit(2)
    pack_block_linears(dit.blocks[1].ffn)
    dit.blocks[1].ffn[0].weight.data = dit.blocks[1].ffn[0].weight.data.double()
    with pytest.raises(ValueError, match="can only be streamed if their tensors have the same shapes"):
        BlockStream(dit.blocks, CPU, ImmediateCopies()).arm()


class LateEvent:
    """A point in the queue of a device that copies as late as it may: when somebody waits for the point."""

    lock = threading.Lock()

    def __init__(self, queue):
        self.queue, self.done = queue, False

    def synchronize(self):
        with self.lock, torch.no_grad():
            while not self.done:
                event, into, source = self.queue.pop(0)
                for target, tensor in zip(into, source, strict=True):
                    target.copy_(tensor)
                event.done = True


@pytest.fixture
def late_device(monkeypatch):
    """SideStreamCopies that copy on a late device, and buffers that need no driver; returns their sizes."""
    buffers = []

    def start(self, into, source, after):
        assert after == "the work of the caller"
        self.queue.append((event := LateEvent(self.queue), into, source))
        return event

    def page_locked(size):
        buffers.append(size)
        return torch.empty(size, dtype=torch.uint8)

    for name, method in (
        ("__init__", lambda self, _device: setattr(self, "queue", [])),
        ("start", start),
        ("wait", lambda _self, copied: copied.synchronize()),
        ("mark", lambda _self: "the work of the caller"),
        ("finish", lambda self: self.queue.clear()),
    ):
        monkeypatch.setattr(SideStreamCopies, name, method)
    monkeypatch.setattr(streaming, "page_locked", page_locked)
    return buffers


@contextlib.contextmanager
def staged(dit):
    stream = BlockStream(dit.blocks, CPU, StagedCopies(CPU))
    stream.arm()
    try:
        yield
    finally:
        stream.disarm()


@pytest.mark.parametrize("fp8", [False, True])
def test_pageable_weights_come_through_two_buffers_with_the_bits_of_resident_ones(inputs, late_device, fp8):
    dit = make_dit(6)
    if fp8:
        pack_block_linears(dit)
    expected = [gradient(dit, inputs, 5, checkpoint=kept) for kept in ("none", "block")]
    with torch.no_grad():
        velocity = dit(*inputs)
    with staged(dit):
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(dit(*inputs), velocity)
            for kept, whole in zip(("none", "block"), expected, strict=True):
                assert torch.equal(gradient(dit, inputs, 5, checkpoint=kept), whole)
    largest = max(t.nbytes for t in tensors_of(dit.blocks[0]))
    assert sorted(late_device)[-2:] == [largest] * 2, "both grew to the largest tensor"
    assert len(late_device) < 2 * len(tensors_of(dit.blocks[0])), "and are used again"


@pytest.mark.usefixtures("late_device")
def test_the_caller_goes_on_while_the_thread_fills_a_buffer(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(
        streaming, "page_locked", lambda n: gate.wait(20) and torch.empty(n, dtype=torch.uint8)
    )
    copies, source, into = StagedCopies(CPU), torch.arange(8.0), torch.zeros(8)
    copied = copies.start([into], [source], None)
    assert not copied.done(), "and the caller is here"
    gate.set()
    copies.wait(copied)
    assert torch.equal(into, source)


@pytest.mark.usefixtures("late_device")
def test_what_fails_in_the_thread_fails_in_the_caller(inputs, monkeypatch):
    dit = make_dit(4)
    before = [tensor.data_ptr() for tensor in tensors_of(dit.blocks)]

    def page_locked(_size):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(streaming, "page_locked", page_locked)
    stream = BlockStream(dit.blocks, CPU, StagedCopies(CPU))
    for _ in range(3):
        stream.arm()
        with pytest.raises(RuntimeError, match="CUDA error: out of memory"), torch.no_grad():
            dit(*inputs)
        stream.disarm()
    assert [tensor.data_ptr() for tensor in tensors_of(dit.blocks)] == before


def test_weights_are_page_locked_in_one_buffer_where_what_the_allocator_takes_is_half_of_what_is_free(
    inputs, monkeypatch
):
    dit, locked = make_dit(3), []

    def page_locked(size):
        locked.append(torch.zeros(size, dtype=torch.uint8))
        return locked[-1]

    monkeypatch.setattr(residency, "page_locked", page_locked)
    with torch.no_grad():
        expected = dit(*inputs)
    size = sum(-(-t.nbytes // 64) * 64 for t in tensors_of(dit.blocks))
    taken = 2 ** size.bit_length()
    assert taken > 1.1 * size
    monkeypatch.setattr(residency, "available_memory", lambda _: 2 * taken - 1)
    assert not residency.page_lock(dit.blocks)
    assert not locked
    monkeypatch.setattr(residency, "available_memory", lambda _: 2 * taken)
    assert residency.page_lock(dit.blocks)
    assert [buffer.nbytes for buffer in locked] == [size]
    assert {t.untyped_storage().data_ptr() for t in tensors_of(dit.blocks)} == {locked[0].data_ptr()}
    with torch.no_grad():
        assert torch.equal(dit(*inputs), expected)
