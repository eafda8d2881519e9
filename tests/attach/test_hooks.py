"""The pipeline's call and its networks' forward, taken over and put back; what is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from genkit.pipelines.attach import attach
from genkit.pipelines.attach.adapters import find
from tests.attach.tiny import CASES, XL_UNET, Case, distance, flux, lively, loaded, scheduler, sd, sdxl, text, unet

SD = CASES["sd"]


def test_a_failure_inside_leaves_the_pipeline_as_it_was() -> None:
    before, state = SD(3.0), dict(SD.pipe.unet.__dict__)

    def fail(pipe: Any, step: int, t: Any, tensors: Any) -> Any:
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"), attach(SD.pipe, "CFG(3.0)") as run:
        SD(2.0, callback_on_step_end=fail)
    assert SD.pipe.unet.__dict__ == state
    assert type(SD.pipe) is diffusers.StableDiffusionPipeline
    assert run.nfe == []
    assert torch.equal(SD(3.0), before)


def test_a_second_attach_is_refused_and_harmless() -> None:
    with attach(SD.pipe, "CFG(3.0)") as run:
        with pytest.raises(ValueError, match="attached already"), attach(SD.pipe, "none"):
            pass
        SD(2.0)
    assert run.nfe == [8, 8]


def test_several_calls_add_up() -> None:
    """And begin anew: neither who has stopped nor the momentum reaches the next call."""
    with attach(SD.pipe, "Adaptive(CFG(3.0), -1.0)") as run:
        SD(2.0)
        SD(2.0, batch=1)
    assert run.nfe == [5, 5, 5]
    assert run.calls == 8
    assert run.trace.column("batch") == [0] * 4 + [1] * 4
    with attach(SD.pipe, "APG(3.0, momentum=-0.9)"):
        first, again = SD(2.0), SD(2.0)
    assert torch.equal(again, first)
    with attach(SD.pipe, "APG(3.0)"):
        assert distance(SD(2.0), first) > 1e-4, "the momentum does nothing: the comparison says nothing"


def test_the_signature_stays() -> None:
    own = inspect.signature(SD.pipe.__call__)
    with attach(SD.pipe, "CFG(3.0)"):
        assert inspect.signature(SD.pipe.__call__) == own
        assert isinstance(SD.pipe, diffusers.StableDiffusionPipeline)
        assert type(SD.pipe).__name__ == "StableDiffusionPipeline"


def test_hooks_of_accelerate_stay_around_the_network() -> None:
    class Seen(ModelHook):
        rows: list[int] = []  # noqa: RUF012

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.rows.append(len(args[0] if args else kwargs["sample"]))
            return args, kwargs

    own = SD(3.0)
    add_hook_to_module(SD.pipe.unet, Seen())
    hooked = SD.pipe.unet.forward
    try:
        with attach(SD.pipe, "Interval(CFG(3.0), 1, 2, 'step')"):
            SD(2.0)
        assert Seen.rows == [2, 4, 4, 2]
        assert SD.pipe.unet.forward is hooked
        with attach(SD.pipe, "CFG(3.0)"):
            assert distance(SD(2.0), own) < 1e-5
    finally:
        remove_hook_from_module(SD.pipe.unet)
    assert torch.equal(SD(3.0), own)


def test_hooks_put_back_during_the_call_are_kept() -> None:
    """A pipeline that offloads removes its hooks at the end of a call, and adds new ones."""
    SD.pipe.unet.__dict__.pop("forward", None)  # accelerate leaves the network's own forward behind
    state, hook = dict(SD.pipe.unet.__dict__), ModelHook()
    add_hook_to_module(SD.pipe.unet, ModelHook())

    def swap(pipe: Any, step: int, t: Any, tensors: Any) -> Any:
        if step == 3:
            remove_hook_from_module(pipe.unet)
            add_hook_to_module(pipe.unet, hook)
        return tensors

    try:
        with attach(SD.pipe, "CFG(3.0)") as run:
            SD(2.0, callback_on_step_end=swap)
            assert SD.pipe.unet._hf_hook is hook
            SD(2.0)
        assert run.nfe == [8] * 4
        assert SD.pipe.unet._hf_hook is hook
    finally:
        remove_hook_from_module(SD.pipe.unet)
    SD.pipe.unet.__dict__.pop("forward")
    assert SD.pipe.unet.__dict__ == state


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_compiled_networks_stay_compiled(way: str) -> None:
    """The compiled network is called with the rows that are left; the hook is outside of it."""
    rows: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        rows.extend(len(v) for v in inputs if isinstance(v, torch.Tensor) and v.shape[1:] == (4, 8, 8))
        return graph.forward

    case, net = CASES["dit"], CASES["dit"].pipe.transformer
    own, state = case(3.0, num_inference_steps=2), dict(net.__dict__)
    if way == "in place":
        net.compile(backend=backend, dynamic=False)
    part = torch.compile(net, backend=backend, dynamic=False) if way == "wrapped" else net
    pipe = diffusers.DiTPipeline(part, case.pipe.vae, case.pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    try:
        with attach(pipe, "Interval(CFG(3.0), 0, 9, 'step')"):
            got = case(2.0, pipe=pipe, num_inference_steps=2)
        assert distance(got, own) < 1e-5
        assert set(rows) == {4}, "the compiled network was not called"
        with attach(pipe, "PAG(3.0)"), pytest.raises(ValueError, match="is compiled"):
            case(2.0, pipe=pipe)
    finally:
        net._compiled_call_impl = None
        torch._dynamo.reset()
    for name in ("_compiled_call_impl", "_is_torch_compile"):  # torch's own
        net.__dict__.pop(name, None)
    assert net.__dict__ == state
    assert torch.equal(case(3.0, num_inference_steps=2), own)


# ---- what is refused ----


def test_guidance_of_the_pipeline_must_be_on() -> None:
    for name, hint in (
        ("sd", "guidance_scale=2"),
        ("pixart", "guidance_scale=2"),
        ("flux", "true_cfg_scale=2"),
        ("wan", "guidance_scale=2"),
    ):
        case = CASES[name]
        with attach(case.pipe, "CFG(3.0)"), pytest.raises(ValueError, match=f"pass .*{hint}.*no effect"):
            case(1.0)
        own = case(1.0)
        with attach(case.pipe, "none"):
            off = case(1.0)
        assert distance(off, own) < 1e-5
        assert distance(off, case(2.0)) > 1e-3


def test_distilled_networks_have_no_unconditional_branch() -> None:
    lcm = sd("LatentConsistencyModelPipeline", {"time_cond_proj_dim": 8}, scheduler=scheduler(diffusers.LCMScheduler))
    lcm.set_progress_bar_config(disable=True)
    case = Case(sd, lambda b: {"prompt_embeds": text(b)["prompt_embeds"], "height": 8, "width": 8})
    own = case(5.0, pipe=lcm)
    with attach(lcm, "none"):
        assert distance(case(5.0, pipe=lcm), own) < 1e-5
    distilled = sd(unet=lcm.unet)
    for pipe, call in ((lcm, case), (distilled, SD)):
        pipe.set_progress_bar_config(disable=True)
        with attach(pipe, "CFG(3.0)"), pytest.raises(ValueError, match="no unconditional branch"):
            call(5.0, pipe=pipe)
    embedded = loaded(flux, True)
    with attach(embedded, "CFG(3.0)"), pytest.raises(ValueError, match="embedded in this distilled network"):
        CASES["flux"](1.0, pipe=embedded)
    own = CASES["flux"](3.0, pipe=embedded)
    with attach(embedded, "CFG(3.0)"):
        assert distance(CASES["flux"](2.0, pipe=embedded), own) < 1e-5


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("sd", {"guidance_rescale": 0.7}),
        ("sd3", {"skip_guidance_layers": [0]}),
        ("lumina 2", {"cfg_trunc_ratio": 0.5}),
        ("z-image", {"cfg_normalization": True}),
        ("z-image", {"cfg_truncation": 0.5}),
    ],
)
def test_other_guidance_of_the_pipeline_is_refused(name: str, argument: dict[str, Any]) -> None:
    case = CASES[name]
    with attach(case.pipe, "CFG(3.0)"), pytest.raises(ValueError, match=next(iter(argument))):
        case(2.0, **argument)


def test_a_callback_that_changes_guidance_is_refused() -> None:
    from diffusers.callbacks import SDCFGCutoffCallback

    before = SD(3.0)
    with attach(SD.pipe, "CFG(3.0)"), pytest.raises(ValueError, match="a callback changed the guidance"):
        SD(
            2.0,
            batch=1,
            callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
    assert torch.equal(SD(3.0), before)


def test_unknown_pipelines_and_options_are_refused() -> None:
    pag = sd("StableDiffusionPAGPipeline", pag_applied_layers="mid")
    for pipe, message in ((pag, "guidance of its own.*StableDiffusionPipeline"), (object(), "no adapter")):
        with pytest.raises(ValueError, match=message), attach(pipe, 3.0):
            pass
    dit = CASES["dit"]
    with attach(dit.pipe, 3.0, negative="blurry"), pytest.raises(ValueError, match="takes no negative prompt"):
        dit(2.0)
    dit.pipe.transformer.train()
    try:
        with attach(dit.pipe, 3.0), pytest.raises(ValueError, match="training mode"):
            dit(2.0)
    finally:
        dit.pipe.transformer.eval()
    with pytest.raises(ValueError, match="gligen"), attach(SD.pipe, 3.0):
        SD(2.0, cross_attention_kwargs={"gligen": {"boxes": torch.zeros(4, 2, 4)}})


def test_a_cached_network_is_refused() -> None:
    pipe = CASES["flux"].pipe
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    try:
        with attach(pipe, 3.0), pytest.raises(ValueError, match="disable_cache"):
            CASES["flux"](2.0)
    finally:
        pipe.transformer.disable_cache()


def test_a_subclass_has_the_adapter_of_its_parent() -> None:
    class Mine(diffusers.StableDiffusionPipeline):
        pass

    assert find(Mine.__new__(Mine)) is find(SD.pipe)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("make", "name", "options"), [(sd, "sd", {}), (sdxl, "sdxl", XL_UNET)], ids=["sd", "sdxl"])
def test_ip_adapter_embeddings_are_split_with_their_rows(make: Any, name: str, options: Any, masked: bool) -> None:
    net = unet(**options)
    net.register_to_config(encoder_hid_dim_type="ip_image_proj")
    net.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(6, 12, 2)])
    kinds = {}
    for key, processor in net.attn_processors.items():
        kinds[key] = processor
        if key.endswith("attn2.processor"):
            size = net.get_submodule(key.removesuffix(".processor")).to_q.out_features
            kinds[key] = diffusers.models.attention_processor.IPAdapterAttnProcessor2_0(size, 12, num_tokens=(2,))
    net.set_attn_processor(kinds)
    lively(net)
    pipe, case = make(unet=net.eval()), CASES[name]
    pipe.set_progress_bar_config(disable=True)
    image: dict[str, Any] = {"ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 1, 6), torch.ones(1, 1, 6)])]}
    if masked:
        half = torch.zeros(1, 1, 8, 8)
        half[..., :4] = 1
        image["cross_attention_kwargs"] = {"ip_adapter_masks": [half]}
    own = case(3.0, batch=1, pipe=pipe, **image)
    other = {**image, "ip_adapter_image_embeds": [torch.zeros(2, 1, 6)]}
    assert distance(case(3.0, batch=1, pipe=pipe, **other), own) > 1e-3
    with attach(pipe, "Interval(CFG(3.0), 0, 9, 'step')") as run:
        got = case(2.0, batch=1, pipe=pipe, **image)
    assert distance(got, own) < 1e-5
    assert run.nfe == [8]
    with attach(pipe, "none"):
        got = case(2.0, batch=1, pipe=pipe, **image)
    assert distance(got, case(1.0, batch=1, pipe=pipe, **{**image, "ip_adapter_image_embeds": [torch.ones(1, 1, 6)]})) < 1e-5
