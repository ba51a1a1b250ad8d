"""Several corpora in one trial, and separate documents: exact shares, one order on every layout, exact resume."""

import numpy as np
import pytest
import ranks
import torch
from oracle import Oracle, relative_error, token_weight, unpack
from small_trials import (
    SMALL,
    SMALL_VOCABULARY,
    build,
    corpus_trial,
    metrics,
    new_attempt,
    small_trial,
    write_corpus,
)
from test_corpus import all_tokens, made_up_texts
from test_corpus import write_corpus as write_texts

from models import device, run_dir
from models.config import BlendMember, DataConfig, GateConfig, Layout, ValidationConfig, ValidationSet
from models.corpus import CorpusError, TrainBatches, gather, train_dataset, training_samples
from models.corpus.batches import separated
from models.trainer import World, passes, train

WEIGHTS = (5.0, 3.0, 2.0)


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """(sources, data) of three corpora whose documents hold only a, b and c."""
    folder = tmp_path_factory.mktemp("blend")
    members = []
    for letter, weight in zip("abc", WEIGHTS, strict=True):
        path = write_texts(folder / f"{letter}.jsonl", [letter * (40 + 7 * number) for number in range(20)])
        members.append(BlendMember(corpus=str(path), weight=weight))
    data = DataConfig(
        corpus=members[0].corpus,
        blend=tuple(members),
        sequence_length=16,
        validation_every=4,
        validation=ValidationConfig(slice_bytes=200),
    )
    return gather(data, folder / "data"), data


def member_of(tokens):
    """Which corpus each sequence came from."""
    return [chr(int(max(row))) for row in tokens.tolist()]


@pytest.mark.parametrize("num_samples", [10, 37, 400])
def test_a_blend_has_exact_shares_at_every_point(blend, num_samples):
    samples = training_samples(*blend, num_samples, seed=3)
    names = member_of(all_tokens(samples, num_samples, 1, None, 1))
    for end in range(1, num_samples + 1):
        for letter, weight in zip("abc", WEIGHTS, strict=True):
            share = end * weight / sum(WEIGHTS)
            assert abs(names[:end].count(letter) - share) <= 1 + 1e-9, (end, letter)
    if num_samples % 10 == 0:
        assert [names.count(letter) for letter in "abc"] == [num_samples * w / 10 for w in (5, 3, 2)]


def test_a_members_samples_come_in_its_own_order(blend):
    sources, data = blend
    tokens = all_tokens(training_samples(sources, data, 100, seed=3), 100, 1, None, 1)
    of_b = tokens[[name == "b" for name in member_of(tokens)]]
    alone = train_dataset(sources.blend[1][0], data, 31, seed=3)
    assert torch.equal(of_b, all_tokens(alone, 30, 1, None, 1))


def test_the_order_of_a_blend_does_not_depend_on_ranks_or_micro_batches(blend):
    whole = all_tokens(training_samples(*blend, 48, seed=1), 6, 8, None, 1)
    for micro_batch_sequences, num_ranks in [(1, 1), (None, 2), (2, 2), (1, 8), (1, 4)]:
        again = training_samples(*blend, 48, seed=1)
        assert torch.equal(all_tokens(again, 6, 8, micro_batch_sequences, num_ranks), whole)
    assert not torch.equal(all_tokens(training_samples(*blend, 48, seed=2), 6, 8, None, 1), whole)


def test_validation_documents_of_a_member_are_never_trained_on(tmp_path):
    texts = made_up_texts()
    texts = [f"{text} held" if number % 4 == 3 else text for number, text in enumerate(texts)]
    paths = [write_texts(tmp_path / f"{name}.jsonl", texts[:size]) for name, size in (("a", 20), ("b", 16))]
    blend = tuple(BlendMember(corpus=str(path), weight=1.0) for path in paths)
    data = DataConfig(corpus=str(paths[0]), blend=blend, sequence_length=32, validation_every=4)
    samples = training_samples(gather(data, tmp_path / "data"), data, 400, seed=1)
    seen = all_tokens(samples, 400, 1, None, 1).numpy().astype(np.uint8).tobytes()
    assert b"gate" in seen
    assert b"held" not in seen


