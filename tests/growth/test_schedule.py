"""Schedules of growth: the models of the shipped chains, learning rates over the stages, mistakes before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config import ModelConfig, RunConfig, load_config
from megatron.errors import UserError
from megatron.growth.schedule import Grown, GrowthSchedule
from megatron.model import LanguageModel
from megatron.training.schedule import LRSchedule
from megatron.training.state import TrainState
from tests.conftest import TINY
from tests.growth.grown_runs import CONTINUE, stage

CONFIGS = Path(__file__).parents[2] / "configs" / "incremental_scaling_openwebtext2"
VOCABULARY = 50277
STEPS = {
    "354M_train_openwebtext2_basemodel": 353_503_232,
    "354M_to_757M_train_openwebtext2_60k": 756_156_416,
    "354M_to_757M_train_openwebtext2_120k": 756_156_416,
    "757M_to_1-5B_train_openwebtext2_60k": 1_511_131_136,
}


def after(config: RunConfig, done: int) -> Grown:
    return GrowthSchedule(config.scaling).after(config.model, done)


def as_saved(config: RunConfig, saved: ModelConfig, lineage: list[dict[str, Any]]) -> Grown:
    return GrowthSchedule(config.scaling).as_saved(config.model, saved, lineage)


def progress(lineage: list[dict[str, Any]], iteration: int = 0, tokens: int = 0) -> TrainState:
    return TrainState(iteration=iteration, consumed_tokens=tokens, lineage=lineage)


def rates(config: RunConfig, now: TrainState, update_tokens: int) -> LRSchedule:
    """The learning rates of the run in this place."""
    schedule = GrowthSchedule(config.scaling, config.training.train_iters, update_tokens)
    options, start = schedule.learning_rate(config.optimization, now)
    return LRSchedule(config.replaced(optimization=options), start)


def check(config: RunConfig, now: TrainState | None = None, update_tokens: int = 64) -> None:
    schedule = GrowthSchedule(config.scaling, config.training.train_iters, update_tokens)
    schedule.check(config.model, config.optimization, config.parallel.model_parallel_size, now or TrainState())


def sizes(config: RunConfig) -> list[int]:
    """Parameters of each stage."""
    config = config.with_vocabulary(VOCABULARY)
    stages = range(len(config.scaling.growth) + 1)
    return [LanguageModel(after(config, done).model, device="meta").num_parameters() for done in stages]


@pytest.mark.parametrize("name", STEPS)
def test_each_file_has_the_size_in_its_name(name: str) -> None:
    assert sizes(load_config(CONFIGS / name)) == [STEPS[name]]


def test_one_file_has_the_whole_chain_to_1_5_billion() -> None:
    config = load_config(CONFIGS / "354M_to_757M_to_1-5B_openwebtext2")
    assert sizes(config) == [353_503_232, 756_156_416, 1_511_131_136]
    grown = after(config.with_vocabulary(VOCABULARY), 2).model.token_segments
    assert grown == {
        "qkv": [[768, 1024, 1920]] * 24,
        "proj": [[768, 1024, 1920]] * 24,
        "ffn": [[3072, 4096, 7680]] * 24,
    }


def test_one_file_has_the_chain_of_the_paper() -> None:
    config = load_config(CONFIGS / "124M_to_1-4B_openwebtext2")
    assert [round(size / 1e6, 1) for size in sizes(config)] == [123.6, 354.2, 753.8, 1309.7]


@pytest.mark.parametrize("name", ["354M_to_757M_to_1-5B_openwebtext2", "124M_to_1-4B_openwebtext2"])
def test_each_stage_of_a_chain_has_a_schedule_of_its_own(name: str) -> None:
    config = load_config(CONFIGS / name)
    lineage: list[dict[str, Any]] = []
    starts = [0, *(growth.at_iteration or 0 for growth in config.scaling.growth)]
    for start, end in zip(starts, [*starts[1:], config.training.train_iters or 0], strict=True):
        if start:
            lineage.append({"scheduled": True, "iteration": start, "updates": start, "consumed_tokens": start * 2**19})
        schedule = rates(config, progress(lineage), 2**19)
        assert schedule(start) == 0 and schedule(start + (end - start) // 100) == pytest.approx(6e-4)
        assert schedule(end) == pytest.approx(6e-5) and schedule(end - 1000) > 6e-5


def tiny(growth: list[dict[str, Any]], **keys: Any) -> RunConfig:
    return load_config([], {**TINY, "growth": growth, "save": "out", **keys})


def entry(iteration: int, tokens: int = 0) -> dict[str, Any]:
    return {"scheduled": True, "iteration": iteration, "updates": iteration, "consumed_tokens": tokens}


def test_a_restart_warms_up_and_decays_until_the_next_one() -> None:
    growth = [stage(10, lr=5e-4, min_lr=1e-5, warmup=0.5), stage(14, **CONTINUE), stage(20)]
    config = tiny(growth, train_iters=40)
    first = rates(config, progress([]), 64)
    assert [first(i) for i in (0, 10)] == pytest.approx(
        [1e-3, 1e-4]
    )  # the run's own ends where the first restart begins
    second = rates(config, progress([entry(10)]), 64)
    assert [second(i) for i in (10, 12, 15, 20)] == pytest.approx([0, 2e-4, 5e-4, 1e-5])
    third = rates(config, progress([entry(10), entry(14)]), 64)
    assert [third(i) for i in range(14, 20)] == [second(i) for i in range(14, 20)]
    last = rates(config, progress([entry(10), entry(14), entry(20)]), 64)
    assert [last(i) for i in (20, 40)] == pytest.approx([1e-3, 1e-4])


def test_a_restart_counts_updates_and_may_have_a_length_of_its_own() -> None:
    config = tiny([stage(10, lr_decay_iters=4)], train_iters=40)
    skipping = {**entry(10), "updates": 7}  # three updates were skipped
    schedule = rates(config, progress([skipping]), 64)
    assert [schedule(i) for i in (7, 11, 30)] == pytest.approx([1e-3, 1e-4, 1e-4])


def test_wsd_keeps_its_decay_for_the_end_of_the_run() -> None:
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_style": "linear", "lr_wsd_decay_iters": 4, "lr_warmup_iters": 2}
    config = tiny([stage(10, warmup=0.5), stage(20)], train_iters=30, **wsd)
    check(config)
    first, second, last = (rates(config, progress([entry(10), entry(20)][:done]), 64) for done in (0, 1, 2))
    assert [first(i) for i in (1, 2, 9)] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert [second(i) for i in (10, 12, 15, 19)] == pytest.approx([0, 4e-4, 1e-3, 1e-3])
    assert [last(i) for i in (20, 22, 26, 28, 30)] == pytest.approx([0, 1e-3, 1e-3, 5.5e-4, 1e-4])
    going_on = tiny([stage(10, **CONTINUE)], train_iters=30, **wsd)
    assert rates(going_on, progress([]), 64)(28) == pytest.approx(5.5e-4)
    anneals_early = tiny([stage(10, lr_decay_iters=8), stage(20)], train_iters=30, **wsd)
    assert rates(anneals_early, progress([entry(10)]), 64)(18) == pytest.approx(1e-4)
    with pytest.raises(
        UserError, match=r"growth\[1\]: lr_wsd_decay_iters 9 of 10 iterations from there on, of which 2"
    ):
        check(tiny([stage(10), stage(20)], train_iters=30, **{**wsd, "lr_wsd_decay_iters": 9}))


def test_a_stage_by_tokens_ends_the_schedule_before_it() -> None:
    growth = [
        {**stage(1), "at_iteration": None, "at_tokens": 1000},
        {**stage(1), "at_iteration": None, "at_tokens": 2000},
    ]
    config = tiny(growth, train_iters=60)
    first = rates(config, progress([]), 64)
    assert first.total == 16  # 1024 tokens
    second = rates(config, progress([entry(16, 1024)]), 64)
    assert (second.start, second.total) == (16, 16)


def test_a_run_that_goes_on_keeps_its_schedule() -> None:
    config = tiny([stage(10, **CONTINUE)], train_iters=40)
    begun, unbegun = rates(config, progress([entry(10)]), 64), rates(config, progress([]), 64)
    assert vars(begun) == vars(unbegun)
    assert unbegun.total == 40


BAD_SCHEDULES = [
    pytest.param(
        [stage(5, qkv_slot_num=20)], {}, r"growth\[0\]: qkv_slot_num: 20 is fewer than the 24", id="shrinking"
    ),
    pytest.param(
        [stage(5), stage(9, ffn_slot_num=60)], {}, r"growth\[1\]: ffn_slot_num: 60 is fewer than the 72", id="second"
    ),
    pytest.param([stage(5, layers=[0, 2])], {}, r"growth\[0\]: layers: 2 is not a tokenformer block", id="layers"),
    pytest.param(
        [stage(5)],
        {"norm_activation_type": "softmax"},
        r"growth\[0\]: proj_slot_num: .*12 more are no multiple of 24; choose 48",
        id="softmax",
    ),
    pytest.param(
        [{"at_iteration": 5, "ffn_slot_num": 80}],
        {"attention_config": [[["global"], 2]]},
        r"growth\[0\]: the model has no tokenformer blocks",
        id="Transformer",
    ),
    pytest.param(
        [stage(5, lr=1e-5)],
        {},
        r"growth\[0\]: lr 1e-05 is below min_lr 0.0001; give the growth a lower min_lr",
        id="lr",
    ),
    pytest.param(
        [stage(5), stage(9, freeze_old_tokens=True)],
        {},
        r"growth\[1\]: freeze_old_tokens where no tokens are added",
        id="freeze",
    ),
]


@pytest.mark.parametrize(("growth", "keys", "message"), BAD_SCHEDULES)
def test_a_growth_that_cannot_be_is_refused_before_training(
    growth: list[dict[str, Any]], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(tiny(growth, **keys).with_vocabulary(300))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"at_iteration": 5}, "entry 1: needs qkv_slot_num, proj_slot_num or ffn_slot_num"),
        ({"at_iteration": 5, "ffn_slot_num": 80, "layers": []}, "layers"),
        ({"at_iteration": 5, "ffn_slot_num": 80, "lr": float("inf")}, "lr"),
    ],
)
def test_a_stage_that_means_nothing_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny([bad])


def test_keys_of_a_stage_may_be_written_with_hyphens() -> None:
    [found] = tiny([{"at-iteration": 5, "ffn-slot-num": 80, "lr-policy": "continue"}]).scaling.growth
    assert (found.at_iteration, found.ffn_slot_num, found.lr_policy) == (5, 80, "continue")


def test_a_recipe_gives_what_an_entry_leaves_out_and_is_saved_as_keys() -> None:
    config = tiny([stage(5), stage(6, ffn_slot_num=70), stage(9, ffn_slot_num=96)])
    plain, own, changed = tiny([
        stage(5), stage(6, ffn_slot_num=70, recipe="own_norm"),
        stage(9, ffn_slot_num=96, recipe="own_norm", old_tokens_lr_scale=0.5),
    ]).scaling.growth  # fmt: skip
    assert plain == config.scaling.growth[0] and plain.recipe == "zero_keys" and plain.row_norm == "joint"
    assert own.row_norm == "segment" and own.new_keys is None and own.lr_scale is not None and own.lr_scale.old == 0.3
    assert changed.row_norm == "segment" and changed.lr_scale is None and changed.old_tokens_lr_scale == 0.5
    for growth in (own, changed):
        assert type(growth)(**growth.model_dump()) == growth
    with pytest.raises(UserError, match="zero keys cannot learn under a row norm of their own"):
        tiny([stage(5, recipe="own_norm", new_keys="zero")])
    with pytest.raises(UserError, match="recipe: 'own' is not supported; choose one of zero_keys, own_norm"):
        tiny([stage(5, recipe="own")])


def test_growths_by_iterations_and_by_tokens_are_put_in_one_order(capsys: pytest.CaptureFixture[str]) -> None:
    by_tokens = {**stage(0), "at_iteration": None, "at_tokens": 640}  # ten updates of 64 tokens
    check(tiny([stage(4), by_tokens]))
    check(tiny([by_tokens, stage(4)]), progress([], 11, 704))  # both are due
    with pytest.raises(UserError, match=r"growth\[1\]: comes at iteration 4, that before it at 10; sort the growths"):
        check(tiny([by_tokens, stage(4)]))
    check(tiny([by_tokens, stage(4)]), progress([entry(10, 640)]))  # the first is made
    capsys.readouterr()
    check(tiny([stage(50)], train_iters=49))
    assert "growth[0] is not made: it comes at iteration 50, train_iters is 49" in capsys.readouterr().out


def test_tokens_of_a_smaller_models_run_do_not_stretch_the_schedule() -> None:
    config = tiny([{**stage(0), "at_iteration": None, "at_tokens": 1000 + 5 * 64}], train_iters=60)
    since_growth = [{**entry(0, 1000), "scheduled": False}]
    for now in (progress(since_growth, 0, 1000), progress(since_growth, 3, 1000 + 3 * 64)):
        first = rates(config, now, 64)
        assert first.total == 5 and first(5) == pytest.approx(1e-4)


def test_a_checkpoints_own_configuration_goes_on_in_its_stage() -> None:
    config = tiny([stage(5, new_tokens_lr_scale=2.0), stage(9, ffn_slot_num=96)]).with_vocabulary(300)
    grown = after(config, 1)
    written = load_config([], config.replaced(model=grown.model, scaling=grown.scaling).flat()).with_vocabulary(300)
    now = as_saved(written, grown.model, [entry(5)])
    assert now.model == grown.model and now.scaling.new_tokens_lr_scale == 2.0
    check(written.replaced(model=now.model, scaling=now.scaling), progress([entry(5)]))


def test_a_growth_by_fewer_tokens_than_tensor_ranks_is_refused() -> None:
    for growth, keys in (
        ([stage(5, ffn_slot_num=41)], {}),
        ([stage(5)], {"ffn_slot_num": 71}),
    ):
        config = tiny(growth, **keys).with_vocabulary(300)
        check(config)
        parallel = config.parallel.model_copy(update={"model_parallel_size": 2})
        with pytest.raises(UserError, match="growth: ffn_slot_num grows by 1 where model_parallel_size is 2"):
            check(config.model_copy(update={"parallel": parallel}))


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ([stage(5), stage(5)], "out of order, at_iteration 5 follows 5"),
        ([stage(9), stage(5)], "out of order, at_iteration 5 follows 9"),
        ([stage(5, tower="image"), stage(5, tower="image")], "out of order, at_iteration 5 follows 5"),
        ([{"qkv_slot_num": 48}], "needs at_iteration or at_tokens, one of the two"),
        ([stage(5, at_tokens=100)], "needs at_iteration or at_tokens, one of the two"),
        ([stage(5, lr=1e-3, **CONTINUE)], "lr: belongs to a schedule of its own"),
        ([stage(5, qkv_slots=48)], "growth: entry 1: qkv_slots: unknown key"),
        ([stage(5), stage(9, ffn_slot_num=0)], "growth: entry 2: ffn_slot_num: must be greater than 0, got 0"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_when_it_is_read(growth: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tiny(growth)
    assert "\n" not in str(error.value)


def test_a_grown_checkpoint_tells_which_stage_it_is_in() -> None:
    config = tiny([stage(5), stage(9, ffn_slot_num=80)]).with_vocabulary(300)
    lineage = [entry(5), entry(9)]
    for done in (0, 1, 2):
        saved = after(config, done).model
        assert as_saved(config, saved, lineage[:done]) == after(config, done)


def test_an_edited_schedule_is_refused_after_growth() -> None:
    config = tiny([stage(5)]).with_vocabulary(300)
    saved, lineage = after(config, 1).model, [entry(5)]
    for edited, message in (
        (tiny([stage(5, ffn_slot_num=80)]), "the first 1 growths of the schedule do not lead to the model"),
        (tiny([stage(5, layers=[1])]), "the first 1 growths of the schedule do not lead to the model"),
        (tiny([]), "qkv_slot_num: 24 in the configuration, 48 in the checkpoint"),
        (tiny([stage(5)], ffn_slot_num=41), "ffn_slot_num: 41 in the configuration, 40 in the checkpoint before its 1"),
        (tiny([stage(5, ffn_slot_num=30)]), r"growth\[0\]: ffn_slot_num: 30 is fewer"),
    ):
        with pytest.raises(UserError, match=message):
            as_saved(edited.with_vocabulary(300), saved, lineage)
    with pytest.raises(UserError, match="the run has made 2 growths of its schedule, the configuration lists 1"):
        as_saved(config, saved, [*lineage, entry(9)])
