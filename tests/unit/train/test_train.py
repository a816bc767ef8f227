"""The pretraining loop against the algorithm written out, on two ranks, and after a resume."""

import dataclasses
import io
import logging
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from hemoco.config import (
    EncoderConfig,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    StreamConfig,
    ViewsConfig,
)
from hemoco.data.stream.bad_samples import BadSample, ReadCounts
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.distributed import rank, world_size
from hemoco.errors import CheckpointError, TrainingError
from hemoco.models.shuffle import shuffle_order
from hemoco.train.pretrain import (
    StepMetrics,
    Throughput,
    TrainState,
    build_state,
    make_views,
    train_steps,
)
from tests.helpers.ranks import run_ranks

CONFIG = PretrainConfig(
    epochs=3,
    global_batch_size=8,
    log_every_steps=1,
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    views=ViewsConfig(
        size=32,
        flip=0,
        jitter=0,
        grayscale=0,
        blur=(0, 0),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    ),
    moco=MoCoConfig(embedding_size=16, queue_length=24, momentum=0.9, bn_group_size=4),
    optimizer=OptimizerConfig(lr=0.03),
    stream=StreamConfig(lanes=1),
)
STEPS_PER_EPOCH = 2
CPU = torch.device("cpu")


def random_batches(first: int = 0, last: int = 6) -> Iterator[Batch]:
    """This rank's parts of global batches that are functions of the step."""
    mine = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        crops = torch.randint(256, (8, 2, 3, 32, 32), generator=generator, dtype=torch.uint8)[mine]
        yield Batch(crops, ["key"] * len(crops), StreamPosition(*divmod(step, STEPS_PER_EPOCH)))


def fresh(config: PretrainConfig = CONFIG, data_digest: str = "d1") -> TrainState:
    return build_state(config, CPU, data_digest=data_digest)


def train(state: TrainState, first: int, last: int) -> list[StepMetrics]:
    return list(train_steps(state, random_batches(first, last), STEPS_PER_EPOCH))


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Copies of all tensors of the model and of the optimiser."""
    named = state.model.state_dict()
    for number, buffers in state.optimizer.state_dict()["state"].items():
        named[f"momentum.{number}"] = buffers["momentum_buffer"]
    return {name: tensor.clone() for name, tensor in named.items()}


def with_moco(**changes: object) -> PretrainConfig:
    return dataclasses.replace(CONFIG, moco=dataclasses.replace(CONFIG.moco, **changes))  # type: ignore[arg-type]


def test_saved_and_loaded_training_goes_on_bit_for_bit() -> None:
    straight, first, second = (fresh() for _ in range(3))
    expected = train(straight, 0, 4)[2:]
    train(first, 0, 2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert (second.step, second.position) == (2, StreamPosition(0, 1))
    resumed = train(second, 2, 4)
    for name in ("loss", "lr", "gradient_norm", "pretext_top1", "embedding_std"):
        assert [m.values[name] for m in resumed] == [m.values[name] for m in expected]
    after, wanted = tensors(second), tensors(straight)
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


def test_a_state_of_other_shards_is_refused() -> None:
    with pytest.raises(CheckpointError, match="begun on shards with digest d2, these have d1"):
        fresh().load_state_dict(fresh(data_digest="d2").state_dict())


def losses_and_state() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    state = fresh()
    return [m.values for m in train(state, 0, 4)], tensors(state)


def test_two_ranks_train_as_one_process_does() -> None:
    (one, alone), both = losses_and_state(), run_ranks(losses_and_state, 2)
    for values, state in both:
        for mine, expected in zip(values, one, strict=True):
            assert mine["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert mine["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
            assert mine["lr"] == expected["lr"]
        # 4 steps of rounding
        torch.testing.assert_close(state["queue"], alone["queue"], atol=1e-4, rtol=0)
        assert state["queue_pointer"] == alone["queue_pointer"] == 8  # 32 keys in a queue of 24
    assert torch.equal(both[0][1]["queue"], both[1][1]["queue"])
    assert [v["loss"] for v in both[0][0]] == [v["loss"] for v in both[1][0]]


def written_out(state: TrainState) -> Iterator[float]:
    """Losses of six steps, with a list as queue and SGD by hand.

    In the order of the official code, which moves the key encoder between the two forward passes.
    """
    query, key = state.model.query_encoder, state.model.key_encoder
    queue = list(state.model.queue.T)
    velocities = [torch.zeros_like(p) for p in query.parameters()]
    for step, batch in enumerate(random_batches()):
        query_views, key_views = batch.crops.float().div(255).sub(0.5).div(0.25).unbind(1)
        queries = functional.normalize(query(query_views), dim=1)
        with torch.no_grad():
            for k, q in zip(key.parameters(), query.parameters(), strict=True):
                k.copy_(0.9 * k + 0.1 * q)
            order = shuffle_order(CONFIG.seed, step, 8).tolist()
            shuffled = functional.normalize(key(key_views[order]), dim=1)
            keys = [shuffled[order.index(i)] for i in range(8)]
        loss = torch.zeros(())
        for q, k in zip(queries, keys, strict=True):
            logits = torch.stack([q @ other for other in (k, *queue)]) / 0.2
            loss = loss + (logits.logsumexp(0) - logits[0]) / 8
        gradients = torch.autograd.grad(loss, list(query.parameters()))
        lr = 0.015 * (1 + math.cos(math.pi * (step // STEPS_PER_EPOCH) / 3))
        with torch.no_grad():
            for p, v, g in zip(query.parameters(), velocities, gradients, strict=True):
                p.sub_(lr * v.mul_(0.9).add_(g + 1e-4 * p))
        queue = queue[8:] + keys  # the order of the negatives does not matter to the loss
        yield loss.item()


def seen_views() -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key views of one step with all augmentation."""
    config = dataclasses.replace(CONFIG, views=ViewsConfig(size=32, solarize=(0.2, 0.2)))
    return make_views(next(random_batches(5)), config, order=shuffle_order(0, 7, 8))


