"""Step caches: decisions by hand and as published, exactness, what runs, both ways of guidance, arguments."""

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks.mag_calibration import calibrate_magcache
from diffsynth import WanVideoPipeline
from diffsynth.caches.first_block_cache import FirstBlockCache
from diffsynth.caches.mag_cache import MagCache
from diffsynth.caches.rules import Probe, StepCache, make_rule, run_blocks_cached
from diffsynth.configs.cache_tables import MagRatios, mag_cache_models
from diffsynth.configs.caches import CACHES, Cache, CacheOptions, choose_cache
from diffsynth.configs.defaults import RunDefaults
from diffsynth.configs.options import RunOptions
from diffsynth.configs.resolve import ModelFacts, resolve
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import MotionGuidance
from diffsynth.pipelines.denoise import cfg_velocity, denoise, motion_guide
from diffsynth.runs.cost import RunCost
from diffsynth.runs.state import PromptEmbeddings, RunInputs
from diffsynth.schedulers import FlowMatchScheduler

STEPS = 8
FLAT = MagRatios((1.0,) * STEPS)
LAYERS = 3


@pytest.fixture(scope="module")
def dit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanModel(
            dim=24, in_dim=4, ffn_dim=48, out_dim=4, text_dim=8, freq_dim=32, num_heads=2,
            num_layers=LAYERS, text_len=4,
        ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "noise": (1, 4, 3, 4, 4),
        "reference": (1, 4, 3, 4, 4),
        "positive": (1, 4, 8),
        "negative": (1, 3, 8),
    }
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["negative"] = torch.nn.functional.pad(drawn["negative"], (0, 0, 0, 1))
    return drawn


class Watched:
    """Makes the rules of `options`, and notes what each was asked and said."""

    def __init__(self, options):
        self.options, self.said, self.rules = options, {}, {}

    def make(self, prompt, steps, num_steps):
        rule = self.rules[prompt] = make_rule(self.options, prompt, steps, num_steps)
        said = self.said[prompt] = []
        decide = rule.decide

        def watched(probe):
            said.append(decide(probe))
            return said[-1]

        rule.decide = watched
        return rule


@torch.no_grad()
def run(dit, inputs, cache=None, *, batch=False, guide=None, num_steps=STEPS, scheduler=None, **options):
    scheduler = scheduler or FlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    run = RunOptions(num_inference_steps=num_steps, cfg_scale=4.0, batch_cfg=batch, **options)
    prompts = {"positive": range(num_steps), "negative": run.cfg_steps}
    rules = {} if cache is None else {
        name: make_rule(cache, name, steps, num_steps) for name, steps in prompts.items()
    }  # fmt: skip
    velocity = cfg_velocity(dit, PromptEmbeddings(inputs["positive"], inputs["negative"]), run, rules)
    *_, last = denoise(inputs["noise"], scheduler, velocity, guide, guided=range(2 if guide else 0))
    return last.latents


def block_rows(dit, block, calls):
    """A hook that adds the batch size of each call of a block to `calls`."""
    return dit.blocks[block].register_forward_hook(lambda _, args, __: calls.append(len(args[0])))


NOTHING = Probe(modulation=torch.empty(0), residual=None)


def options(name, threshold, **numbers):
    extra = {"magcache": {"ratios": FLAT}, "teacache": {"model_id": "Wan2.1-T2V-14B"}, "first_block": {}}
    return CacheOptions(name=name, threshold=threshold, **{**extra[name], **numbers})


@pytest.mark.parametrize(
    ("max_skip", "expected"),
    [(2, [1, 1, 0, 0, 1, 1, 0, 0]), (1, [1, 1, 0, 1, 0, 1, 0, 1])],
)
def test_magcache_decisions_are_those_reckoned_by_hand(max_skip, expected):
    # With max_skip 2: |1-0.9| = 0.1, + |1-0.81| = 0.29, + |1-0.972| = 0.318 >= 0.3; |1-0.5| >= 0.3; 0; 0.
    cache = MagCache((1, 1, 0.9, 0.9, 1.2, 0.5, 1, 1), 0.3, max_skip=max_skip, retention=0.25)
    assert [int(cache.decide(NOTHING)) for _ in range(8)] == expected


