"""The packed model on transformers' families: its all-full logits are stock's, sample by sample, or it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cuda_reference.data_packing import TILE, pack
from cuda_reference.data_prompts import TASKS, Sample
from cuda_reference.model import Routing, attach, routers
from cuda_reference.packed_model import PackedModel
from parity_tests.tiny_torch import FLUX, LOCAL, SIZES, prompt, stock_model
from parity_tests.tolerances import MODEL_ATOL

torch.set_num_threads(1)

HEADS = {"head_dim": 8}  # families that take it to be hidden_size / heads
WINDOWS = {**LOCAL, "use_sliding_window": True}
EQUAL = {
    "llama": {},
    "qwen3": {},
    "olmo2": HEADS,
    "glm4": {},
    "seed_oss": {},
    "helium": HEADS,
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 3.0},
    "gemma2": {**LOCAL, "attn_logit_softcapping": None, "final_logit_softcapping": 2.0},
    "gemma3_text": {},
    "olmo3": LOCAL,
    "cohere2": {**LOCAL, "logit_scale": 3.0},
    "exaone4": LOCAL,
    "qwen2": {**WINDOWS, **HEADS},
    "smollm3": {**WINDOWS, **HEADS},
}
"""Model type to what its config adds, so that what follows the head and every window count."""
ROPE = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "longrope": {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8},
}


def rope(kind):
    return {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 32, **ROPE[kind]}


def made(lengths, answer=9):
    return [Sample(np.array(prompt(n, seed=n), np.int32), n - answer, TASKS[0]) for n in lengths]


def packed_logits(model, packed, full=True):
    """Logits of every loss row with all routed layers full, or sparse."""
    layers = len(model.backbone.get_decoder().layers)
    with torch.no_grad():
        return model(packed, forced=torch.full((layers, packed.groups), full))[0]


@torch.no_grad()
def answers(stock, samples, **options):
    """A stock model's logits of the rows that predict the answers."""
    calls = [stock(torch.from_numpy(s.tokens).long()[None], use_cache=False, **options) for s in samples]
    return torch.cat([c.logits[0, s.prompt_tokens - 1 : -1] for c, s in zip(calls, samples, strict=True)])


def check_equal(stock):
    samples = made([60, 150])
    expected = answers(stock, samples)
    actual = packed_logits(PackedModel(stock, FLUX), pack(samples, TASKS, 5, 4 * TILE))
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=0, atol=MODEL_ATOL)


def check_refused(stock, message):
    with pytest.raises(ValueError, match=message):
        packed_logits(PackedModel(stock, FLUX), pack(made([60]), TASKS, 5, TILE))


@pytest.mark.parametrize("family", EQUAL)
def test_full_rows_are_stock(family):
    check_equal(stock_model(family, impl="eager", **EQUAL[family]))


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_rope_of_a_fixed_length_is_stock(kind):
    check_equal(stock_model(rope_parameters=rope(kind)))


def test_a_text_model_within_another_is_stock():
    """Its layer types and windows are those of its text config."""
    text = {**SIZES, **LOCAL, "model_type": "gemma3_text"}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**sight, "image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    check_equal(stock)
    assert sorted(routers(stock)) == [1]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", LOCAL, r"\[PackedModel\] expected plain causal scores, got \['softcap'\]"),
        ("gpt_oss", {**LOCAL, "num_local_experts": 2}, r"expected plain causal scores, got \['s_aux'\]"),
        ("nemotron", {}, "expected a pack's routing in every attention call, got none in NemotronAttention"),
        ("doge", {}, "expected masks of transformers' own making, got one that DogeAttention"),
        ("minimax", {}, r"expected attention of the registry in every layer, got none in \[1\]"),
        ("smollm3", {**LOCAL, **HEADS}, "layer 0: expected full_attention.* got layer type 'sliding_attention'"),
        ("llama", {"rope_parameters": rope("dynamic")}, r"expected RoPE that .* got \['dynamic'\]"),
        ("llama", {"rope_parameters": rope("longrope")}, r"expected RoPE that .* got \['longrope'\]"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": rope("dynamic"), "sliding_attention": rope("yarn")}},
            r"expected RoPE that .* got \['dynamic'\]",
        ),
    ],
)
def test_what_packed_attention_does_not_compute_is_refused(family, changes, message):
    check_refused(stock_model(family, impl="eager", **changes), message)


def test_the_unpacked_model_refuses_the_same_scores():
    model = attach(stock_model("gemma2", impl="eager", layer_types=["full_attention"] * 3), FLUX)
    tokens = torch.tensor([prompt(20)])
    with pytest.raises(ValueError, match=r"\[flux_attention\] expected plain causal scores, got \['softcap'\]"):
        model(tokens, routing=Routing(FLUX, [20]))


def test_windows_and_sparse_layers_together_are_the_unpacked_model():
    samples, twin = made([60, 150]), stock_model("gemma3_text")
    model = PackedModel(stock_model("gemma3_text"), FLUX)
    attach(twin, FLUX).load_state_dict(model.backbone.state_dict())
    config = replace(FLUX, route="sparse")
    expected = torch.cat([answers(twin, [s], routing=Routing(config, [s.prompt_tokens])) for s in samples])
    packed = pack(samples, TASKS, 5, 4 * TILE)
    actual = packed_logits(model, packed, full=False)
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=0, atol=MODEL_ATOL)
    assert not torch.allclose(actual, packed_logits(model, packed), atol=1e-2)


def test_windows_of_candidates_are_those_of_each_answer():
    (sample,) = made([100])
    others = tuple(np.array(prompt(n, seed=n), np.int32) for n in (7, 12))
    sample = replace(sample, candidates=(sample.answer, *others))
    stock, start = stock_model("gemma3_text"), sample.tokens[: sample.prompt_tokens]
    expected = [
        answers(stock, [Sample(np.concatenate([start, answer]), len(start), TASKS[0])]) for answer in sample.candidates
    ]
    packed = pack([sample], TASKS, 5, 2 * TILE, candidates=True)
    actual = packed_logits(PackedModel(stock, FLUX), packed)
    for branch, logits in enumerate(expected):
        found = actual[packed.loss_branch == branch]
        np.testing.assert_allclose(found.numpy(), logits.numpy(), rtol=0, atol=MODEL_ATOL)
