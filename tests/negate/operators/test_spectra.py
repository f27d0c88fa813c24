"""What goes into each layer: against a covariance taken by hand, cached or not."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ModelMaker, TokenizerMaker
from negate.conftest import ContextMaker
from sku.data.examples import ForgetRetainData
from sku.data.tokens import TokenizedExample
from sku.errors import TaskVectorError
from sku.negate.operators.base import OperatorContext, context_of, linear_weights
from sku.negate.operators.by_inputs import InputSpectra, Spectrum, input_groups, input_spectra
from sku.negate.operators.texts import InputSettings, Part, SharedTokens, batch_of, drawn, shared_tokens


def measured(context: OperatorContext, text: Any = "normal", part: Part = "own", **settings: Any) -> InputSpectra:
    return input_spectra(context, text, InputSettings(**settings), part)


def inputs_by_hand(context: Any, layer: str, rows: slice = slice(1, None)) -> Tensor:
    """Inputs of a layer, one example at a time: no padding, no batch. The first position counts nowhere."""
    seen: list[Tensor] = []
    module = context.base.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for example in context.normal:
            context.base(input_ids=torch.tensor([example.input_ids]))
            seen[-1] = seen[-1][rows]
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize(
    ("positions", "rows"), [("all", slice(1, None)), ("answer", slice(2, -1)), ("prompt", slice(None))]
)
def test_the_matrix_is_the_mean_over_real_positions(positions: str, rows: slice, make_context: ContextMaker) -> None:
    """The answer begins at token 3, so that positions 2 to the last but one come before its tokens."""
    context = make_context()
    spectra = measured(context, "normal", positions=positions)
    for layer in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        inputs = inputs_by_hand(context, layer, rows)
        if positions == "prompt":
            inputs = torch.cat([part[[1, -1]] for part in per_example(inputs, context)])
        spectrum = spectra.of(f"{layer}.weight")
        assert spectrum is not None
        torch.testing.assert_close(spectrum.matrix(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)
    assert spectra.positions == len(inputs)


def per_example(rows: Tensor, context: Any) -> tuple[Tensor, ...]:
    return torch.split(rows, [len(example.input_ids) for example in context.normal])


def with_template(head: tuple[int, ...], tail: tuple[int, ...], context: OperatorContext) -> OperatorContext:
    """The same prompts and answers, written into a chat template with a system prompt."""

    def written(text: TokenizedExample) -> TokenizedExample:
        prompt, answer = text.input_ids[: text.answer_start], text.input_ids[text.answer_start :]
        begun = (*head, *prompt, *tail)
        return TokenizedExample(
            input_ids=(*begun, *answer), labels=(*[-100] * len(begun), *answer), answer_start=len(begun)
        )

    return dataclasses.replace(
        context,
        normal=tuple(map(written, context.normal)),
        harmful=tuple(map(written, context.harmful)),
        memory={},
    )


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_what_every_prompt_shares_is_not_counted(positions: str, make_context: ContextMaker) -> None:
    """A template of five tokens before and three after: of the latter only the last, where the answer begins."""
    context = with_template((5, 6, 7, 8, 9), (3, 4, 3), make_context())
    spectra = measured(context, "normal", positions=positions)
    layer = "model.layers.0.self_attn.k_proj"
    whole = per_example(inputs_by_hand(context, layer, slice(None)), context)
    own = [5, 6, 7] if positions == "all" else []  # The three tokens of each prompt.
    after = 10  # The generation prompt's last token.
    rows = [torch.cat([part[own], part[after:] if positions == "all" else part[after:-1]]) for part in whole]
    inputs = torch.cat(rows)
    assert spectra.positions == len(inputs)
    spectrum = spectra.of(f"{layer}.weight")
    assert spectrum is not None
    torch.testing.assert_close(spectrum.matrix(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)
    shared = measured(context, "normal", positions=positions, part="shared")
    assert shared.positions == (len(whole) * (5 + 2) if positions == "all" else 0)


def test_positions_that_decide(make_context: ContextMaker) -> None:
    """Three template tokens, the prompt's last one before them, and two tokens of the answer; no beginnings."""
    context = with_template((5, 6), (3, 4, 3), make_context())
    decision: dict[str, Any] = {"positions": "decision", "prompt_tokens": 4, "answer_tokens": 2}
    spectra = measured(context, "normal", **decision)
    layer = "model.layers.1.mlp.down_proj"
    inputs = torch.cat([part[4:10] for part in per_example(inputs_by_hand(context, layer, slice(None)), context)])
    spectrum = spectra.of(f"{layer}.weight")
    assert spectrum is not None
    assert spectra.positions == len(inputs)
    torch.testing.assert_close(spectrum.matrix(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)
    many: dict[str, Any] = {"positions": "decision", "prompt_tokens": 99, "answer_tokens": 99}
    spectra = measured(context, "normal", **many)
    assert spectra.positions == sum(len(one.input_ids) - 2 for one in context.normal)
    shared = measured(context, "normal", part="shared", **decision)
    assert shared.positions == 2 * len(context.normal), "the beginnings are protected as a part of their own"


def test_shared_tokens_are_those_of_harmful_and_normal_prompts_together(make_context: ContextMaker) -> None:
    context = with_template((5, 6), (3,), make_context())
    assert shared_tokens([*context.normal, *context.harmful]) == SharedTokens(first=2, last=1)
    # Normal prompts alone share one token more: it tells them from harmful ones, so it counts.
    alone = with_template((5, 6, 9), (3,), make_context())
    assert shared_tokens(alone.normal) == SharedTokens(first=3, last=1)
    assert shared_tokens([*alone.normal, *context.harmful]) == SharedTokens(first=2, last=1)
    assert shared_tokens([context.normal[0]] * 3) == SharedTokens(first=1, last=0), "one prompt tells nothing"


def test_the_system_prompt_of_a_chat_template_is_found_in_the_token_ids(
    make_model: ModelMaker, make_tokenizer: TokenizerMaker, data: ForgetRetainData
) -> None:
    """As the prompts are rendered: from the first token to the user's words, and from their end to the answer."""
    tokenizer = make_tokenizer(chat=True)
    system = "<|im_start|>system\nyou sing of honey .<|im_end|>\n"
    tokenizer.chat_template = system + str(tokenizer.chat_template)
    context = context_of(make_model(), tokenizer, data)
    found = shared_tokens([*context.harmful, *context.normal])
    head = tokenizer(system + "<|im_start|>user\n", add_special_tokens=False).input_ids
    tail = tokenizer(" ?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).input_ids
    assert (found.first, found.last) == (len(head), len(tail)), "all prompts of these data end with a question mark"
    spectra = measured(context, "normal")
    assert spectra.positions == sum(len(one.input_ids) - len(head) - len(tail) + 1 for one in context.normal)


def test_another_template_of_the_harmful_side_is_not_taken_from_the_cache(
    make_context: ContextMaker, tmp_path: Path
) -> None:
    """What normal and harmful prompts share decides which normal positions count."""
    same = with_template((5, 6), (3,), make_context(cache=tmp_path))
    other = dataclasses.replace(same, harmful=with_template((9,), (3,), make_context()).harmful, memory={})
    first, second = (measured(context, "normal") for context in (same, other))
    assert first.positions == second.positions - len(same.normal)
    assert len(list(tmp_path.iterdir())) == 2


def test_long_inputs_count_like_short_ones_where_directions_alone_count(make_context: ContextMaker) -> None:
    context = make_context()
    spectrum = measured(context, "normal", unit=True).of("model.layers.0.mlp.up_proj.weight")
    assert spectrum is not None
    inputs = torch.nn.functional.normalize(inputs_by_hand(context, "model.layers.0.mlp.up_proj"), dim=1)
    torch.testing.assert_close(spectrum.matrix(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)
    assert float(spectrum.energies_I.sum()) == pytest.approx(1.0, abs=1e-4)


def test_layers_that_read_the_same_tensor_share_a_matrix(make_context: ContextMaker) -> None:
    context = make_context()
    groups = input_groups(context.base, batch_of(context.normal[:2], torch.device("cpu")))
    attention = "model.layers.1.self_attn"
    for name in ("q", "k", "v"):
        assert groups[f"{attention}.{name}_proj.weight"] == f"{attention}.q_proj.weight"
    assert groups["model.layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.gate_proj.weight"
    assert len(set(groups.values())) == 2 * 4 + 1, "four inputs a layer and that of the output head"
    spectra = measured(context, "normal")
    assert len(spectra.of_group) == 9
    assert spectra.of(f"{attention}.q_proj.weight") is spectra.of(f"{attention}.v_proj.weight")


def test_a_tied_output_head_is_no_linear_layer(make_model: ModelMaker) -> None:
    assert "lm_head.weight" in linear_weights(make_model("llama"))
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(linear_weights(make_model("llama_tied")))


def test_cached_is_fresh_bit_for_bit_and_private(make_context: ContextMaker, tmp_path: Path) -> None:
    fresh = measured(make_context(), "normal")
    written = measured(make_context(cache=tmp_path), "normal")
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = (folder / "spectra.safetensors").stat().st_mtime_ns
    read = measured(make_context(cache=tmp_path), "normal")
    assert (folder / "spectra.safetensors").stat().st_mtime_ns == before
    for other in (written, read):
        assert_equal(fresh, other)


def assert_equal(first: InputSpectra, second: InputSpectra) -> None:
    assert (first.group_of, first.positions) == (second.group_of, second.positions)
    for name, spectrum in first.of_group.items():
        for item in dataclasses.fields(Spectrum):
            assert torch.equal(getattr(spectrum, item.name), getattr(second.of_group[name], item.name)), name


def test_another_model_text_or_position_is_not_taken_from_the_cache(
    make_context: ContextMaker, make_model: ModelMaker, tmp_path: Path
) -> None:
    measured(make_context(cache=tmp_path), "normal")
    measured(make_context(cache=tmp_path), "harmful")
    measured(make_context(cache=tmp_path), "normal", positions="answer")
    measured(make_context(cache=tmp_path), "normal", examples=3)
    measured(make_context(make_model(seed=5), cache=tmp_path), "normal")
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_cache_is_named(make_context: ContextMaker, tmp_path: Path) -> None:
    measured(make_context(cache=tmp_path), "normal")
    (folder,) = tmp_path.iterdir()
    (folder / "spectra.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TaskVectorError, match="is damaged .*: remove"):
        measured(make_context(cache=tmp_path), "normal")


def test_inputs_that_are_not_finite_are_named(make_context: ContextMaker, make_model: ModelMaker) -> None:
    base = make_model()
    with torch.no_grad():
        base.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(TaskVectorError, match=r"inputs of model\.layers\.0\.self_attn\.q_proj\.weight hold NaN"):
        measured(make_context(base), "normal")


def test_the_model_is_left_as_it_was(make_context: ContextMaker, make_model: ModelMaker) -> None:
    base = make_model()
    base.train()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    measured(make_context(base), "normal")
    assert base.training
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert all(torch.equal(before[name], weight) for name, weight in base.state_dict().items())


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.62, 2), (0.9, 2), (0.95, 3), (1.0, 3)])
def test_rank_by_energy(energy: float, rank: int) -> None:
    """Energies 6, 3, 1 and nothing: 60 %, 90 %, 100 % of the trace."""
    spectrum = Spectrum(energies_I=torch.tensor([6.0, 3.0, 1.0, 0.0]), directions_II=torch.eye(4))
    assert spectrum.rank(energy) == rank
    assert spectrum.top(rank).shape == (4, rank)


def test_a_layer_without_input_has_rank_0() -> None:
    assert Spectrum(energies_I=torch.zeros(3), directions_II=torch.eye(3)).rank(1.0) == 0


def test_drawing_is_by_seed_and_keeps_the_order(make_context: ContextMaker) -> None:
    normal = make_context().normal
    assert drawn(normal, 6, 0) == list(normal)
    assert drawn(normal, 3, 1) == drawn(normal, 3, 1)
    chosen = drawn(normal, 3, 1)
    assert chosen == [item for item in normal if item in chosen]