def published_decisions(table, threshold, max_skip, retention):
    """The rule as in the published code: both prompts' calls in turn, one counter."""
    ratios = [r for pair in zip(table.positive, table.negative, strict=True) for r in pair]
    errors, ratio, skipped, computed = [0.0, 0.0], [1.0, 1.0], [0, 0], ([], [])
    for call, now in enumerate(ratios):
        i, compute = call % 2, True
        if call >= int(len(ratios) * retention):
            ratio[i], skipped[i] = ratio[i] * now, skipped[i] + 1
            errors[i] += abs(1 - ratio[i])
            compute = not (errors[i] < threshold and skipped[i] <= max_skip)
            if compute:
                errors[i], ratio[i], skipped[i] = 0.0, 1.0, 0
        computed[i].append(compute)
    return {"positive": computed[0], "negative": computed[1]}


@pytest.mark.parametrize("max_skip", [2, 4, 6])
@pytest.mark.parametrize("model_id", sorted(mag_cache_models()))
def test_magcache_decisions_over_the_published_tables_are_the_published_ones(model_id, max_skip):
    model = mag_cache_models()[model_id]
    expected = published_decisions(model.ratios, model.threshold, max_skip, 0.2)
    chosen = CacheOptions(
        name="magcache", threshold=model.threshold, ratios=model.ratios, max_skip=max_skip, retention=0.2
    )
    for prompt in ("positive", "negative"):
        cache = make_rule(chosen, prompt, range(50), 50)
        decisions = [cache.decide(NOTHING) for _ in range(50)]
        assert decisions == expected[prompt]
        assert all(decisions[:10])
        assert not all(decisions)


def computed_share(table, max_skip):
    chosen = CacheOptions(name="magcache", threshold=0.12, ratios=table, max_skip=max_skip)
    cache = make_rule(chosen, "positive", range(50), 50)
    return sum(cache.decide(NOTHING) for _ in range(50)) / 50


def test_magcache_computes_as_many_steps_as_its_published_times_tell():
    # Wan2.1 1.3B took 189 s, with at most 4 skips 68 s, with at most 2 skips 87 s; the times are those of
    # square roots of the ratios, which the published code has since left away.
    table = mag_cache_models()["Wan2.1-T2V-1.3B"].ratios
    roots = MagRatios(tuple(r**0.5 for r in table.positive))
    for max_skip, seconds, plain in ((4, 68, 0.42), (2, 87, 0.5)):
        assert computed_share(roots, max_skip) == pytest.approx(seconds / 189, abs=0.025)
        assert computed_share(table, max_skip) == plain


def test_other_numbers_of_steps_take_the_nearest_steps_ratio():
    table = MagRatios((1.0, 2.0, 3.0, 4.0, 5.0), (1.0, 6.0, 7.0, 8.0, 9.0))
    assert table.of("positive", 5) == table.positive
    assert (table.of("positive", 3), table.of("negative", 3)) == ((1.0, 3.0, 5.0), (1.0, 7.0, 9.0))
    assert table.of("positive", 4) == (1.0, 2.0, 4.0, 5.0)  # 0, 1.33, 2.67, 4
    assert table.of("positive", 9) == (1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.0, 5.0, 5.0)  # halves to even
    assert table.of("positive", 1) == (5.0,)


def test_the_first_block_is_compared_with_the_last_step_whose_blocks_all_ran():
    cache = FirstBlockCache(0.1)
    seen = [1.0, 1.05, 1.09, 1.11, 1.15, 1.23]  # 5 %, 9 %, 11 % off 1.0; 3.6 %, 10.8 % off 1.11
    decisions, changes = [], []
    for value in seen:
        decisions.append(cache.decide(Probe(torch.empty(0), torch.full((1, 2, 3), value))))
        changes.append(cache.relative_change)
    assert decisions == [True, False, False, True, False, True]
    assert changes[1:] == pytest.approx([0.05, 0.09, 0.11, 0.04 / 1.11, 0.12 / 1.11], abs=1e-6)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_threshold_0_gives_the_bits_of_no_cache(dit, inputs, name, batch):
    watched = Watched(options(name, 0))
    assert torch.equal(run(dit, inputs, watched, batch=batch), run(dit, inputs, batch=batch))
    assert watched.said == {"positive": [True] * STEPS, "negative": [True] * STEPS}