def test_views_do_not_depend_on_the_world_size() -> None:
    alone, both = seen_views(), run_ranks(seen_views, 2)
    for index in (0, 1):
        assert torch.equal(torch.cat([views[index] for views in both]), alone[index])


def sent_for_keys() -> list[tuple[str, int]]:
    """Type and bytes of what this rank sends for its key views."""
    sent, send = [], dist.all_to_all_single

    def record(received: torch.Tensor, rows: torch.Tensor, *counts: list[int]) -> None:
        sent.append((str(rows.dtype), rows.numel() * rows.element_size()))
        send(received, rows, *counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", record)
        make_views(next(random_batches()), CONFIG, order=shuffle_order(0, 7, 8))
    return sent


def test_each_keys_crop_travels_once_and_as_bytes() -> None:
    # gathering float32 views would send 8 times as much
    assert run_ranks(sent_for_keys, 2) == [[("torch.uint8", 4 * 3 * 32 * 32)]] * 2


def test_key_views_come_in_the_order_asked_for() -> None:
    batch, order = next(random_batches()), shuffle_order(0, 7, 8)
    config = dataclasses.replace(CONFIG, views=ViewsConfig(size=32))
    permuted = make_views(batch, config, order=order).keys
    assert torch.equal(permuted, make_views(batch, config, order=None).keys[order])


def accumulated(
    parts: int, group: int = 4
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Two steps whose queries go through the encoder in parts."""
    state = fresh(dataclasses.replace(with_moco(bn_group_size=group), accumulation_steps=parts))
    return [m.values for m in train(state, 0, 2)], tensors(state)


def test_two_parts_train_as_the_whole_batch_does() -> None:
    (whole, expected), (parts, found) = accumulated(1), accumulated(2)
    for mine, theirs in zip(parts, whole, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    for name in (
        "key_encoder.head.2.weight",
        "query_encoder.head.2.weight",
        "queue",
        "queue_pointer",
    ):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_parts_on_two_ranks_train_as_on_one() -> None:
    (one, _), both = accumulated(2, 2), run_ranks(accumulated, 2, 2, 2)
    for values, _ in both:
        for mine, theirs in zip(values, one, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)


def float16_state() -> TrainState:
    encoder = EncoderConfig(architecture="resnet10t")
    return fresh(dataclasses.replace(CONFIG, precision="float16", encoder=encoder))


def test_float16_skips_the_step_of_gradients_that_overflow() -> None:
    state = float16_state()
    before, scale = tensors(state), state.scaler.get_scale()
    state.model.query_encoder.head[2].weight.register_hook(lambda gradient: gradient * math.inf)
    (first, second) = train(state, 0, 2)
    after = tensors(state)
    parameters = dict(state.model.named_parameters())
    unchanged = [name for name in before if name.startswith("momentum.") or name in parameters]
    assert all(torch.equal(after[name], before[name]) for name in unchanged)
    assert [first.values["loss_scale"], second.values["loss_scale"]] == [scale / 2, scale / 4]
    assert (state.step, state.model.queue_pointer) == (2, 16)  # the schedule and the queue go on


def test_float16_is_saved_with_its_scale() -> None:
    first, second = float16_state(), float16_state()
    first.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    values = train(first, 0, 1)[0].values
    (exact,) = train(fresh(dataclasses.replace(first.config, precision="float32")), 0, 1)
    # not multiplied by the scale
    assert values["gradient_norm"] == pytest.approx(exact.values["gradient_norm"], rel=0.05)
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == 512.0


def test_losses_equal_the_algorithm_written_out() -> None:
    losses = [m.values["loss"] for m in train(fresh(), 0, 6)]
    # rounding grows over the steps
    assert losses == pytest.approx(list(written_out(fresh())), rel=1e-4)


def test_key_encoder_moves_only_by_its_momentum() -> None:
    state = fresh(with_moco(momentum=1.0))
    before = [p.clone() for p in state.model.key_encoder.parameters()]
    train(state, 0, 5)
    after = list(state.model.key_encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimised = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in state.model.query_encoder.parameters()}


def test_keys_are_embedded_after_exactly_one_moving_average() -> None:
    state = fresh(with_moco(momentum=0.5))
    key = state.model.key_encoder.head[2].weight
    query = state.model.query_encoder.head[2].weight
    used: list[torch.Tensor] = []  # key weights, when keys are embedded
    state.model.key_encoder.register_forward_pre_hook(lambda *_: used.append(key.clone()))
    queries = []  # query weights, after each step
    for _ in train_steps(state, random_batches(), STEPS_PER_EPOCH):
        queries.append(query.detach().clone())
    expected = used[0]
    for step in range(1, 6):
        expected = (expected + queries[step - 1]) / 2
        torch.testing.assert_close(used[step], expected)


def test_each_step_enqueues_the_keys_of_the_global_batch_after_the_loss() -> None:
    state = fresh()
    outputs: list[torch.Tensor] = []
    state.model.register_forward_hook(lambda _, __, output: outputs.append(output.keys))
    for _ in train_steps(state, random_batches(), STEPS_PER_EPOCH):
        pointer = (state.step - 1) * 8 % 24
        assert torch.equal(state.model.queue[:, pointer : pointer + 8].T, outputs[-1])
    assert state.model.queue_pointer == 6 * 8 % 24


def test_values_come_every_n_steps_and_at_the_end() -> None:
    config = dataclasses.replace(CONFIG, log_every_steps=4)
    metrics = list(train_steps(fresh(config), random_batches(), STEPS_PER_EPOCH))
    assert [bool(m.values) for m in metrics] == [False, False, False, True, False, True]
    numbers = [(m.step, m.epoch, *m.position) for m in metrics]
    assert numbers[:3] == [(1, 0, 0, 0), (2, 0, 0, 1), (3, 1, 1, 0)]
    lrs = [0.5 * 0.03 * (1 + math.cos(math.pi * epoch / 3)) for epoch in (1, 2)]
    assert [m.values["lr"] for m in metrics if m.values] == pytest.approx(lrs)


def noisy_patterns(steps: int) -> Iterator[Batch]:
    """Two noisy views each of 128 patterns of 2x2 colours, 16 a step."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(128, 3, 2, 2, generator=generator).split(16)
    for step in range(steps):
        images = functional.interpolate(patterns[step % 8], size=16)  # (16, 3, 16, 16)
        images = images[:, None].expand(-1, 2, -1, -1, -1)  # (16, 2, 3, 16, 16)
        noisy = images + 0.3 * torch.randn(images.shape, generator=generator)
        yield Batch((noisy * 64 + 128).clamp(0, 255).byte(), ["key"] * 16, StreamPosition(0, step))


def test_training_tells_images_apart() -> None:
    moco = MoCoConfig(embedding_size=16, queue_length=64, momentum=0.99, bn_group_size=8)
    config = dataclasses.replace(CONFIG, global_batch_size=16, moco=moco, epochs=1)
    values = [m.values for m in train_steps(fresh(config), noisy_patterns(60), 60)]
    early, late = values[9], values[-1]  # at step 10 the queue holds keys only, all nearly alike
    assert early["embedding_std"] < 0.2
    assert late["embedding_std"] > 0.5
    assert late["positive_similarity"] > late["negative_similarity"] + 0.1


def test_an_evaluation_between_steps_does_not_freeze_batch_norm() -> None:
    state = fresh()
    for _ in train_steps(state, random_batches(0, 2), STEPS_PER_EPOCH):
        state.model.eval()
    assert state.model.query_encoder.encoder.bn1.num_batches_tracked == 2
    assert state.model.key_encoder.encoder.bn1.num_batches_tracked == 2


def test_non_finite_loss_stops_before_the_parameters_change() -> None:
    state = fresh()
    before = [p.clone() for p in state.model.query_encoder.parameters()]
    state.model.queue.fill_(math.nan)
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 1.*lower pretrain.optimizer.lr"
    ):
        next(train_steps(state, random_batches(), STEPS_PER_EPOCH))
    after = list(state.model.query_encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert state.step == 0


def test_a_constant_encoder_raises_the_alarm_after_the_first_epoch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = fresh()
    state.model.query_encoder.head.register_forward_hook(lambda _, __, x: x * 0 + 1)
    with caplog.at_level(logging.WARNING):
        train(state, 0, 3)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("event=collapse step=3 embedding_std=0.000 expected=1 advice=")


def test_rates_are_over_the_time_since_the_last_record() -> None:
    throughput = Throughput(steps=4, total_s=2.0, reading=ReadCounts(wait_s=0.5))
    assert throughput.rates(8) == {"images_per_s": 16.0, "data_wait": 0.25}
    throughput.reading = ReadCounts(
        samples=32, bytes=100, retries=3, bad=(BadSample("s", "k", "damaged"),)
    )
    assert throughput.amounts()["read_bytes_per_s"] == 50.0
    assert (throughput.amounts()["read_retries"], throughput.amounts()["bad_samples"]) == (3, 1)
