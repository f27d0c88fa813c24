"""Packed attention against plain attention of each path on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import ModelMaker
from sku.data.batches import AttentionPaths, Segment, plan_paths
from sku.errors import ModelError
from sku.training import attention as subject
from sku.training.attention import packed_attention, packed_forward_pass, use_packed_attention

SEGMENTS = [Segment(5), Segment(7, 0), Segment(3, 0), Segment(6), Segment(4), Segment(2, 4)]
SCALING = 0.3


def inputs(
    paths: AttentionPaths, *, groups: int = 2, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, number, paths.length, 16, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for number in (4, groups, groups)
    )
    return query, key, value


def by_hand(query: Tensor, key: Tensor, value: Tensor, paths: AttentionPaths, window: int | None) -> Tensor:
    """Each token over the tokens of its path, which are read from the keys of the plan; ``[1, T, H, D]``."""
    heads, groups = query.shape[1], key.shape[1]
    outputs = []
    starts = paths.key_starts.tolist()
    for index, segment in enumerate(paths.segments):
        path = paths.key_index_K[starts[index] : starts[index + 1]].tolist()
        for place in range(len(path) - segment.length, len(path)):
            seen = path[max(0, place + 1 - window) if window else 0 : place + 1]
            per_head = []
            for head in range(heads):
                group = head // (heads // groups)
                scores = SCALING * key[0, group, seen] @ query[0, head, path[place]]
                per_head.append(scores.softmax(0) @ value[0, group, seen])
            outputs.append(torch.stack(per_head))
    return torch.stack(outputs)[None]


def gradients(output: Tensor, tensors: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), tensors))


def through_layers(query: Tensor, key: Tensor, value: Tensor, paths: AttentionPaths, window: int | None) -> Tensor:
    return packed_attention(
        nn.Module(), query, key, value, None, scaling=SCALING, packed_paths=paths, sliding_window=window
    )[0]


@pytest.mark.parametrize("window", [None, 4])
def test_it_is_attention_along_the_path(window: int | None) -> None:
    paths = plan_paths(SEGMENTS)
    tensors = inputs(paths)
    expected = by_hand(*tensors, paths, window)
    output = through_layers(*tensors, paths, window)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for ours, plain in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [2, 4])
def test_variable_length_flash_is_attention_along_the_path(window: int | None, groups: int) -> None:
    """Causal must be aligned to the last key of each path, or a branch sees only the start of its prefix."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not subject._HAS_VARLEN:
        pytest.skip("this torch has no varlen_attn with groups and windows")
    paths = plan_paths(SEGMENTS)
    tensors = inputs(paths, groups=groups, device="cuda", dtype=torch.bfloat16)
    output = through_layers(*tensors, paths.to("cuda"), window)
    query, key, value = (tensor.detach().cpu().double().requires_grad_() for tensor in tensors)
    wide = (query, key, value)
    expected = by_hand(*wide, paths, window)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=3e-2, atol=2e-2)
    for ours, plain in zip(gradients(output, tensors), gradients(expected, wide), strict=True):
        torch.testing.assert_close(ours.cpu().double(), plain, rtol=5e-2, atol=5e-2)
    again = through_layers(*tensors, paths.to("cuda"), window)
    assert all(
        torch.equal(*pair) for pair in zip(gradients(output, tensors), gradients(again, tensors), strict=True)
    ), "the backward adds in a fixed order"


def test_what_the_plan_cannot_give_is_refused() -> None:
    paths = plan_paths(SEGMENTS)
    tensors = inputs(paths)
    for mask, options, named in (
        (None, {"softcap": 30.0}, "softcap"),
        (None, {"is_causal": False}, "is_causal"),
        (torch.ones(1, 1, 27, 27), {}, "mask"),
    ):
        with pytest.raises(ModelError, match=named):
            packed_attention(nn.Module(), *tensors, mask, packed_paths=paths, **options)
    harmless: dict[str, Any] = {"softcap": None, "output_attentions": False, "position_ids": torch.zeros(1, 27)}
    packed_attention(nn.Module(), *tensors, None, packed_paths=paths, **harmless)


def test_without_a_plan_it_is_sdpa_bit_for_bit(make_model: ModelMaker) -> None:
    """With padding, windows and a cache: what a callback may do between two steps."""
    plain, ours = make_model("gemma3"), make_model("gemma3")
    use_packed_attention(ours)
    ids = torch.arange(60).view(2, 30) + 5
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with torch.no_grad():
        for options in ({"attention_mask": mask}, {}):
            assert torch.equal(plain(input_ids=ids, **options).logits, ours(input_ids=ids, **options).logits)
    written = [model.generate(ids[1:], max_new_tokens=4, do_sample=False, pad_token_id=3) for model in (plain, ours)]
    assert torch.equal(*written)


def run_packed(model: Any, paths: AttentionPaths, ids: Tensor, **options: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids[None], position_ids=paths.position_T[None], use_cache=False, **options).logits
    return logits[0]


def test_a_tree_without_its_plan_is_misread_and_caught(make_model: ModelMaker) -> None:
    """A library that sees no plan takes the positions for plain packing: no error, other scores. The guard tells."""
    model = make_model(initializer_range=0.2)
    paths = plan_paths(SEGMENTS)
    ids = torch.arange(paths.length) + 40
    with torch.no_grad():
        misread = run_packed(model, paths, ids)
        with pytest.raises(ModelError, match="sdpa"), packed_forward_pass(model, paths):
            run_packed(model, paths, ids, packed_paths=paths)
        use_packed_attention(model)
        with packed_forward_pass(model, paths):
            right = run_packed(model, paths, ids, packed_paths=paths)
        with pytest.raises(ModelError, match="LlamaForCausalLM"), packed_forward_pass(model, paths):
            run_packed(model, paths, ids)
        # The second branch; transformers reads the first as going on from the prefix, as it does.
        alone = model(input_ids=torch.cat([ids[:5], ids[12:15]])[None]).logits[0, 5:]
    torch.testing.assert_close(right[12:15], alone, rtol=1e-4, atol=1e-4)
    assert functional.mse_loss(misread[12:15], alone) > 1e-3


def test_half_precision_is_computed_wide_on_a_cpu() -> None:
    paths = plan_paths(SEGMENTS)
    tensors = inputs(paths, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = through_layers(*tensors, paths, None)
    assert output.dtype == torch.bfloat16
    query, key, value = (tensor.detach().float() for tensor in tensors)
    torch.testing.assert_close(
        output, by_hand(query, key, value, paths, None).to(torch.bfloat16), rtol=1e-2, atol=1e-4
    )