@pytest.mark.parametrize(("name", "threshold"), [("teacache", 0.5), ("magcache", 0.1), ("first_block", 0.2)])
def test_blocks_run_as_often_as_the_decisions_say(dit, inputs, name, threshold):
    watched, first, last = Watched(options(name, threshold)), [], []
    hooks = [block_rows(dit, 0, first), block_rows(dit, LAYERS - 1, last)]
    cached = run(dit, inputs, watched)
    for hook in hooks:
        hook.remove()
    computed = sum(map(sum, watched.said.values()))
    assert computed < 2 * STEPS
    assert len(last) == computed
    assert len(first) == (2 * STEPS if name == "first_block" else computed)
    exact = run(dit, inputs)
    assert 0 < (cached - exact).abs().mean() < 0.3 * exact.std()


@pytest.mark.parametrize(("name", "threshold"), [("teacache", 0.5), ("magcache", 0.1), ("first_block", 0.1)])
def test_prompts_in_one_call_decide_and_give_what_they_do_in_two(dit, inputs, name, threshold):
    uneven = MagRatios(FLAT.positive, (1.0, 1.0, 1.0, 1.2, 1.0, 1.0, 1.2, 1.0))
    chosen = options(name, threshold, **({"ratios": uneven} if name == "magcache" else {}))
    two, one, rows_two, rows_one = Watched(chosen), Watched(chosen), [], []
    hook = block_rows(dit, 1, rows_two)
    in_turn = run(dit, inputs, two, batch=False)
    hook.remove()
    hook = block_rows(dit, 1, rows_one)
    together = run(dit, inputs, one, batch=True)
    hook.remove()
    assert one.said == two.said
    assert sum(rows_one) == sum(rows_two)
    assert torch.allclose(together, in_turn, atol=1e-5)
    if name == "magcache":
        assert one.said["positive"] != one.said["negative"]
        assert set(rows_one) == {1, 2}


class Says(StepCache):
    """A rule that says what it is told."""

    def __init__(self, *answers, probe_blocks=0):
        super().__init__()
        self.answers, self.probe_blocks = list(answers), probe_blocks

    def decide(self, probe):  # noqa: ARG002
        return self.answers.pop(0)


@torch.no_grad()
@pytest.mark.parametrize("probe_blocks", [0, 1])
def test_a_skipped_sample_is_its_input_plus_its_last_residual(dit, inputs, probe_blocks):
    rules = [Says(True, False, probe_blocks=probe_blocks), Says(True, True, probe_blocks=probe_blocks)]
    contexts = torch.cat([inputs["positive"], inputs["negative"]])
    states = [
        dit.embed(x.expand(2, -1, -1, -1, -1), torch.tensor([t, t]), contexts)
        for x, t in ((inputs["noise"], 900.0), (inputs["reference"], 500.0))
    ]
    before = [dit.run_blocks(state, stop=probe_blocks) for state in states]
    after = [dit.run_blocks(state) for state in states]
    assert torch.equal(run_blocks_cached(dit, states[0], rules), after[0])
    mixed = run_blocks_cached(dit, states[1], rules)
    assert torch.allclose(mixed[0], before[1][0] + (after[0] - before[0])[0], atol=1e-5)
    assert torch.allclose(mixed[1], after[1][1], atol=1e-5)


def test_guided_steps_leave_the_caches_alone(dit, inputs):
    guidance = MotionGuidance(guided_steps=2, inner_steps=1, block=1, window=3, tile=(1, 1), sf=2)
    scheduler = FlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    prompt = PromptEmbeddings(inputs["positive"], None, inputs["negative"])
    begun = RunInputs(prompts=[prompt], noise=inputs["noise"], reference=inputs["reference"], seconds={})
    guide = motion_guide(
        dit, prompt, begun, guidance, scheduler, inputs["noise"], RunCost(0, "effi_AMF", STEPS),
        memory=None, stop=lambda: False,
    )  # fmt: skip
    exact = run(dit, inputs, guide=guide, scheduler=scheduler)
    for name in CACHES:
        watched = Watched(options(name, 0))
        assert torch.equal(run(dit, inputs, watched, guide=guide, scheduler=scheduler), exact)
        assert [len(said) for said in watched.said.values()] == [STEPS, STEPS]
        skipping, rows = Watched(options(name, 0.5)), []
        hook = block_rows(dit, LAYERS - 1, rows)  # after the block that guidance reads
        moved = run(dit, inputs, skipping, guide=guide, scheduler=scheduler)
        hook.remove()
        assert len(rows) == sum(map(sum, skipping.said.values())) < 2 * STEPS
        assert not torch.equal(moved, run(dit, inputs, Watched(options(name, 0.5))))
        assert not any(rule.residual.requires_grad for rule in skipping.rules.values())


