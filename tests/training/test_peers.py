"""measurements.peers compares trainers that do the same work, with the option of each row on."""

import pytest
from datasets import Dataset, load_from_disk

from dualspeed.data.collator import ConversationCollator
from dualspeed.data.processing import load_processor
from measurements import kill, peer_run, peers
from tests.support.tiny import NUM_IMAGE_TOKENS

STEPS, WARM_UP, BATCH_SIZE = 10, 1, 3
MICRO_BATCHES = ("ours, mixed, tokens_per_batch", "ours, mixed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Figures of each trainer in this process, the trainers, and the forward passes of each."""
    folder = tmp_path_factory.mktemp("peers")
    kill.make_inputs(folder)
    rows = load_from_disk(folder / "data").remove_columns("num_tokens")
    mask = ConversationCollator(load_processor(folder / "base", "turns"))(list(rows))["attention_mask"]
    counts = {"num_tokens": mask.sum(dim=1).tolist(), "num_image_tokens": [NUM_IMAGE_TOKENS] * len(rows)}
    Dataset.from_dict(rows.to_dict() | counts).save_to_disk(folder / "counted")
    settings = {"base": str(folder / "base"), "data": str(folder / "counted"), "cache": str(folder / "cache")}
    figures, made, passes, makers = {}, {}, {}, dict(peer_run.MAKERS)

    def keeping(name, make):
        def kept(run):
            made[name] = make(run)
            passes[name] = []
            run.vlm.register_forward_pre_hook(lambda *_: passes[name].append(1))
            return made[name]

        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_run, "WARM_UP", WARM_UP)
        patch.setattr(peer_run, "BATCH_SIZE", BATCH_SIZE)
        for name, peer in peers.PEERS.items():
            patch.setitem(peer_run.MAKERS, peer.trainer, keeping(name, makers[peer.trainer]))
            figures[name, 1] = [peer_run.measured(settings | {"peer": name, "steps": STEPS}, folder / "out")]
    return figures, made, passes, folder


def test_every_trainer_does_the_same_work_and_is_in_the_table(trained):
    figures, made, _, _ = trained
    assert peers.unequal_losses(figures) == []
    assert sorted(map(len, peers.losses(figures))) == [1, 3, 4]
    assert [type(made[name]).__name__ for name in made] == [
        *("Trainer", "SFTTrainer", "PlainTrainer"),
        *["DualSpeedTrainer"] * (len(made) - 3),
    ]
    text = peers.report(figures, STEPS)
    for name in peers.PEERS:
        assert (f"| {name} " in text) is (name in made)
    assert "ours, mixed, packing: not there. packing: flex_attention has no backward pass on a CPU" in text
    trl = next(line for line in text.split("\n") if line.startswith(f"| {peers.TRL}"))
    assert trl.split("|")[6].strip() == "1.00"


def test_a_trainer_with_another_loss_is_said(trained):
    figures = dict(trained[0])
    other = figures[peers.TRL, 1][0]
    figures[peers.TRL, 1] = [other | {"loss": 1.01 * other["loss"]}]
    assert [*peers.unequal_losses(figures)[0]] == ["stock Trainer, 1", f"{peers.TRL}, 1", "ours, Baseline, 1"]
    assert "first losses differ" in peers.report(figures, STEPS)


def test_options_are_on_and_every_step_behind_the_warm_up_is_timed(trained):
    figures, made, passes, folder = trained
    counts = {
        name: {mode: len(of) for mode, of in run["seconds"].items()}
        for (name, _), (run,) in figures.items()
        if "seconds" in run
    }
    assert counts.pop("ours, fast") == {"fast": STEPS}
    for name, of_modes in counts.items():
        assert of_modes == ({"all": STEPS} if peers.PEERS[name].reads_all_tokens else {"fast": 9, "slow": 1})
    assert len(passes[MICRO_BATCHES[0]]) > len(passes[MICRO_BATCHES[1]])
    assert made["ours, mixed, cache_features"].cache_features and list((folder / "cache").glob("*/??/*"))
    assert not any(args.gradient_checkpointing or args.bf16 for args in (trainer.args for trainer in made.values()))


def test_mixed_steps_count_by_their_share():
    peer = peers.PEERS["ours, mixed"]
    runs = [{"seconds": {"fast": [1.0, 1.0, 9.0], "slow": [4.0]}}, {"seconds": {"fast": [1.0], "slow": [6.0]}}]
    assert peers.seconds_of(peer, runs) == pytest.approx(0.9 * 1 + 0.1 * 5)