def test_a_member_needs_no_validation_text_but_what_is_measured_does(tmp_path):
    long, short = write_texts(tmp_path / "a.jsonl", made_up_texts()), write_texts(tmp_path / "b.jsonl", ["b" * 90] * 3)
    blend = tuple(BlendMember(corpus=str(path), weight=1.0) for path in (long, short))
    data = DataConfig(corpus=str(long), blend=blend, sequence_length=16, validation_every=4)
    assert gather(data, tmp_path / "data").blend[1][0].split("validation").num_documents == 0
    with pytest.raises(CorpusError, match=r"b.jsonl: no validation document: every 4th is one"):
        gather(data.model_copy(update={"corpus": str(short)}), tmp_path / "data")


# --- separate documents


def batch_of(rows):
    stream = torch.tensor(rows)
    tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
    return {"tokens": tokens, "labels": labels, "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens)}


def test_an_end_of_document_opens_the_next_one():
    batch = separated(batch_of([[5, 6, 0, 7, 8, 0, 0, 9, 1], [0, 2, 3, 4, 5, 6, 7, 8, 0]]), eod=0)
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1, 1, 2, 3, 3], [1] * 8]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [*range(8)]]


SEPARATE = {
    "baseline": small_trial(),
    "gated": small_trial(GateConfig(position="sdpa")),
    "sink": small_trial(GateConfig(position="value"), SMALL.model_copy(update={"softmax_sink": True})),
}


@pytest.mark.parametrize("kind", SEPARATE)
def test_separate_documents_are_learnt_as_sequences_of_their_own(world, kind):
    """Losses and gradients of a packed batch, against the oracle on each document by itself."""
    trial = SEPARATE[kind]
    model = build(trial)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, SMALL_VOCABULARY, (2, 13), generator=generator)
    for row, places in enumerate(((4, 9), (0, 5, 6))):
        rows[row, list(places)] = 0
    batch = separated(batch_of(rows.tolist()), eod=0)
    with device.on("cpu"):
        losses = passes.token_losses(model, batch)
    weight = token_weight(losses)
    (losses.double() * weight).sum().backward()

    named = dict(model.named_parameters())
    oracle = Oracle(trial.model, trial.gates, unpack(named, trial.model, trial.gates))
    alone = torch.zeros_like(weight)
    for row in range(2):
        for document in batch["document_ids"][row].unique():
            here = batch["document_ids"][row] == document
            tokens, labels = batch["tokens"][row : row + 1, here], batch["labels"][row : row + 1, here]
            alone[row, here] = oracle.losses(tokens, labels)[0]
    (alone * weight).sum().backward()
    assert relative_error(losses, alone) < 1e-5
    gradients = unpack({name: p.grad for name, p in named.items()}, trial.model, trial.gates)
    for name, gradient in gradients.items():
        assert relative_error(gradient, oracle.weights[name].grad) < 1e-4, name
    with device.on("cpu"):
        packed = passes.token_losses(model, batch_of(rows.tolist()))
    assert relative_error(packed, alone) > 1e-3


# --- whole trials


@pytest.fixture
def mixed_trial(tmp_path):
    """A blend with separate documents and a validation set of its own."""
    corpora = [write_corpus(tmp_path / "a.jsonl"), write_texts(tmp_path / "b.jsonl", made_up_texts())]
    held = write_texts(tmp_path / "held.jsonl", made_up_texts(6, seed=9))
    trial = corpus_trial(corpora[0], steps=6)
    data = trial.data.model_copy(
        update={
            "blend": tuple(
                BlendMember(corpus=str(path), weight=weight) for path, weight in zip(corpora, (2.0, 1.0), strict=True)
            ),
            "separate_documents": True,
            "validation_sets": (ValidationSet(name="held", corpus=str(held), validation_every=1),),
            "validation": trial.data.validation.model_copy(update={"full_at_end": True}),
        }
    )
    return trial.model_copy(update={"data": data})