def test_a_prompt_that_joins_late_computes_first_and_reads_its_own_steps_ratios(dit, inputs):
    jump = MagRatios((1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0))
    watched = Watched(options("magcache", 0.1, ratios=jump, max_skip=9, retention=0.25))
    run(dit, inputs, watched, cfg_interval=(0.375, 0.875))  # steps 3, 4, 5, 6
    assert watched.said["positive"] == [True, True, False, False, False, True, False, False]
    assert watched.said["negative"] == [True, False, True, False]


def fake_pipe(dit, inputs):
    """A pipeline's call with what `calibrate_magcache` hands it, over the tiny DiT."""

    def pipe(prompts, negative_prompt, *, cache, output_type, num_inference_steps=STEPS, **more):
        assert (negative_prompt, output_type) == ("bad", "latent")
        for prompt in prompts:
            scaled = {**inputs, "positive": inputs["positive"] * len(prompt)}
            run(dit, scaled, cache, num_steps=num_inference_steps, **more)

    return pipe


def test_calibration_measures_the_mean_ratio_over_tokens_and_prompts(dit, inputs):
    residuals = {"positive": [], "negative": []}

    class Kept:
        def make(self, prompt, steps, num_steps):  # noqa: ARG002
            rule = Says(*[True] * STEPS)
            residuals[prompt].append([])
            rule.store = residuals[prompt][-1].append
            return rule

    fake_pipe(dit, inputs)(["a", "bb"], "bad", cache=Kept(), output_type="latent")
    measured = calibrate_magcache(fake_pipe(dit, inputs), ["a", "bb"], "bad")
    for prompt, runs in residuals.items():
        norms = torch.stack([torch.cat(steps).norm(dim=-1) for steps in runs])  # runs, steps, tokens
        expected = (norms[:, 1:] / norms[:, :-1]).mean(dim=(0, 2)).tolist()
        ratios = measured.of(prompt, len(expected) + 1)
        assert ratios == pytest.approx([1.0, *expected], abs=1e-5)


def test_calibrated_ratios_survive_json(dit, inputs):
    measured = calibrate_magcache(fake_pipe(dit, inputs), ["a"], "bad", num_inference_steps=4)
    assert len(measured.positive) == len(measured.negative) == 4
    assert MagRatios.from_json(json.loads(json.dumps(asdict(measured)))) == measured


def test_calibration_refuses_what_it_cannot_measure(dit, inputs):
    with pytest.raises(ValueError, match="prompts must be a list of at least one prompt; got 'a cat'"):
        calibrate_magcache(fake_pipe(dit, inputs), "a cat", "bad")
    with pytest.raises(ValueError, match="leave cfg_interval away"):
        calibrate_magcache(fake_pipe(dit, inputs), ["a"], "bad", cfg_interval=(0, 0.5))
    with pytest.raises(ValueError, match="ended early: positive prompts took"):
        calibrate_magcache(lambda *_, cache, **__: cache.make("positive", range(2), 2), ["a", "b"])


def test_names_choose_the_published_numbers_of_the_models_width():
    small, large = (choose_cache("magcache", None, dim) for dim in (1536, 5120))
    assert (small.threshold, small.max_skip, small.retention) == (0.12, 4, 0.2)
    assert (large.threshold, large.max_skip) == (0.24, 6)
    assert small.ratios == mag_cache_models()["Wan2.1-T2V-1.3B"].ratios
    assert choose_cache("magcache", 0.06, 160, {"positive": list(FLAT.positive)}) == options("magcache", 0.06)
    assert choose_cache("first_block", None, 160) == options("first_block", 0.05)
    tea = choose_cache("teacache", None, 1536)
    assert (tea.model_id, tea.threshold) == ("Wan2.1-T2V-1.3B", 0.05)


def cache_of(dim=160, ratios=None, **given):
    """The cache that a call resolves to, for a DiT of some width."""
    facts = ModelFacts(
        dim=dim,
        num_layers=3,
        num_heads=4,
        pixels_per_token=(16, 16),
        pixels_per_latent=8,
        frames_per_latent=4,
    )
    return resolve(given, RunDefaults(mag_ratios=ratios), None, facts).cache


def test_a_call_takes_options_as_they_are_and_none_without_any():
    tea = choose_cache("teacache", None, 1536)
    assert cache_of() is None
    assert cache_of(cache=tea) == tea


def test_the_older_tea_cache_arguments_still_mean_teacache():
    assert cache_of(1536, tea_cache_l1_thresh=0.08) == choose_cache("teacache", 0.08, 1536)
    named = cache_of(tea_cache_l1_thresh=0.2, tea_cache_model_id="Wan2.1-T2V-14B")
    assert named == options("teacache", 0.2)


BAD_CHOICES = {
    "name": ({"cache": "deepcache"}, "cache must be one of teacache, magcache, .*; got 'deepcache'"),
    "threshold alone": ({"cache_threshold": 0.1}, "cache_threshold=0.1 needs cache, one of teacache"),
    "threshold": (
        {"cache": "first_block", "cache_threshold": -1}, "cache_threshold must be .* at least 0 .*; got -1"
    ),
    "text": ({"cache": "magcache", "cache_threshold": "x"}, "cache_threshold must be .*; got 'x'"),
    "two": ({"cache": "magcache", "tea_cache_l1_thresh": 0.1}, "contradicts cache='magcache'"),
    "two thresholds": (
        {"cache": "teacache", "cache_threshold": 0.2, "tea_cache_l1_thresh": 0.1},
        "contradicts .* cache_threshold=0.2",
    ),
    "tea size": ({"cache": "teacache"}, "width 160; pass tea_cache_model_id"),
    "tea model": ({"cache": "teacache", "tea_cache_model_id": "Wan9"}, "tea_cache_model_id is 'Wan9'"),
    "no ratios": ({"cache": "magcache"}, "no MagCache ratios are known for .* width 160: measure them"),
    "options and threshold": (
        {"cache": options("first_block", 0.1), "cache_threshold": 0.2}, "needs cache as a name"
    ),
    "no options": ({"cache": 7}, "cache must be .*CacheOptions or an object with make.*; got 7"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_bad_choices_are_named(case):
    given, message = BAD_CHOICES[case]
    with pytest.raises(ValueError, match=message):
        cache_of(**given)


class EverySecond(StepCache):
    """A rule of one's own: blocks run at every second step."""

    probe_blocks = 0

    def __init__(self):
        super().__init__()
        self.step = -1

    @classmethod
    def from_options(cls, *_):
        return cls()

    def decide(self, _probe):
        self.step += 1
        return self.step % 2 == 0


def test_a_cache_that_joins_the_registry_is_known_to_the_call_by_its_name(tiny_checkpoint, monkeypatch):
    entry = Cache(
        rule=f"{__name__}:EverySecond", help="every second step", numbers=lambda *_: {"threshold": 1.0}
    )
    monkeypatch.setitem(CACHES, "every_second", entry)
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    small = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 4, "cfg_scale": 1}
    (made,) = pipe.run("a cat", **small, cache="every_second", seed=1, progress_bar_cmd=iter)
    assert made.cost.dit_block_calls == 2 * pipe.dit.num_layers
    assert made.options.to_json()["cache"]["name"] == "every_second"


def test_bad_numbers_of_magcache_are_named():
    with pytest.raises(ValueError, match="MagCache needs ratios"):
        CacheOptions(name="magcache", threshold=0.1)
    with pytest.raises(ValueError, match=r"max_skip must be a whole number of at least 1; got 0"):
        options("magcache", 0.1, max_skip=0)
    with pytest.raises(ValueError, match=r"retention must be a finite number at least 0, at most 1; got 1.5"):
        options("magcache", 0.1, retention=1.5)
    with pytest.raises(ValueError, match=r"positive must be finite and above 0; got \(1.0, -0.5\)"):
        MagRatios((1.0, -0.5))
    with pytest.raises(ValueError, match="2 positive and 1 negative ones; both must be of one run"):
        MagRatios((1.0, 1.0), (1.0,))
    with pytest.raises(ValueError, match=r"must hold positive, may hold negative; got {'neutral'"):
        MagRatios.from_json({"neutral": [1.0]})


def test_more_calls_than_steps_and_reuse_of_nothing_are_refused():
    cache = MagCache((1.0,), 0.1, max_skip=1, retention=0.2)
    with pytest.raises(RuntimeError, match="No residual is stored"):
        _ = cache.residual
    assert cache.decide(NOTHING)
    with pytest.raises(RuntimeError, match="this MagCache is for 1 steps"):
        cache.decide(NOTHING)