def test_a_stopped_trial_on_a_blend_resumes_bit_identically(tmp_path, world, mixed_trial):
    undisturbed = new_attempt(tmp_path / "whole", mixed_trial)
    train(undisturbed, world)
    first = new_attempt(tmp_path / "cut", mixed_trial)
    steps = iter([False, False, True])
    assert train(first, world, lambda: next(steps)).outcome == "stopped"
    step, checkpoint = next(iter(run_dir.complete_checkpoints(first.attempt_dir)))
    second = new_attempt(tmp_path / "cut", mixed_trial, number=2, resume_checkpoint=str(checkpoint), resume_step=step)
    assert train(second, world).outcome == "complete"
    assert step == 3
    assert metrics(first) + metrics(second) == metrics(undisturbed)


def test_every_validation_set_is_measured_beside_the_main_one(tmp_path, world, mixed_trial):
    spec = new_attempt(tmp_path, mixed_trial)
    train(spec, world)
    records = [record for record in metrics(spec) if record["kind"] == "validation"]
    assert [(record["step"], record["split"]) for record in records] == [
        (3, "slice"), (3, "held"), (6, "slice"), (6, "held"), (6, "full"), (6, "held/full"),
    ]  # fmt: skip
    by_split = {record["split"]: record for record in records}
    assert by_split["held/full"]["num_bytes"] == sum(len(text.encode()) for text in made_up_texts(6, seed=9))
    assert by_split["held"]["loss_nats"] != by_split["slice"]["loss_nats"]


def test_validation_sets_change_nothing_that_is_learnt(tmp_path, world, mixed_trial):
    data = mixed_trial.data.model_copy(update={"validation_sets": ()})
    specs = [
        new_attempt(tmp_path / str(number), trial)
        for number, trial in enumerate((mixed_trial, mixed_trial.model_copy(update={"data": data})))
    ]
    for spec in specs:
        train(spec, world)
    with_sets, without = ([r for r in metrics(spec) if not r.get("split", "").startswith("held")] for spec in specs)
    assert with_sets == without


def test_a_data_rank_takes_its_part_of_a_blend_with_separate_documents(blend):
    samples = training_samples(*blend, 8, seed=1)
    batches = TrainBatches(samples, 8, 2, rank=1, num_ranks=2, separate_at=0)
    (whole,) = TrainBatches(samples, 8, separate_at=0).micro_batches(0)
    for place, batch in enumerate(batches.micro_batches(0)):
        for name, value in batch.items():
            assert torch.equal(value, whole[name][4 + 2 * place : 6 + 2 * place]), name


def test_a_validation_set_is_mirrored_and_asked_for_by_its_name(tmp_path, world, mixed_trial):
    from orchestrator.store import ValidationRow
    from orchestrator.tracking.shown_points import validation_points

    spec = new_attempt(tmp_path, mixed_trial)
    train(spec, world)
    (record,) = [one for one in metrics(spec) if one.get("split") == "held/full"]
    names = ValidationRow.__dataclass_fields__
    row = ValidationRow(**{"attempt": 1, **{name: value for name, value in record.items() if name in names}})
    assert [point.key for point in validation_points(row, 0)][::2] == [
        "held_full_validation_loss_nats",
        "held_full_validation_bits_per_byte",
    ]


LAYOUTS = (Layout(data=2), Layout(pipeline=2), Layout(tensor=2))


def train_on_layouts(rank, folder, attempt_dirs):
    for number, directory in enumerate(attempt_dirs):
        spec = run_dir.read_attempt_spec(directory)
        world = World.join(rank, spec.layout, "cpu", f"file://{folder}/meet{number}")
        train(spec, world)
        world.leave()


def test_every_layout_learns_separate_documents_of_a_blend_as_one_rank_does(tmp_path, world, mixed_trial):
    alone = new_attempt(tmp_path / "alone", mixed_trial)
    train(alone, world)
    specs = [new_attempt(tmp_path / str(n), mixed_trial, layout=layout) for n, layout in enumerate(LAYOUTS)]
    ranks.run(train_on_layouts, 2, [spec.attempt_dir for spec in specs])
    expected = [record["loss_nats"] for record in metrics(alone) if "loss_nats" in record]
    for spec in specs:
        losses = [record["loss_nats"] for record in metrics(spec) if "loss_nats" in record]
        assert losses == pytest.approx(expected, rel=1e-5), spec.layout
